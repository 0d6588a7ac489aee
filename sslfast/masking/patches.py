"""Patches of images: gathered, put back, projected; and lightly's ``patchify`` and ``unpatchify``."""

from __future__ import annotations

import math

from torch import Tensor

from ..ops.embed_patches import embed_patches
from ..ops.gather_patches import gather_patches, scatter_patches

__all__ = ["embed_patches", "gather_patches", "patchify", "scatter_patches", "unpatchify"]


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """All patches of the images as rows, in the order (y, x, c) of MAE and ``lightly.models.utils.patchify``.

    Args:
        images: [B, C, H, W], floating point; H and W need not be equal, and are multiples of the patch's side.
        patch_size: p.

    Returns:
        [B, (H/p)·(W/p), p²·C], ``images``' dtype. Differentiable.

    Raises:
        TypeError, ValueError: images of another kind (bytes among them: ``gather_patches`` would scale those), or p
            does not divide their sides.

    Example:
        >>> sslfast.masking.patchify(torch.zeros(2, 3, 224, 224), patch_size=16).shape
        torch.Size([2, 196, 768])
    """
    if isinstance(images, Tensor) and not images.dtype.is_floating_point:
        raise TypeError(f"images must be floating point, got {images.dtype}")
    return gather_patches(images, patch_size=patch_size, order="channels_last")


def unpatchify(patches: Tensor, patch_size: int, channels: int = 3, *, grid: tuple[int, int] | None = None) -> Tensor:
    """Images from all of their patches: the inverse of ``patchify``, as ``lightly.models.utils.unpatchify``.

    Args:
        patches: [B, L, p²·C], floating point.
        patch_size: p.
        channels: C. Default 3.
        grid: (rows, columns) of patches. Default: a square.

    Returns:
        [B, C, rows·p, columns·p], ``patches``' dtype. Differentiable.

    Raises:
        TypeError, ValueError: patches of another kind or shape; L is no square and there is no grid.

    Example:
        >>> images = torch.arange(48.0).view(1, 3, 4, 4)
        >>> torch.equal(sslfast.masking.unpatchify(sslfast.masking.patchify(images, 2), 2), images)
        True
    """
    if not isinstance(patches, Tensor) or patches.dim() != 3:
        got = f"shape {tuple(patches.shape)}" if isinstance(patches, Tensor) else type(patches).__name__
        raise ValueError(f"patches must be [B, L, C·p²], got {got}")
    length = patches.shape[1]
    rows, columns = (math.isqrt(length),) * 2 if grid is None else grid
    if rows * columns != length:
        raise ValueError(f"patches must be as many as the grid has places, {rows} × {columns}, got {length}")
    size = (channels, rows * patch_size, columns * patch_size)
    return scatter_patches(patches, size=size, patch_size=patch_size, order="channels_last")
