"""Rows of tokens put back in their places, a mask token elsewhere, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def scatter_tokens(
    x: Tensor,
    index: Tensor,
    token: Tensor,
    position: Tensor | None = None,
    prefix: Tensor | None = None,
    passed: int = 0,
) -> Tensor:
    """Rows of ``x`` and of ``token`` [D] in order, after the rows of ``prefix``, plus ``position``.

    ``index`` int64 [B, L]: ``x`` is [B, passed + K, D], its first rows are passed on, and row l is ``x[b, passed +
    index]`` where index < K, else the token. ``index`` bool [B, L]: ``x`` is [B, L, D], and row l is the token where it
    is True. ``position`` has a row for each of the L tokens, or for each row that is returned.
    """
    batch, width = x.shape[0], x.shape[2]
    if index.dtype == torch.bool:
        rows = torch.where(index[..., None], token, x)
    else:
        lead, tokens = x[:, :passed], x[:, passed:]
        masked = token.expand(batch, index.shape[1] - tokens.shape[1], width)
        rows = torch.gather(torch.cat([tokens, masked], 1), 1, index[..., None].expand(-1, -1, width))
        rows = torch.cat([lead, rows], 1)
    if prefix is not None:
        rows = torch.cat([prefix.expand(batch, -1, -1), rows], 1)
    if position is None:
        return rows
    leading = rows.shape[1] - position.shape[0]  # none where the position has a row for these too
    return torch.cat([rows[:, :leading], rows[:, leading:] + position], 1)
