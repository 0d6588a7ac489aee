"""Random masks of exact counts, keyed by seed and sample: Philox4x32-10 or noise that is given.

No state: the same (seed, epoch, view, sample) gives the same mask on every device, in every batch, worker and rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _backends, _library, reference
from .._checks import whole_number, whole_numbers
from .._random.key import key_of
from . import _devices

BACKENDS = ("cpu", "cuda", "reference")
why_not = functools.partial(_devices.why_not, "random_mask", "samples")
MAX_UNITS = 2**18  # kMaxUnits in csrc/common/masks.h


def _fake(
    samples: Tensor,
    noise: Tensor | None,
    grid: Sequence[int],
    unit: Sequence[int],
    kept: int,
    ascending: bool,
    seed: int,
    epoch: int,
    view: int,
) -> tuple[Tensor, Tensor, Tensor]:
    cells, keep = math.prod(grid), kept * math.prod(unit)
    count = samples.shape[0]
    return samples.new_empty((count, keep)), samples.new_empty((count, cells - keep)), samples.new_empty((count, cells))


_library.define(
    "random_mask(Tensor samples, Tensor? noise, int[] grid, int[] unit, int kept, bool ascending, int seed, int epoch, "
    "int view) -> (Tensor, Tensor, Tensor)",
    _fake,
)


def check_samples(samples: Tensor) -> None:
    if not isinstance(samples, Tensor) or samples.dtype != torch.int64 or samples.dim() != 1:
        got = f"{tuple(samples.shape)} of {samples.dtype}" if isinstance(samples, Tensor) else type(samples).__name__
        raise TypeError(f"samples must be a vector of int64, got {got}")


def check_units(grid: Sequence[int], unit: Sequence[int], kept: int) -> int:
    """``kept`` as an int, once ``unit`` divides ``grid`` (three numbers each) into no fewer units."""
    if len(grid) != 3 or len(unit) != 3:
        raise ValueError(f"grid and unit must have three numbers each, got {len(grid)} and {len(unit)}")
    if min(grid) < 1 or math.prod(grid) >= 2**31:
        raise ValueError(f"grid must have sides of at least 1 and fewer than 2^31 cells, got {tuple(grid)}")
    if min(unit) < 1 or any(side % part for side, part in zip(grid, unit, strict=True)):
        raise ValueError(f"unit must divide the grid {tuple(grid)} side by side, got {tuple(unit)}")
    units = math.prod(grid) // math.prod(unit)
    if units > MAX_UNITS:
        raise ValueError(f"grid must have at most {MAX_UNITS} units, got {units} of {tuple(unit)} in {tuple(grid)}")
    return whole_number("kept", kept, 0, units, "units")


def random_mask(
    samples: Tensor,
    grid: Sequence[int],
    kept: int,
    *,
    unit: Sequence[int] = (1, 1, 1),
    noise: Tensor | None = None,
    ascending: bool = True,
    seed: int = 0,
    epoch: int = 0,
    view: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep ``kept`` units of each image, drawn at random without replacement.

    Args:
        samples: [B] int64: which sample each image is.
        grid: (time, height, width) in cells, which are numbered in raster order; fewer than 2³¹.
        kept: how many units are kept, those of the smallest (key, number).
        unit: (time, height, width) of what is kept or masked as a whole; divides the grid into at most 2¹⁸ units.
        noise: [B, units] float32 in place of the random keys: a stable sort, −0 = +0, NaN last.
        ascending: ids in raster order; else unit after unit in the order of the keys.
        seed: any 64-bit whole number. Default 0.
        epoch: 0 to 2³² − 1. Default 0.
        view: 0 to 1023. Default 0.

    Returns:
        ids of the kept cells [B, K], of the masked ones [B, L − K], and [B, L], where each cell went in the two of
        them one after the other; all int64.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range.
    """
    check_samples(samples)
    grid, unit = whole_numbers("grid", grid, "three numbers"), whole_numbers("unit", unit, "three numbers")
    kept = check_units(grid, unit, kept)
    seed, epoch, view = key_of(seed, epoch, view)
    units = math.prod(grid) // math.prod(unit)
    if noise is not None:
        if noise.shape != (len(samples), units) or noise.device != samples.device:
            raise ValueError(
                f"noise must be [{len(samples)}, {units}] on {samples.device}, got {tuple(noise.shape)} on "
                f"{noise.device}"
            )
        if noise.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"noise must be float32, bfloat16 or float16, got {noise.dtype}")
        noise = noise.detach().to(torch.float32)
    backend = _backends.serve("random_mask", samples, "cuda", why_not)
    if backend == "reference":
        arrays = reference.random_mask(
            samples.cpu().numpy(),
            grid,
            kept,
            unit=unit,
            noise=None if noise is None else noise.cpu().numpy(),
            ascending=ascending,
            seed=seed,
            epoch=epoch,
            view=view,
        )
        keep, masked, restore = (torch.from_numpy(a).to(samples.device) for a in arrays)
        return keep, masked, restore
    keep, masked, restore = _library.call(
        "random_mask", samples, noise, list(grid), list(unit), kept, ascending, seed, epoch, view
    )
    return keep, masked, restore
