"""Rows of tokens by their ids, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_tokens(
    x: Tensor | None,
    ids: Tensor,
    position: Tensor | None = None,
    prefix: Tensor | None = None,
    token: Tensor | None = None,
    packed: bool = False,
) -> Tensor:
    """``x[b, ids] + position[ids]`` after the rows of ``prefix``; an id of −1 gives a row of zeros.

    ``x`` is [B, L, D], ``ids`` [B, K] or [S, B, K]. With ``packed``, ``x`` [B, K, D] holds the rows already; without
    ``x`` every row is ``token`` [D].
    """
    safe = ids.clamp(min=0)
    if x is None:
        assert token is not None
        rows = token.expand(*ids.shape, -1)
    elif packed:
        rows = x
    else:
        rows = torch.gather(x.expand(*ids.shape[:-1], *x.shape[1:]), -2, safe[..., None].expand(*ids.shape, x.shape[2]))
    if position is not None:
        rows = rows + position[safe]
    rows = torch.where(ids[..., None] >= 0, rows, torch.zeros_like(rows))
    if prefix is not None:
        rows = torch.cat([prefix.expand(*ids.shape[:-1], *prefix.shape), rows], -2)
    return rows
