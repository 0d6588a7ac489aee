"""KoLeo in plain PyTorch, with the whole similarity matrix in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .l2_normalize import l2_normalize
from .nearest_neighbours import nearest_neighbours
from .neighbour_distance import neighbour_distance


def koleo(x: Tensor, topk: int = 1, eps: float = 1e-8, *, index: Tensor | None = None) -> Tensor:
    """``−mean log(‖x̂_i − x̂_n + eps‖ + eps)`` over the rows and their ``topk`` nearest neighbours n, x̂ the unit rows.

    ``index`` [N, topk]: neighbours that are known.
    """
    rows = l2_normalize(x, eps)
    if index is None:
        with torch.no_grad():
            index = nearest_neighbours(rows, None, topk)[1]
    return -(neighbour_distance(rows, None, index, eps) + eps).log().mean()
