"""The pairwise sigmoid loss in plain PyTorch, with the whole similarity matrix in memory."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def similarity_logsigmoid(
    q: Tensor, k: Tensor, scale: float | Tensor, bias: float | Tensor = 0.0, *, row_ids: Tensor, col_ids: Tensor
) -> Tensor:
    """``−Σ_ij log σ(y_ij·(scale·q_i·k_j + bias))``, ``y_ij = +1`` where the ids are equal, else −1."""
    s = scale * (q @ k.T) + bias  # [M, N]
    y = 2.0 * (row_ids[:, None] == col_ids[None, :]).to(s.dtype) - 1.0
    return -F.logsigmoid(y * s).sum()
