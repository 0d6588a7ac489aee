"""Masks made of rectangular blocks: BEiT's and iBOT's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _native, reference
from .._checks import is_real, real_number, real_numbers
from .._library import kept_on_device, towards
from .._random.key import key_of
from .._random.philox import LOW, philox
from .._random.streams import stream_of
from ..ops.block_mask import block_mask, checked_blocks
from ._samples import Array, Grid, Samples, as_samples, as_tensor, epoch_for, like_samples, rectangle

ASPECT = (0.3, 1 / 0.3)
Counts = float | Sequence[float] | Tensor | Array


def _check_counts(counts: Array, patches: int) -> None:
    wrong = counts[~((counts >= 0) & (counts <= patches))]
    if wrong.size and patches > 0:  # a wrong grid is named as such
        raise ValueError(f"counts must be between 0 and the {patches} patches, got {wrong.flat[0]}")


def _counts(count: Counts, ids: Tensor | Array, patches: int) -> Tensor | Array:
    """[B] float64, of the samples' kind and on their device."""
    counts: Tensor | Array
    if isinstance(ids, np.ndarray):
        counts = np.asarray(count, dtype=np.float64)
        counts = np.full(len(ids), counts) if counts.ndim == 0 else counts
    elif isinstance(count, Tensor):
        counts = count.to(torch.float64)
    elif is_real(count):
        _check_counts(np.asarray(count), patches)
        return torch.full((len(ids),), real_number("count", count), dtype=torch.float64, device=ids.device)
    else:
        numbers = np.array(count, dtype=np.float64)
        _check_counts(numbers, patches)
        counts = towards(torch.from_numpy(numbers), ids.device)
    if tuple(counts.shape) != (len(ids),):
        raise ValueError(f"count must be a number or one of each of the {len(ids)} images, got {tuple(counts.shape)}")
    return counts


def block_masks(
    samples: Samples,
    grid: Grid,
    count: Counts,
    *,
    least: float = 4,
    most: float | None = None,
    aspect: Sequence[float] = ASPECT,
    tries: int = 10,
    complete: bool = False,
    seed: int = 0,
    epoch: int | None = None,
    view: int = 0,
    device: torch.device | str | None = None,
) -> Any:
    """Mask rectangles, which may overlap, until ``count`` patches are masked (Bao et al., BEiT, ICLR 2022).

    ``MaskingGenerator(grid, count, least, most, *aspect)`` of BEiT, iBOT and DINOv2 draws from the same distribution.
    A rectangle's area is uniform between ``least`` and the smaller of ``most`` and what is missing (the larger of the
    two need not be the upper one), its height / width log-uniform in ``aspect``; it is smaller than the grid in both
    directions, and adds at least one patch and no more than that upper bound. After ``tries`` failed attempts in a row
    the mask is left as it is, below its count, or completed.

    Args:
        samples: [B] ids or a number of images, as in :func:`random_masks`.
        grid: (height, width) in patches, or the side of a square; at most 1024 each, at most 2¹⁷ patches.
        count: patches to mask, one number or one for each image, at most height · width. A fraction raises the upper
            bounds and is cut off in the end.
        least, most: area of a rectangle in patches. Defaults 4 and no bound.
        aspect: smallest and largest height / width. Default (0.3, 1/0.3).
        tries: attempts in a row that may fail. Default 10.
        complete: patches drawn one by one make up for what is missing, so that each count is met and
            ``Masks.from_mask`` applies. Default False.
        seed, epoch, view, device: as in :func:`random_masks`.

    Returns:
        [B, height · width] bool, True where masked.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range.

    Example:
        >>> masks = sslfast.masking.block_masks([0, 1], grid=(14, 14), count=75, complete=True)
        >>> masks.shape, masks.sum(1).tolist()
        (torch.Size([2, 196]), [75, 75])
    """
    epoch = epoch_for(epoch, samples)
    ids, sides = as_samples(samples, device), rectangle(grid)
    counts = _counts(count, ids, math.prod(sides))
    area = (least, 2.0**40 if most is None else most)
    options: dict[str, Any] = {"complete": complete, **key_of(seed, epoch, view)._asdict()}
    if isinstance(ids, Tensor):
        assert isinstance(counts, Tensor)
        return block_mask(ids, counts, sides, area=area, aspect=aspect, tries=tries, **options)
    assert isinstance(counts, np.ndarray)
    rules = checked_blocks(sides, area, aspect, tries)
    _check_counts(counts, math.prod(sides))
    function = reference.block_mask if _native.host is None else _native.host.block_mask
    return function(ids, counts, **rules._asdict(), **options)


def beit_masks(
    samples: Samples,
    grid: Grid = (14, 14),
    count: int = 75,
    *,
    least: int = 16,
    most: int | None = None,
    aspect: Sequence[float] = ASPECT,
    complete: bool = False,
    **options: Any,
) -> Any:
    """BEiT's masks: 75 of 14 × 14 patches in blocks of at least 16, at times fewer unless ``complete``.

    Arguments, result and errors are those of :func:`block_masks`.

    Example:
        >>> masks = sslfast.masking.beit_masks([0, 1], complete=True)
        >>> masks.sum(1).tolist()
        [75, 75]
    """
    return block_masks(samples, grid, count, least=least, most=most, aspect=aspect, complete=complete, **options)


def batch_numbers(ids: Tensor, seed: int, epoch: int, view: int) -> Tensor:
    """[B, 4] float64 in [0, 1) of each sample, apart from its blocks: ratios and choices in the batch."""
    key = key_of(seed, epoch, view)
    first = torch.full_like(ids, stream_of("batch_of_masks", key.view) << 16)
    counter = (first, torch.full_like(ids, key.epoch), ids & LOW, ids >> 32 & LOW)
    return torch.stack(philox(counter, key.seed), 1).to(torch.float64) * 2.0**-32


def on_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    """[n] float64 of numbers that the host knows. A copy to a GPU would wait for it, so they are kept per device."""
    if torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=torch.float64, device=device)
    return _constants(tuple(map(float, numbers)), device)


@kept_on_device
def _constants(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def ibot_masks(
    samples: Samples,
    grid: Grid,
    ratio: float | Sequence[float] = 0.3,
    variation: float | Sequence[float] = 0.0,
    *,
    shape: str = "block",
    aspect: Sequence[float] = ASPECT,
    seed: int = 0,
    epoch: int | None = None,
    view: int = 0,
    device: torch.device | str | None = None,
) -> Any:
    """iBOT's masks (Zhou et al., ICLR 2022): the share of masked patches is drawn for each image.

    Args:
        samples, grid, aspect, seed, epoch, view, device: as in :func:`block_masks`.
        ratio: r, or several of which each image draws one. iBOT's recipes: (0, 0.3). Default 0.3.
        variation: v, or one for each ratio: the share is uniform in r ± v, v ≤ r. iBOT's recipes: (0, 0.2). Default 0.
        shape: ``"block"``: rectangles of at least ⌊shorter side / 3⌋² patches, so that an image may have fewer than its
            share; ``"random"``: exactly int(share · patches), each patch equally likely.

    Returns:
        [B, height · width] bool, True where masked.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range.

    Example:
        >>> masks = sslfast.masking.ibot_masks([0, 1], grid=(14, 14), ratio=0.3, shape="random")
        >>> masks.sum(1).tolist()
        [58, 58]
    """
    ratios, variations = real_numbers("ratio", ratio), real_numbers("variation", variation)
    if is_real(variation):
        variations *= len(ratios)
    if len(ratios) != len(variations) or not ratios:
        raise ValueError(f"variation must be one number or one for each ratio, got {variation!r} for {ratio!r}")
    if not all(0 <= v <= r and r + v <= 1 for r, v in zip(ratios, variations, strict=True)):
        raise ValueError(f"shares ratio ± variation must lie between 0 and 1, got {ratio!r} ± {variation!r}")
    if shape not in ("block", "random"):
        raise ValueError(f"shape must be 'block' or 'random', got {shape!r}")
    epoch = epoch_for(epoch, samples)
    ids, (height, width) = as_samples(samples, device), rectangle(grid)
    numbers = batch_numbers(as_tensor(ids), seed, epoch, view)
    choice = (numbers[:, 2] * len(ratios)).to(torch.int64)
    lowest = [r - v for r, v in zip(ratios, variations, strict=True)]
    highest = [r + v for r, v in zip(ratios, variations, strict=True)]
    low, high = (on_device(bounds, numbers.device)[choice] for bounds in (lowest, highest))
    share = torch.minimum(low + (high - low) * numbers[:, 1], high)
    (counts,) = like_samples(ids, share * (height * width))
    return block_masks(
        ids,
        (height, width),
        counts,
        least=(min(height, width) // 3) ** 2,
        aspect=aspect,
        tries=10 if shape == "block" else 0,
        complete=shape == "random",
        seed=seed,
        epoch=epoch,
        view=view,
    )
