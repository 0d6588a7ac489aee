"""NT-Xent over the local batch, over the batches of all ranks, or against a memory bank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...distributed.scope import Scope
from ...ops.nt_xent import nt_xent as local_nt_xent
from ...ops.types import Pairs, Want
from .._inputs import two_views
from ..memory_queue import memory_bank
from ._inputs import ContrastiveLoss, inverse
from .diagnostics import Diagnosed, Diagnostics, diagnostics_of, with_diagnostics
from .moco import contrast_and_enqueue


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    normalize: bool = True,
    gather_distributed: bool = False,
    strategy: str = "gather",
) -> Tensor:
    """Normalised temperature-scaled cross entropy (NT-Xent) of two views, mean over the 2N rows.

    ``ℓ_i = −log( exp(s_ip / τ) / Σ_{j ≠ i} exp(s_ij / τ) )``, ``s_ij`` the cosine of rows ``i`` and ``j`` of
    ``z = [z0; z1]`` and ``p`` the other view of row ``i``. The 2N × 2N matrix is never stored. The local loss alone is
    one fused operator (:mod:`sslfast.ops.nt_xent`); over ranks it is the shared primitive.

    Args:
        z0, z1: [N, D] each, row ``i`` of both a view of image ``i``; float32, float64, bfloat16 or float16; any
            strides.
        temperature: τ, finite and not zero (default 0.5; 1e-8 to 1e8 in size, negative is legal); or a one-element
            tensor, which then receives its gradient.
        normalize: divide each row by ``max(‖row‖₂, 1e-12)`` first (default).
        gather_distributed: negatives of all ranks; ``False``: this rank's.
        strategy: how, ``"gather"`` or ``"ring"``.

    Returns:
        [] float32 (float64 for float64 inputs). Over several ranks the mean of their values
        is the loss of the global batch. Differentiable in ``z0``, ``z1`` and ``temperature``.

    Raises:
        TypeError: an argument is not a tensor, is not floating point, or the dtypes differ (inside an autocast region
            the wider one is used instead).
        ValueError: shapes or devices differ, a tensor is not two-dimensional or is empty, the temperature is zero or
            not finite (a temperature tensor on a GPU is not read: it would wait for the device).

    Source: Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations", equation 1; value
    as lightly 1.6.0's ``NTXentLoss`` (google-research/simclr reports the sum of two such means, twice this value).

    Example:
        >>> loss = sslfast.nt_xent(torch.eye(4), torch.eye(4), temperature=0.5)
        >>> round(loss.item(), 4)
        0.5944
    """
    return diagnosed_nt_xent(z0, z1, temperature, normalize, scope_of(gather_distributed, strategy))[0]


@over_ranks("temperature")
def diagnosed_nt_xent(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor,
    normalize: bool,
    scope: Scope,
    diagnostics: bool = False,
) -> Diagnosed:
    if type(scope) is Scope and not diagnostics:
        return local_nt_xent(z0, z1, temperature, normalize=normalize), None
    z0, z1 = two_views("z0", z0, "z1", z1, normalize)
    scale = inverse(temperature, z0)
    z = torch.cat([z0, z1])  # [2n, D]
    shard = scope.shard(z)
    ids = shard.ids(z.device)
    pairs = Pairs(z, None, scale, row_ids=ids, positives=ids.roll(z0.shape[0]))
    terms = scope.terms(pairs, Want(hardest=diagnostics))
    assert terms.positive is not None
    loss = shard.weight * (terms.row_lse - terms.positive).sum()
    return loss, diagnostics_of(terms, scale, shard.local * (shard.total - 1)) if diagnostics else None


class NTXentLoss(ContrastiveLoss):
    """Normalised temperature-scaled cross entropy over two views, with the constructor of lightly 1.6.0's class.

    With a memory bank it is MoCo's loss, as there: only ``out0`` are anchors, row ``i`` of ``out1`` is its positive,
    the bank holds the negatives (:func:`sslfast.moco`), and ``out1`` enters the bank after the loss if ``out0``
    is to receive a gradient. Unlike lightly's, the bank keeps every key where it wraps around (lightly drops
    the rest of the batch), belongs to the ``state_dict``, and starts the same on every rank.

    Args:
        temperature: finite and not zero; negative is legal. A float (default 0.5), or a one-element tensor or
            ``nn.Parameter`` that learns (moves with the module; part of the ``state_dict`` if a parameter).
        memory_bank_size: 0 (default): no bank; or ``(K, D)``, the number of keys and their width.
        gather_distributed: negatives of all ranks; with a bank, the keys of all ranks enter it. ``False`` (default):
            this rank's.
        strategy: how, ``"gather"`` (default) or ``"ring"``.
        diagnostics: return ``(loss, Diagnostics)``.

    Shapes:
        ``out0``, ``out1``: [N, D], row ``i`` of each a view of image ``i``; output: [] (mean over the 2N rows; N with a
        bank), float32 (float64 for float64 inputs).

    Raises:
        ValueError: temperature is zero or not finite; memory_bank_size is negative, a bare number above 0, or not two
            numbers; ``gather_distributed`` without torch.distributed; see also :func:`nt_xent`.

    Source: Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations", equation 1; with
    a bank, He et al. 2020, "Momentum Contrast for Unsupervised Visual Representation Learning", equation 1.

    Example:
        >>> criterion = sslfast.NTXentLoss(temperature=0.5)
        >>> round(criterion(torch.eye(4), torch.eye(4)).item(), 4)
        0.5944
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        strategy: str = "gather",
        diagnostics: bool = False,
    ) -> None:
        super().__init__(temperature, gather_distributed, strategy, diagnostics)
        self.memory_bank_size = memory_bank_size
        self.memory_bank = memory_bank(memory_bank_size, gather_distributed)

    @over_ranks()
    def forward(self, out0: Tensor, out1: Tensor) -> Tensor | tuple[Tensor, Diagnostics]:
        """The loss of two views, each [N, D]."""
        if self.memory_bank is not None:
            return contrast_and_enqueue(self, self.memory_bank, ("out0", out0), ("out1", out1))
        return with_diagnostics(diagnosed_nt_xent(out0, out1, self.temperature, True, self.scope(), self.diagnostics))
