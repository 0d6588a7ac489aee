"""Sums of the empirical characteristic function on slices: every cosine and sine of every knot."""

from __future__ import annotations

import torch
from torch import Tensor


def characteristic_sums(z: Tensor, slices: Tensor, knots: int, step: float) -> Tensor:
    """[2, V, knots, S]: ``Σ_i cos(t_k z_vi·a)`` and ``Σ_i sin(t_k z_vi·a)``, ``t_k = k·step``, k = 1 … knots.

    z [V, N, D], slices [D, S].
    """
    t = step * torch.arange(1, knots + 1, device=z.device, dtype=z.dtype).view(-1, 1, 1)
    x = (z @ slices).unsqueeze(1) * t  # [V, knots, N, S]
    return torch.stack([x.cos().sum(2), x.sin().sum(2)])
