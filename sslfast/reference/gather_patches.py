"""Patches of images as rows of numbers, and back, by reshaping and indexing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _patch_rows(images: Tensor, patch: Sequence[int], channels_inner: bool) -> Tensor:
    """[B, C, T, H, W] → [B, L, C·pt·ph·pw]."""
    b, c, *sides = images.shape
    (pt, ph, pw), (t, h, w) = patch, (side // p for side, p in zip(sides, patch, strict=True))
    x = images.reshape(b, c, t, pt, h, ph, w, pw)
    order = (0, 2, 4, 6, 3, 5, 7, 1) if channels_inner else (0, 2, 4, 6, 1, 3, 5, 7)
    return x.permute(order).reshape(b, t * h * w, c * pt * ph * pw)


def _images(rows: Tensor, size: Sequence[int], patch: Sequence[int], channels_inner: bool) -> Tensor:
    """The inverse of _patch_rows."""
    c, *sides = size
    (pt, ph, pw), (t, h, w) = patch, (side // p for side, p in zip(sides, patch, strict=True))
    if channels_inner:
        x = rows.reshape(-1, t, h, w, pt, ph, pw, c).permute(0, 7, 1, 4, 2, 5, 3, 6)
    else:
        x = rows.reshape(-1, t, h, w, c, pt, ph, pw).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.reshape(-1, *size)


def gather_patches(
    images: Tensor,
    ids: Tensor | None,
    patch: Sequence[int],
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    channels_inner: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows of the patches ``ids``, of ``(pixel − mean) / std``; a row of zeros for the id −1.

    Args:
        images: [B, C, H, W] or [B, C, T, H, W]; bytes are divided by 255.
        ids: [B, K] int64; None: all.
        patch: sides (pt, ph, pw).
        mean, std: a number a channel, or empty.
        dtype: of the result; the arithmetic is in ``dtype`` or ``images``' own, whichever is wider.
    """
    dtype = dtype or (images.dtype if images.dtype.is_floating_point else torch.float32)
    x = images.to(torch.promote_types(images.dtype, torch.promote_types(dtype, torch.float32)))
    x = x / 255 if images.dtype == torch.uint8 else x
    x = x.unsqueeze(2) if x.dim() == 4 else x
    if mean:
        x = x - x.new_tensor(mean).view(-1, 1, 1, 1)
    if std:
        x = x / x.new_tensor(std).view(-1, 1, 1, 1)
    rows = _patch_rows(x, patch, channels_inner)
    if ids is not None:
        at = ids.clamp(min=0).unsqueeze(-1).expand(-1, -1, rows.shape[2])
        rows = rows.gather(1, at).masked_fill((ids < 0).unsqueeze(-1), 0)
    return rows.to(dtype)


def scatter_patches(
    patches: Tensor,
    ids: Tensor | None,
    size: Sequence[int],
    patch: Sequence[int],
    scale: Sequence[float] = (),
    channels_inner: bool = False,
) -> Tensor:
    """[B, C, T, H, W]: row k of image b at patch ``ids[b, k]``, times ``scale`` of its channel, zeros elsewhere."""
    if ids is not None:
        length = 1
        for side, p in zip(size[1:], patch, strict=True):
            length *= side // p
        at = torch.where(ids < 0, length, ids).unsqueeze(-1).expand(-1, -1, patches.shape[2])
        # One more place, for the rows that belong nowhere.
        blank = patches.new_zeros(patches.shape[0], length + 1, patches.shape[2])
        patches = blank.scatter(1, at, patches)[:, :length]
    images = _images(patches, size, patch, channels_inner)
    return images * images.new_tensor(scale).view(-1, 1, 1, 1) if scale else images
