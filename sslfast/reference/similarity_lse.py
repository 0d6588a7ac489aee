"""Log-sum-exp of scaled similarities in plain PyTorch, with the whole similarity matrix in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def _logsumexp(s: Tensor, dim: int) -> Tensor:
    """``s.logsumexp(dim)``; where every entry is −inf the result is −inf with zero gradient (torch gives NaN there)."""
    empty = (s == float("-inf")).all(dim)
    lse = s.masked_fill(empty.unsqueeze(dim), 0.0).logsumexp(dim)
    return lse.masked_fill(empty, float("-inf"))


def similarity_terms(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
    *,
    bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    positives: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row LSE [M], column LSE [N], the positives' logits [M] and the hardest negatives' logits [M] (no gradient).

    ``s_ij = scale·q_i·k_j + bias_j``; a pair with ``row_ids[i] == col_ids[j]`` takes no part in an LSE.
    ``positives[i]`` is a column, or −1 for none (logit 0); its logit counts even where the ids exclude it.
    """
    s = scale * (q @ k.T)  # [M, N]
    if bias is not None:
        s = s + bias
    excluded = torch.zeros_like(s, dtype=torch.bool)
    if row_ids is not None and col_ids is not None:
        excluded = row_ids[:, None] == col_ids[None, :]
    masked = s.masked_fill(excluded, float("-inf"))
    if positives is None:
        positives = torch.full((len(q),), -1, device=q.device)
    one_hot = positives[:, None] == torch.arange(len(k), device=k.device)
    positive = s.masked_fill(~one_hot, 0.0).sum(1)
    hardest = masked.detach().masked_fill(one_hot, float("-inf")).max(1).values
    return _logsumexp(masked, 1), _logsumexp(masked, 0), positive, hardest


def similarity_lse(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
    *,
    bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    columns: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``row_lse_i = log Σ_j exp(scale·q_i·k_j + bias_j)`` over pairs with different ids; the column LSE if asked."""
    row, col, _, _ = similarity_terms(q, k, scale, bias=bias, row_ids=row_ids, col_ids=col_ids)
    return (row, col) if columns else row
