"""Masks drawn patch by patch, tube by tube or unit by unit: MAE, VideoMAE, SimMIM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _native, reference
from .._checks import check_share, whole_each, whole_numbers
from .._random.key import key_of
from ..ops.random_mask import check_units, random_mask
from ._samples import Array, Grid, Samples, as_samples, epoch_for, rectangle
from .masks import Masks

NAMES = {1: "a length", 2: "(height, width)", 3: "(time, height, width)"}


def _sides(grid: Grid, *allowed: int) -> tuple[int, int, int]:
    """(time, height, width) of a grid given by one, two or three numbers, of which ``allowed`` says how many may be."""
    wanted = " or ".join(NAMES[n] for n in allowed)
    sides = whole_numbers("grid", grid, wanted)
    if len(sides) not in allowed:
        raise ValueError(f"grid must be {wanted}, got {grid!r}")
    t, h, w = (1, 1, 1, *sides)[-3:]
    return t, h, w


def _masks(
    samples: Samples,
    grid: tuple[int, int, int],
    kept: int,
    *,
    unit: tuple[int, int, int],
    order: str,
    noise: Tensor | Array | None,
    device: torch.device | str | None,
    seed: int,
    epoch: int | None,
    view: int,
) -> Masks:
    if order not in ("raster", "noise"):
        raise ValueError(f"order must be 'raster' or 'noise', got {order!r}")
    ids, ascending = as_samples(samples, device), order == "raster"
    key = key_of(seed, epoch_for(epoch, samples if noise is None else 0), view)._asdict()
    if isinstance(ids, Tensor):
        if noise is not None and not isinstance(noise, Tensor):
            raise TypeError(f"noise must be a torch.Tensor like the samples, got {type(noise).__name__}")
        return Masks(*random_mask(ids, grid, kept, unit=unit, noise=noise, ascending=ascending, **key))
    check_units(grid, unit, kept)
    if noise is not None:
        units = math.prod(grid) // math.prod(unit)
        if not isinstance(noise, np.ndarray) or noise.dtype not in (np.float32, np.float16):
            got = noise.dtype if isinstance(noise, (np.ndarray, Tensor)) else type(noise).__name__
            raise TypeError(f"noise must be a NumPy array like the samples, of float32 or float16, got {got}")
        if noise.shape != (len(ids), units):
            raise ValueError(f"noise must be [{len(ids)}, {units}], got {noise.shape}")
        noise = noise.astype(np.float32)
    function = reference.random_mask if _native.host is None else _native.host.random_mask
    return Masks(*function(ids, grid, kept, unit=unit, noise=noise, ascending=ascending, **key))


def random_masks(
    samples: Samples,
    grid: Grid,
    ratio: float = 0.75,
    *,
    order: str = "raster",
    noise: Tensor | Array | None = None,
    seed: int = 0,
    epoch: int | None = None,
    view: int = 0,
    device: torch.device | str | None = None,
) -> Masks:
    """Mask a share of the patches of each image, every patch equally likely (MAE, He et al., CVPR 2022).

    Args:
        samples: the images' dataset indices, [B] whole numbers below 2⁶³ as a tensor, sequence or NumPy array: each
            image then has a mask of its own in any batch, worker or rank. Or just how many images there are, and random
            indices are drawn from torch's CPU generator. A NumPy array gives NumPy arrays, all else tensors.
        grid: the number of patches L, (height, width) or (time, height, width); at most 2¹⁸ patches.
        ratio: share that is masked. K = int(L · (1 − ratio)) patches are kept. Default 0.75.
        order: ``"raster"``: ids in ascending order; ``"noise"``: in the order of the random numbers, as MAE's.
        noise: [B, L] float32, on the samples' device: patches of the least noise are kept, as by
            ``torch.argsort(noise, stable=True)``. Default: random keys of (seed, sample, epoch, view).
        seed: any 64-bit whole number. Default 0.
        epoch: the current epoch, 0 to 2³² − 1. Without it every epoch repeats the same masks: default 0, with a
            warning where indices are given.
        view: 0 to 1023: another mask of the same sample. Default 0.
        device: where the masks are made. Default: the samples' device, else the CPU.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range.

    Example:
        >>> masks = sslfast.masking.random_masks([0, 1, 2], grid=(14, 14), ratio=0.75, epoch=3)
        >>> masks.ids_keep.shape, masks.ids_mask.shape
        (torch.Size([3, 49]), torch.Size([3, 147]))
    """
    ratio = check_share("ratio", ratio)
    sides = _sides(grid, 1, 2, 3)
    key: dict[str, Any] = {"seed": seed, "epoch": epoch, "view": view}
    kept = int(math.prod(sides) * (1 - ratio))
    return _masks(samples, sides, kept, unit=(1, 1, 1), order=order, noise=noise, device=device, **key)


def tube_masks(
    samples: Samples,
    grid: Sequence[int],
    ratio: float = 0.9,
    *,
    order: str = "raster",
    noise: Tensor | Array | None = None,
    seed: int = 0,
    epoch: int | None = None,
    view: int = 0,
    device: torch.device | str | None = None,
) -> Masks:
    """One mask of places for all frames of a video (VideoMAE, Tong et al., NeurIPS 2022).

    Args:
        grid: (time, height, width) in patches; at most 2¹⁸ places.
        ratio: int(ratio · height · width) places of each frame are masked. Default 0.9.
        noise: [B, height · width] float32.
        samples, order, seed, epoch, view, device: as in :func:`random_masks`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range.

    Example:
        >>> masks = sslfast.masking.tube_masks([0, 1], grid=(8, 14, 14), ratio=0.9)
        >>> masks.ids_keep.shape  # 20 places in each of 8 frames
        torch.Size([2, 160])
    """
    ratio = check_share("ratio", ratio)
    sides = _sides(grid, 3)
    places = sides[1] * sides[2]
    key: dict[str, Any] = {"seed": seed, "epoch": epoch, "view": view}
    kept = places - int(ratio * places)
    return _masks(samples, sides, kept, unit=(sides[0], 1, 1), order=order, noise=noise, device=device, **key)


def grid_masks(
    samples: Samples,
    grid: Grid,
    ratio: float = 0.6,
    unit: int | Sequence[int] = 2,
    *,
    order: str = "raster",
    noise: Tensor | Array | None = None,
    seed: int = 0,
    epoch: int | None = None,
    view: int = 0,
    device: torch.device | str | None = None,
) -> Masks:
    """Mask square units of patches (SimMIM, Xie et al., CVPR 2022).

    Args:
        grid: (height, width) in patches, or the side of a square.
        ratio: ⌈ratio · units⌉ units are masked. Default 0.6.
        unit: side of a unit in patches, or (height, width); divides the grid into at most 2¹⁸ units. SimMIM's
            ``MaskGenerator(192, 32, 4, 0.6)`` is ``grid=(48, 48), unit=8``. Default 2.
        noise: [B, units] float32.
        samples, order, seed, epoch, view, device: as in :func:`random_masks`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range.

    Example:
        >>> masks = sslfast.masking.grid_masks([0, 1], grid=(48, 48), ratio=0.6, unit=8)
        >>> masks.ids_mask.shape  # 22 of 36 units of 64 patches
        torch.Size([2, 1408])
    """
    ratio = check_share("ratio", ratio)
    sides = (1, *rectangle(grid))
    height, width = whole_each("unit", unit, 2, "a side or (height, width)")
    block = (1, height, width)
    check_units(sides, block, 0)
    units = math.prod(sides) // math.prod(block)
    key: dict[str, Any] = {"seed": seed, "epoch": epoch, "view": view}
    kept = units - math.ceil(units * ratio)
    return _masks(samples, sides, kept, unit=block, order=order, noise=noise, device=device, **key)
