"""The loss of the demo, fused and plain; apart from the training, so that a measuring process imports little."""

from __future__ import annotations

from torch import Tensor

import sslfast

TEMPERATURE = 0.3

# The operators that a call of sslfast.nt_xent reaches, one a backend; none of them when the reference serves the call.
OPERATORS = {"sslfast::nt_xent": "cpu", "sslfast::nt_xent_triton": "triton"}

_fused = sslfast.NTXentLoss(TEMPERATURE)


def fused_loss(z0: Tensor, z1: Tensor) -> Tensor:
    """NT-Xent by sslfast's kernels; z0, z1: [N, D]."""
    return _fused(z0, z1)


def plain_loss(z0: Tensor, z1: Tensor) -> Tensor:
    """NT-Xent in plain PyTorch, with the 2N × 2N matrix in memory; z0, z1: [N, D]."""
    return sslfast.reference.nt_xent(z0, z1, TEMPERATURE)


LOSSES = {"fused": fused_loss, "plain": plain_loss}
