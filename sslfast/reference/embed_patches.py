"""The tokens of the kept patches: projection of their pixels, position, and what stands before them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .gather_patches import gather_patches


def embed_patches(
    images: Tensor,
    ids: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    prefix: Tensor | None,
    patch: Sequence[int],
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Tensor:
    """[B, P + K, D]: ``prefix``, then ``patch·weightᵀ + bias + position[id]``, zeros for the id −1.

    Args:
        images: [B, C, H, W] or [B, C, T, H, W].
        ids: [B, K] int64.
        weight: [D, C·pt·ph·pw]; bias: [D]; position: [L, D]; prefix: [P, D].
        patch: sides (pt, ph, pw).
        mean, std: a number a channel, or empty.
    """
    rows = gather_patches(images, ids, patch, mean, std, dtype=weight.dtype)
    tokens = rows @ weight.T
    if bias is not None:
        tokens = tokens + bias
    if position is not None:
        tokens = tokens + position[ids.clamp(min=0)]
    tokens = tokens.masked_fill((ids < 0).unsqueeze(-1), 0)
    if prefix is not None:
        tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], 1)
    return tokens
