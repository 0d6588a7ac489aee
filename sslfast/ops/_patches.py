"""What the operations on patches of images check alike, and how patches are counted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import FLOATS, ids_checked, is_real, is_whole, real_numbers, whole_each

MOST_CHANNELS = 64  # kMostChannels


def length_of(sides: Sequence[int], patch: Sequence[int]) -> int:
    """L, the patches of an image of these sides (T, H, W)."""
    return math.prod([side // p for side, p in zip(sides, patch, strict=True)])  # a list: the tracer takes no generator


def check_images(images: Tensor) -> None:
    """[B, C, H, W] or [B, C, T, H, W] of bytes or floating-point numbers."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a torch.Tensor, got {type(images).__name__}")
    if images.dim() not in (4, 5):
        raise ValueError(f"images must be [B, C, H, W] or [B, C, T, H, W], got shape {tuple(images.shape)}")
    if images.dtype not in (*FLOATS, torch.uint8):
        raise TypeError(f"images must be uint8, float32, float64, bfloat16 or float16, got {images.dtype}")
    if 0 in images.shape[1:]:
        raise ValueError(f"images must have at least one channel and one pixel, got shape {tuple(images.shape)}")


def patch_sides(patch_size: int | Sequence[int], sides: Sequence[int]) -> list[int]:
    """(pt, ph, pw) of an image of sides (H, W) or (T, H, W), which they divide.

    Raises:
        ValueError: not one number for a still image or one for each side, not positive, or no divisors.
    """
    wanted = "p or (ph, pw)" if len(sides) == 2 else "(pt, ph, pw)"
    if is_whole(patch_size) and len(sides) == 3:
        raise ValueError(f"patch_size must be {wanted} for these images, got {patch_size}")
    given = whole_each("patch_size", patch_size, len(sides), f"{wanted} for these images")
    if any(p < 1 for p in given):
        raise ValueError(f"patch_size must be positive, got {patch_size}")
    if any(side % p for side, p in zip(sides, given, strict=True)):
        raise ValueError(f"patch_size must divide the images' sides {tuple(sides)}, got {patch_size}")
    return [1] * (3 - len(given)) + list(given)


def check_ids(ids: Tensor, batch: int, device: torch.device) -> None:
    """[B, K] int64; their values are checked where a kernel on the CPU reads them."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids must be a torch.Tensor, got {type(ids).__name__}")
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, got {ids.dtype}")
    if ids.dim() != 2 or ids.shape[0] != batch:
        raise ValueError(f"ids must be [{batch}, K], a row for each image, got shape {tuple(ids.shape)}")
    if ids.device != device:
        raise ValueError(f"ids must be on the images' device {device}, got {ids.device}")


def check_values(ids: Tensor, length: int) -> None:
    """From −1 to L − 1, none twice in a row: what the CPU's kernels check themselves, for the reference and a GPU."""
    if not ids_checked(ids) or ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < -1 or high >= length:
        raise ValueError(f"ids must be from 0 to {length - 1}, or -1 for none, got {low if low < -1 else high}")
    ordered = ids.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if bool(twice.any()):
        raise ValueError(f"ids must not repeat within a row, got {int(ordered[:, 1:][twice][0])} twice")


def channel_numbers(name: str, numbers: Sequence[float] | float | None, channels: int) -> list[float]:
    """One number a channel; empty for None."""
    if numbers is None:
        return []
    given = real_numbers(name, numbers)
    if is_real(numbers):
        given *= channels
    if len(given) != channels or channels > MOST_CHANNELS:
        raise ValueError(
            f"{name} must be one number, or one for each of the images' {channels} channels (at most {MOST_CHANNELS}), "
            f"got {len(given)}"
        )
    if not all(math.isfinite(x) for x in given) or (name == "std" and not all(x > 0 for x in given)):
        raise ValueError(f"{name} must be finite{' and positive' if name == 'std' else ''}, got {list(given)}")
    return list(given)
