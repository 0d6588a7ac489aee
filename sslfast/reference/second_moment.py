"""Second moments of the columns of one or two batches, by their definition."""

from __future__ import annotations

import torch
from torch import Tensor


def prepared(x: Tensor, center: bool, scale: str, eps: float) -> Tensor:
    """The columns of ``x`` centred and scaled."""
    if center:
        x = x - x.mean(0)
    if scale == "variance":
        return x / (x.square().mean(0) + eps).sqrt()
    if scale == "norm":
        return x / torch.linalg.vector_norm(x, dim=0).clamp_min(eps)
    return x


def second_moment(
    a: Tensor,
    b: Tensor | None = None,
    *,
    cross: bool = False,
    center: bool = True,
    scale: str = "none",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """M = ÂᵀB̂ if ``cross``, else ÂᵀÂ and (with ``b``) B̂ᵀB̂; D × D matrices in memory.

    Returns:
        (Σ_{i≠j} M_ij² [R], the diagonals [R, D], ‖a − b‖²_F []).
    """
    left = [prepared(x, center, scale, eps) for x in (a, b) if x is not None]
    moments = [left[0].T @ left[1]] if cross else [x.T @ x for x in left]
    diagonal = torch.stack([m.diagonal() for m in moments])
    off = torch.stack([(m - m.diagonal().diag()).square().sum() for m in moments])
    distance = (a - b).square().sum() if b is not None and not cross else a.new_zeros(())
    return off, diagonal, distance
