"""What the pretext tasks share: checks, a scale of pixels, and patches cut out of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS

GREY = (0.2989, 0.587, 0.114)  # as torchvision's, and as the views'


def check_images(images: Tensor, channels: Sequence[int] | None = None) -> None:
    """``images`` is a batch [B, C, H, W] of uint8 or floating point, not empty, with an allowed number of channels."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a torch.Tensor, got {type(images).__name__}")
    if images.dtype != torch.uint8 and images.dtype not in FLOATS:
        raise TypeError(f"images must be uint8, float32, float64, bfloat16 or float16, got {images.dtype}")
    if images.dim() != 4 or 0 in images.shape:
        raise ValueError(f"images must be a batch [B, C, H, W] that is not empty, got shape {tuple(images.shape)}")
    if channels is not None and images.shape[1] not in channels:
        allowed = " or ".join(map(str, channels))
        raise ValueError(f"images must have {allowed} channels, got {images.shape[1]} in shape {tuple(images.shape)}")


def settle(task: Any, **options: Any) -> None:
    """Set options of a frozen task to what they were checked and converted to."""
    for name, value in options.items():
        object.__setattr__(task, name, value)


def unit_scale(pixels: Tensor) -> Tensor:
    """Pixels on the scale 0 … 1 in float32 (float64 stays)."""
    if pixels.dtype == torch.uint8:
        return pixels.to(torch.float32) / 255
    return pixels if pixels.dtype == torch.float64 else pixels.to(torch.float32)


def cut(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Patches of images at places of their own, in one gather.

    Args:
        images: [B, C, H, W].
        rows, columns: [B, P, C or 1] int64, top left corners of P patches, for each channel or for all, and the
            patches' pixels in a last dimension [B, P, C or 1, p].

    Returns:
        [B, P, C, p, p].
    """
    batch = torch.arange(images.shape[0], device=images.device)[:, None, None, None, None]
    channel = torch.arange(images.shape[1], device=images.device)[:, None, None]
    return images[batch, channel, rows[..., None], columns[..., None, :]]
