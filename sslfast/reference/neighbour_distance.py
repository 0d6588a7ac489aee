"""Distances of rows to given rows in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def neighbour_distance(q: Tensor, k: Tensor | None, index: Tensor, eps: float) -> Tensor:
    """``‖q_i − k_n + eps‖₂`` for ``n = index[i, c]``, [M, count]; eps is added to every component. +inf at index −1.

    Without ``k`` the rows are those of ``q``.
    """
    columns = q if k is None else k
    difference = q[:, None, :] - columns[index.clamp(min=0)] + eps  # [M, count, D]
    distance = torch.linalg.vector_norm(difference, dim=2)
    return distance.masked_fill(index < 0, float("inf"))


def sums_by_index(q: Tensor, index: Tensor, rows: int) -> Tensor:
    """The sum of the rows of ``q`` [M, D] with each index, [rows, D]; those of index −1 belong to none."""
    sums = q.new_zeros(rows + 1, q.shape[1])
    return sums.index_add_(0, torch.where(index < 0, rows, index), q)[:-1]
