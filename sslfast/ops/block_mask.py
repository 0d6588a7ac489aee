"""Masks made of rectangular blocks (BEiT, iBOT, DINOv2), keyed by seed and sample."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _backends, _library, reference
from .._checks import readable, real_number, whole_number, whole_numbers
from .._random.key import key_of
from . import _devices
from .random_mask import check_samples

BACKENDS = ("cpu", "cuda", "reference")
why_not = functools.partial(_devices.why_not, "block_mask", "samples")
MAX_SIDE = 1024  # kMaxSide and kMaxPatches in csrc/common/masks.h
MAX_PATCHES = 2**17


def _fake(
    samples: Tensor,
    counts: Tensor,
    grid: Sequence[int],
    area: Sequence[float],
    log_aspect: Sequence[float],
    tries: int,
    complete: bool,
    seed: int,
    epoch: int,
    view: int,
) -> Tensor:
    return samples.new_empty((samples.shape[0], math.prod(grid)), dtype=torch.bool)


_library.define(
    "block_mask(Tensor samples, Tensor counts, int[] grid, float[] area, float[] log_aspect, int tries, bool complete, "
    "int seed, int epoch, int view) -> Tensor",
    _fake,
)


class Blocks(NamedTuple):
    """What a rectangle may be, in range."""

    grid: tuple[int, int]
    area: tuple[float, float]
    log_aspect: tuple[float, float]
    tries: int


def checked_blocks(grid: Sequence[int], area: Sequence[float], aspect: Sequence[float], tries: int) -> Blocks:
    """The arguments of ``block_mask``, of any kind of numbers.

    Raises:
        TypeError, ValueError: one of them is something else or out of range.
    """
    sides = whole_numbers("grid", grid, "(height, width)")
    if len(sides) != 2 or not 1 <= min(sides) <= max(sides) <= MAX_SIDE or math.prod(sides) > MAX_PATCHES:
        raise ValueError(
            f"grid must be (height, width), each from 1 to {MAX_SIDE}, of at most {MAX_PATCHES} patches, got {sides}"
        )
    least, most = real_number("least", area[0]), real_number("most", area[1])
    if not (0 <= least <= 2**40 and 0 <= most <= 2**40):  # false for NaN too
        raise ValueError(f"least and most must be between 0 and 2^40 patches, got {(least, most)}")
    if len(aspect) != 2:
        raise ValueError(f"aspect must be two numbers, got {aspect!r}")
    low, high = real_number("aspect", aspect[0]), real_number("aspect", aspect[1])
    if not (1e-100 <= low <= 1e100 and 1e-100 <= high <= 1e100):
        raise ValueError(f"aspect must be two numbers between 1e-100 and 1e100, got {(low, high)}")
    attempts = whole_number("tries", tries, 0, 2**31 - 1)
    return Blocks((sides[0], sides[1]), (least, most), (math.log(low), math.log(high)), attempts)


def block_mask(
    samples: Tensor,
    counts: Tensor,
    grid: Sequence[int],
    *,
    area: Sequence[float],
    aspect: Sequence[float],
    tries: int = 10,
    complete: bool = False,
    seed: int = 0,
    epoch: int = 0,
    view: int = 0,
) -> Tensor:
    """Mask rectangles until each image has its count, or until ``tries`` attempts in a row have failed.

    A rectangle's area is uniform between area[0] and the smaller of area[1] and what is missing, its height / width
    log-uniform in ``aspect``. It counts if it is smaller than the grid in both directions and adds at least one patch,
    but no more than that upper bound. After 2¹⁵ attempts in all the mask is left as it is.

    Args:
        samples: [B] int64: which sample each image is.
        counts: [B] float64 on ``samples``' device: patches to mask, not above height · width. A fraction raises the
            upper bounds, as in iBOT, and is cut off in the end.
        grid: (height, width) in patches, each at most 1024, at most 2¹⁷ patches.
        complete: patches drawn one by one make up for what is missing, so that each count is met.
        seed, epoch, view: as in ``sslfast.ops.random_mask``.

    Returns:
        [B, height · width] bool, True where masked.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range.
    """
    check_samples(samples)
    grid, area, log_aspect, tries = checked_blocks(grid, area, aspect, tries)
    seed, epoch, view = key_of(seed, epoch, view)
    if counts.shape != samples.shape or counts.dtype != torch.float64 or counts.device != samples.device:
        raise ValueError(
            f"counts must be [{len(samples)}] of float64 on {samples.device}, got {tuple(counts.shape)} of "
            f"{counts.dtype} on {counts.device}"
        )
    if len(counts) and readable(counts):
        wrong = counts[~((counts >= 0) & (counts <= math.prod(grid)))]
        if len(wrong):
            raise ValueError(f"counts must be between 0 and the {math.prod(grid)} patches, got {float(wrong[0])}")
    if _backends.serve("block_mask", samples, "cuda", why_not) == "reference":
        mask = reference.block_mask(
            samples.cpu().numpy(),
            counts.cpu().numpy(),
            grid,
            area=area,
            log_aspect=log_aspect,
            tries=tries,
            complete=complete,
            seed=seed,
            epoch=epoch,
            view=view,
        )
        return torch.from_numpy(mask).to(samples.device)
    mask = _library.call(
        "block_mask", samples, counts, list(grid), list(area), list(log_aspect), tries, complete, seed, epoch, view
    )
    return mask
