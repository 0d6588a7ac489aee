"""The fast forms of losses that are a mean cosine of matching rows: lightly's and solo-learn's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..losses.distillation.negative_cosine import negative_cosine
from ._serve import Unserved, unserved_matrices

# Rows that are shorter than eps, and not zero, have another gradient in PyTorch than that of its value.
MOST_EPS = 1e-6
EPS, NORMALIZE_EPS = 1e-8, 1e-12  # of F.cosine_similarity, and of F.normalize


def _mean(x: Tensor, y: Tensor, convention: str, eps: object) -> Tensor | Unserved:
    """In the dtype that PyTorch's own function returns."""
    unserved = unserved_matrices(x, y)
    if unserved:
        return unserved
    if isinstance(eps, bool) or not isinstance(eps, (float, int)) or not 0 < eps <= MOST_EPS:
        return Unserved(f"eps that is no number from above 0 to {MOST_EPS}")
    loss = negative_cosine(x, y, convention=convention, eps=eps)
    return loss if torch.is_autocast_enabled(x.device.type) else loss.to(x.dtype)


def fast_similarity(self: Any, x0: Tensor, x1: Tensor) -> Tensor | Unserved:
    """``lightly.loss.NegativeCosineSimilarity.forward``."""
    if self.dim not in (1, -1):
        return Unserved(f"dim={self.dim}")
    return _mean(x0, x1, "cosine", self.eps)


def byol(p: Tensor, z: Tensor, simplified: bool = True) -> Tensor | Unserved:
    """``solo.losses.byol_loss_func``."""
    return _of_solo(p, z, "distance", simplified)


def sim_siam(p: Tensor, z: Tensor, simplified: bool = True) -> Tensor | Unserved:
    """``solo.losses.simsiam_loss_func``."""
    return _of_solo(p, z, "cosine", simplified)


def _of_solo(p: Tensor, z: Tensor, convention: str, simplified: object) -> Tensor | Unserved:
    target = z.detach() if isinstance(z, Tensor) else z
    return _mean(p, target, convention, EPS if simplified else NORMALIZE_EPS)
