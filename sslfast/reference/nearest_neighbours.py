"""The largest dot products of each row in plain PyTorch, with the whole similarity matrix in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_neighbours(
    q: Tensor,
    k: Tensor | None,
    count: int,
    *,
    bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``count`` largest ``q_i·k_j + bias_j`` of each row [M, count], and their columns; −inf and −1 for none.

    Without ``k`` the columns are the rows themselves, no row is its own neighbour, and ``bias_i`` is added too: that
    moves all of a row alike. A pair with equal ids takes no part. Of equal similarities the one of the smaller column
    comes first; NaN is the largest.
    """
    columns = q if k is None else k
    s = q @ columns.T  # [M, N]
    if bias is not None:
        s = s + (bias if k is not None else bias[:, None] + bias)
    if k is None:
        s = s.masked_fill(torch.eye(len(q), dtype=torch.bool, device=q.device), float("-inf"))
        col_ids = row_ids
    if row_ids is not None and col_ids is not None:
        s = s.masked_fill(row_ids[:, None] == col_ids[None, :], float("-inf"))
    ordered, index = s.sort(dim=1, descending=True, stable=True)
    similarity, index = ordered[:, :count], index[:, :count]
    return similarity, index.masked_fill(similarity == float("-inf"), -1)


def neighbour_similarity(q: Tensor, k: Tensor | None, index: Tensor) -> Tensor:
    """``q_i·k_n`` for ``n = index[i, c]``, [M, count]; −inf at index −1. Without ``k`` the rows are those of ``q``."""
    columns = q if k is None else k
    similarity = (q[:, None, :] * columns[index.clamp(min=0)]).sum(2)
    return similarity.masked_fill(index < 0, float("-inf"))
