"""The loss of the demo, fused and plain; apart from the training, so that a measuring process imports little."""

from __future__ import annotations

from torch import Tensor

import sslfast
from sslfast.distributed import scope_of

TEMPERATURE = 0.3

# The operators that the loss reaches (the second two with several ranks), by backend; none when the reference serves.
OPERATORS = {
    "sslfast::nt_xent": "cpu",
    "sslfast::nt_xent_triton": "triton",
    "sslfast::similarity_lse": "cpu",
    "sslfast::similarity_lse_triton": "triton",
}

_fused = sslfast.NTXentLoss(TEMPERATURE)
_fused_over_ranks = sslfast.NTXentLoss(TEMPERATURE, gather_distributed=True)


def fused_loss(z0: Tensor, z1: Tensor) -> Tensor:
    """NT-Xent by sslfast's kernels; z0, z1: [N, D]."""
    return _fused(z0, z1)


def plain_loss(z0: Tensor, z1: Tensor) -> Tensor:
    """NT-Xent in plain PyTorch, with the 2N × 2N matrix in memory; z0, z1: [N, D]."""
    return sslfast.reference.nt_xent(z0, z1, TEMPERATURE)


def fused_loss_over_ranks(z0: Tensor, z1: Tensor) -> Tensor:
    """The loss of all ranks' views by sslfast's kernels: this rank's rows against everyone's; z0, z1: [n, D]."""
    return _fused_over_ranks(z0, z1)


def plain_loss_over_ranks(z0: Tensor, z1: Tensor) -> Tensor:
    """The same in plain PyTorch: every rank makes the whole matrix, and the whole loss; z0, z1: [n, D]."""
    scope = scope_of(gather_distributed=True)
    return plain_loss(scope.gather(z0), scope.gather(z1))


LOSSES = {"fused": fused_loss, "plain": plain_loss}
LOSSES_OVER_RANKS = {"fused": fused_loss_over_ranks, "plain": plain_loss_over_ranks}
