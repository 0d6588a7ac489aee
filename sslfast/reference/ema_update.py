"""Exponential moving averages of tensors, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ema_update(
    averages: Sequence[Tensor], students: Sequence[Tensor], momentum: float | Tensor, rounded: Sequence[Tensor] = ()
) -> None:
    """``t ← m t + (1 − m) s`` in place, in the wider of float32 and t's dtype; ``rounded``: copies of the new t."""
    for i, (average, student) in enumerate(zip(averages, students, strict=True)):
        wide = torch.promote_types(average.dtype, torch.float32)
        taken = 1 - momentum  # of a number or of a float64 tensor: float32 would leave it three digits
        weight = taken.to(wide) if isinstance(taken, Tensor) else taken
        average.copy_(torch.lerp(average.to(wide), student.to(wide), weight))
        if rounded:
            rounded[i].copy_(average)
