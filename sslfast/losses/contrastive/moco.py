"""MoCo: a positive key against a queue of keys (v1, v2), and against the keys of the batch (v3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import check_matrix, scalar_tensor
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...distributed.scope import Scope
from ...ops.similarity_lse import terms_of
from ...ops.types import Pairs, SimilarityTerms, Want
from .._inputs import views_and_queue
from ..memory_queue import MemoryQueue
from ._info_nce_inputs import Formula, checked
from ._inputs import ContrastiveLoss, inverse, row_dots, softplus
from .diagnostics import Diagnosed, Diagnostics, diagnostics_of, with_diagnostics
from .info_nce import diagnosed_info_nce


@over_ranks()
def moco(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    normalize: bool = True,
    gather_distributed: bool = False,
    strategy: str = "gather",
) -> Tensor:
    """Cross entropy of each query's own key among the keys of a queue, mean over the N queries.

        ℓ_i = −log( exp(q_i·k_i / τ) / (exp(q_i·k_i / τ) + Σ_j exp(q_i·queue_j / τ)) )

    The gradient comes along in the forward; neither logits nor (where the dtypes agree) a copy of the queue is stored.

    Args:
        q, k: [N, D], row ``i`` of both from image ``i``; float32, float64, bfloat16 or float16. ``k`` receives a
            gradient if it wants one; MoCo's comes from the momentum encoder, without.
        queue: [K, D] negatives, as they are and without gradient (of solo-learn's [D, K] pass the transpose). Where the
            dtypes differ the wider one is used for all.
        temperature: τ, finite and not zero (default 0.07); or a one-element tensor, which receives its gradient.
        normalize: divide the rows of q and k by their norms first (default).
        gather_distributed: weigh this rank's mean for the mean over all ranks' queries. The queue is this rank's copy
            of one that all share (:class:`MemoryQueue` with ``gather_distributed=True``).
        strategy: ``"gather"`` or ``"ring"``: nothing travels here, so both are the same.

    Returns:
        [] float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: shapes, widths, dtypes or devices do not fit, or the temperature is zero or not finite.

    Source: He et al. 2020, "Momentum Contrast for Unsupervised Visual Representation Learning", equation 1; value
    as facebookresearch/moco's, solo-learn's ``mocov2plus_loss_func``, and lightly 1.6.0's ``NTXentLoss`` with a bank.

    Example:
        >>> loss = sslfast.moco(torch.eye(4), torch.eye(4), queue=-torch.eye(4), temperature=0.5)
        >>> round(loss.item(), 4)
        0.3537
    """
    q, k, queue = views_and_queue(("q", q), ("k", k), queue, normalize)
    return _moco(q, k, queue, temperature, scope_of(gather_distributed, strategy))[0]


@over_ranks("temperature")
def _moco(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    temperature: float | Tensor,
    scope: Scope,
    diagnostics: bool = False,
) -> Diagnosed:
    scale = inverse(temperature, q)
    shard = scope.shard(q)
    positive = scale * row_dots(q, k.unsqueeze(1)).squeeze(1)  # [N]
    # The queue is not sharded: every rank holds all of it.
    pairs = Pairs(q, queue, scale)
    row_lse = terms_of(pairs).row_lse  # [N]
    loss = shard.weight * softplus(row_lse - positive).sum()
    if not diagnostics:
        return loss, None
    with torch.no_grad():  # a pass of its own: one with both would read the queue again in the backward
        hardest = terms_of(pairs, Want(hardest=True)).hardest
        terms = SimilarityTerms(torch.logaddexp(row_lse, positive), None, positive, hardest)
    return loss, diagnostics_of(terms, scale, q.shape[0] * (queue.shape[0] + 1))


def moco_v3(
    q: Tensor,
    k: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    normalize: bool = True,
    gather_distributed: bool = False,
    strategy: str = "gather",
) -> Tensor:
    """InfoNCE of queries against the batch's keys, which receive no gradient, times 2τ.

    One direction: MoCo v3's loss of two views is ``moco_v3(q1, k2) + moco_v3(q2, k1)``. Arguments, result and errors
    are those of :func:`info_nce`; the temperature's default is 0.2.

    Source: Chen et al. 2021, "An Empirical Study of Training Self-Supervised Vision Transformers", algorithm 1; value
    as facebookresearch/moco-v3's and solo-learn's ``mocov3_loss_func``.

    Example:
        >>> q1 = q2 = k1 = k2 = torch.eye(4)
        >>> round((sslfast.moco_v3(q1, k2) + sslfast.moco_v3(q2, k1)).item(), 4)
        0.016
    """
    return _moco_v3(q, k, temperature, normalize, scope_of(gather_distributed, strategy))[0]


@over_ranks("temperature")
def _moco_v3(
    q: Tensor,
    k: Tensor,
    temperature: float | Tensor,
    normalize: bool,
    scope: Scope,
    diagnostics: bool = False,
) -> Diagnosed:
    check_matrix("k", k)
    inputs = checked(q, k.detach(), normalize=normalize)
    loss, found = diagnosed_info_nce(inputs, temperature, Formula(), scope, diagnostics)
    return 2 * scalar_tensor("temperature", temperature, q) * loss, found


class MoCoLoss(ContrastiveLoss):
    """:func:`moco` with its own :class:`MemoryQueue`, which takes in the keys after each training step's loss.

    Args:
        size: K, how many keys the queue keeps.
        dim: D, their width.
        temperature: as :func:`moco` (default 0.07); a tensor or ``nn.Parameter`` moves with the module.
        gather_distributed: enqueue the keys of all ranks.
        strategy, diagnostics: as :func:`moco`.

    Shapes:
        ``q``, ``k``: [N, D], normalised here; output: [], or ``(loss, diagnostics)``.

    The keys are enqueued where the loss is to be differentiated with respect to ``q``, so that an evaluation leaves the
    queue as it is. ``backward`` may come after that: see :class:`MemoryQueue`.

    Raises:
        As :func:`moco` and :class:`MemoryQueue`.

    Example:
        >>> criterion = sslfast.MoCoLoss(size=8, dim=4)
        >>> q, k = torch.eye(4, requires_grad=True), torch.eye(4)
        >>> criterion(q, k).backward()
        >>> criterion.memory_queue.pointer.item()  # the four keys have entered the queue
        4
    """

    def __init__(
        self,
        size: int = 65536,
        dim: int = 128,
        temperature: float | Tensor = 0.07,
        *,
        gather_distributed: bool = False,
        strategy: str = "gather",
        diagnostics: bool = False,
    ) -> None:
        super().__init__(temperature, gather_distributed, strategy, diagnostics)
        self.memory_queue = MemoryQueue(size, dim, gather_distributed=gather_distributed)

    @over_ranks()
    def forward(self, q: Tensor, k: Tensor) -> Tensor | tuple[Tensor, Diagnostics]:
        """The loss of queries against their keys and the queue, before the keys enter it."""
        return contrast_and_enqueue(self, self.memory_queue, ("q", q), ("k", k))


def contrast_and_enqueue(
    loss: ContrastiveLoss, queue: MemoryQueue, named_q: tuple[str, Tensor], named_k: tuple[str, Tensor]
) -> Tensor | tuple[Tensor, Diagnostics]:
    """:func:`moco` with a module's options; then, if the queries learn, the keys enter the queue."""
    q, k, negatives = views_and_queue(named_q, named_k, queue.queue, normalize=True)
    diagnosed = _moco(q, k, negatives, loss.temperature, loss.scope(), loss.diagnostics)
    if q.requires_grad:
        queue.enqueue(k)
    return with_diagnostics(diagnosed)


class MoCoV3Loss(ContrastiveLoss):
    """The module form of :func:`moco_v3`.

    Args:
        temperature: as :func:`moco_v3` (default 0.2); a tensor or ``nn.Parameter`` moves with the module.
        normalize, gather_distributed, strategy, diagnostics: as :func:`moco_v3`.

    Shapes:
        ``q``, ``k``: [N, D]; output: [], or ``(loss, diagnostics)``.

    Raises:
        As :func:`moco_v3`.

    Example:
        >>> criterion = sslfast.MoCoV3Loss(temperature=0.2)
        >>> round(criterion(torch.eye(4), torch.eye(4)).item(), 4)
        0.008
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.2,
        *,
        normalize: bool = True,
        gather_distributed: bool = False,
        strategy: str = "gather",
        diagnostics: bool = False,
    ) -> None:
        super().__init__(temperature, gather_distributed, strategy, diagnostics)
        self.normalize = normalize

    def forward(self, q: Tensor, k: Tensor) -> Tensor | tuple[Tensor, Diagnostics]:
        """The loss of the queries of one view against the keys of the other."""
        return with_diagnostics(_moco_v3(q, k, self.temperature, self.normalize, self.scope(), self.diagnostics))
