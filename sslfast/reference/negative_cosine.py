"""The mean cosine of matching rows, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def negative_cosine(p: Tensor, z: Tensor, eps: float = 1e-8, factor: float = -1.0, offset: float = 0.0) -> Tensor:
    """``offset + factor · Σ_i p̂_i·ẑ_i`` with ``x̂ = x / max(‖x‖₂, eps)`` for ``p``, ``z`` [N, D]."""
    return offset + factor * (F.normalize(p, dim=1, eps=eps) * F.normalize(z, dim=1, eps=eps)).sum()
