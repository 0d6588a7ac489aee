"""ReSSL: a view's similarities to a queue of earlier keys predict those of the other view, which are sharper."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..._checks import accumulator
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...ops.prototype_cross_entropy import prototype_cross_entropy
from ...ops.sinkhorn import check_number
from .._inputs import check_gather, views_and_queue
from ..memory_queue import MemoryQueue


@over_ranks()
def re_ssl(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    temperature_q: float = 0.1,
    temperature_k: float = 0.04,
    *,
    normalize: bool = True,
    gather_distributed: bool = False,
) -> Tensor:
    """Cross entropy of each query's softmax over a queue against its key's, mean over the N queries.

        p_i = softmax_j(k_i·queue_j/τk),      ℓ_i = −Σ_j p_ij log softmax_j(q_i·queue_j/τq)

    It is :func:`prototype_cross_entropy` with the queue for prototypes: neither the logits nor their softmaxes [N, K]
    are stored, and the queue's gradient is not computed.

    Args:
        q, k: [N, D], row ``i`` of both from image ``i``: the student's of the strongly augmented view, the teacher's of
            the weakly augmented one, which receives no gradient; float32, float64, bfloat16 or float16.
        queue: [K, D] earlier keys, as they are and without gradient. Where the dtypes differ the wider one is used for
            all.
        temperature_q, temperature_k: τq (default 0.1) and τk (default 0.04), finite and not zero.
        normalize: divide the rows of q and k by their norms first (default).
        gather_distributed: weigh this rank's mean for the mean over all ranks' queries. The queue is this rank's copy
            of one that all share (:class:`MemoryQueue` with ``gather_distributed=True``).

    Returns:
        [] float32 (float64 for float64 inputs). Differentiable in ``q``, twice through the reference.

    Raises:
        TypeError, ValueError: shapes, widths, dtypes or devices do not fit, or a temperature is zero or not finite.

    Source: Zheng et al. 2021, "ReSSL: Relational Self-Supervised Learning with Weak Augmentation", section 3.2;
    value as solo-learn's ``ressl_loss_func``.

    Example:
        >>> q, k = torch.eye(4), torch.eye(4)
        >>> round(sslfast.re_ssl(q, k, queue=torch.eye(4), temperature_q=1.0).item(), 4)
        0.7437
    """
    q, k, queue = views_and_queue(("q", q), ("k", k.detach() if isinstance(k, Tensor) else k), queue, normalize)
    check_number("temperature_q", temperature_q, q)
    check_number("temperature_k", temperature_k, q)
    weights = None
    if gather_distributed:
        weight = scope_of(True).shard(q).weight
        weights = torch.full((len(q),), weight, dtype=accumulator(q), device=q.device)
    return prototype_cross_entropy(
        q, k, queue, student_temperature=temperature_q, teacher_temperature=temperature_k, row_weights=weights
    )


class ReSSLLoss(nn.Module):
    """:func:`re_ssl` with its own :class:`MemoryQueue`, which takes in the keys after each training step's loss.

    Args:
        size: K, how many keys the queue keeps.
        dim: D, their width.
        temperature_q, temperature_k: as :func:`re_ssl` (defaults 0.1 and 0.04).
        gather_distributed: as :func:`re_ssl`; the keys of all ranks are enqueued.

    Shapes:
        ``q``, ``k``: [N, D], normalised here; output: [].

    The keys are enqueued where the loss is to be differentiated with respect to ``q``, so that an evaluation leaves the
    queue as it is. ``backward`` may come after that: see :class:`MemoryQueue`.

    Raises:
        As :func:`re_ssl` and :class:`MemoryQueue`.

    Example:
        >>> criterion = sslfast.ReSSLLoss(size=8, dim=4)
        >>> q, k = torch.eye(4, requires_grad=True), torch.eye(4)
        >>> criterion(q, k).backward()
        >>> criterion.memory_queue.pointer.item()  # the four keys have entered the queue
        4
    """

    def __init__(
        self,
        size: int = 65536,
        dim: int = 128,
        temperature_q: float = 0.1,
        temperature_k: float = 0.04,
        *,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        check_gather(gather_distributed)
        self.temperature_q = temperature_q
        self.temperature_k = temperature_k
        self.gather_distributed = gather_distributed
        self.memory_queue = MemoryQueue(size, dim, gather_distributed=gather_distributed)

    @over_ranks()
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """The loss of queries and keys over the queue, before the keys enter it."""
        given = (("q", q), ("k", k.detach() if isinstance(k, Tensor) else k))
        q, k, queue = views_and_queue(*given, self.memory_queue.queue, normalize=True)
        temperatures = (self.temperature_q, self.temperature_k)
        loss: Tensor = re_ssl(q, k, queue, *temperatures, normalize=False, gather_distributed=self.gather_distributed)
        if q.requires_grad:
            self.memory_queue.enqueue(k)
        return loss

    def extra_repr(self) -> str:
        return (
            f"temperature_q={self.temperature_q}, temperature_k={self.temperature_k}, "
            f"gather_distributed={self.gather_distributed}"
        )
