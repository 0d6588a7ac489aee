"""Patches of images: gathered, put back, projected."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._checks import whole_each, whole_number
from ..ops.embed_patches import embed_patches
from ..ops.gather_patches import gather_patches, scatter_patches

__all__ = ["embed_patches", "gather_patches", "patchify", "scatter_patches", "unpatchify"]


def patchify(images: Tensor, patch_size: int | Sequence[int]) -> Tensor:
    """All patches of the images as rows, in the order (y, x, c) of MAE and ``lightly.models.utils.patchify``.

    Args:
        images: [B, C, H, W], floating point; H and W need not be equal, and are multiples of the patch's side.
        patch_size: p or (ph, pw).

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


def unpatchify(
    patches: Tensor, patch_size: int | Sequence[int], channels: int = 3, *, grid: int | Sequence[int]
) -> Tensor:
    """Images from all of their patches: the inverse of :func:`patchify`.

    Args:
        patches: [B, L, p²·C], floating point.
        patch_size: p or (ph, pw).
        channels: C. Default 3.
        grid: (rows, columns) of patches, or the side of a square. The number of patches does not tell: 16 are 4 × 4, or
            2 × 8.

    Returns:
        [B, C, rows·p, columns·p], ``patches``' dtype. Differentiable.

    Raises:
        TypeError, ValueError: patches of another kind or shape, or not as many as the grid has places.

    Example:
        >>> images = torch.arange(48.0).view(1, 3, 2, 8)
        >>> patches = sslfast.masking.patchify(images, 2)
        >>> torch.equal(sslfast.masking.unpatchify(patches, 2, grid=(1, 4)), images)
        True
    """
    if not isinstance(patches, Tensor) or patches.dim() != 3:
        got = f"shape {tuple(patches.shape)}" if isinstance(patches, Tensor) else type(patches).__name__
        raise ValueError(f"patches must be [B, L, C·p²], got {got}")
    rows, columns = whole_each("grid", grid, 2, "(rows, columns) or the side of a square")
    if rows * columns != patches.shape[1]:
        raise ValueError(f"patches must be as many as the grid has places, {rows} × {columns}, got {patches.shape[1]}")
    height, width = whole_each("patch_size", patch_size, 2, "p or (ph, pw)")
    size = (whole_number("channels", channels, 1), rows * height, columns * width)
    return scatter_patches(patches, size=size, patch_size=(height, width), order="channels_last")
