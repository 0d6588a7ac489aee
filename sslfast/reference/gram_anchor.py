"""Gram anchoring in plain PyTorch, with both matrices in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def gram_anchor(student: Tensor, teacher: Tensor, normalize: bool = True, negatives: str = "clamp") -> Tensor:
    """``mean (f(X̂X̂ᵀ) − h(ŶŶᵀ))²`` over images and pairs of rows of X, Y [B, P, D]; f, h clamp at 0 or do nothing."""
    x, y = (F.normalize(t, dim=2) if normalize else t for t in (student, teacher))
    s, t = x @ x.mT, y @ y.mT  # [B, P, P]
    if negatives in ("clamp", "clamp_teacher"):
        t = torch.where(t < 0, 0, t)
    if negatives == "clamp":
        s = torch.where(s < 0, 0, s)
    return (s - t).square().mean()
