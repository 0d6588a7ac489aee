"""Masks made of rectangular blocks: BEiT, iBOT, DINOv2 and DINOv3."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _native, reference
from .._library import constant_to_the_compiler, kept_on_device, on_the_host, towards
from .._random.philox import LOW, philox
from .._random.streams import stream_of
from ..ops.block_mask import block_mask, check_blocks
from ..ops.masked_rows import masked_rows
from ..ops.random_mask import check_key
from ._samples import Array, Samples, as_samples

ASPECT = (0.3, 1 / 0.3)


class PatchMasks(NamedTuple):
    """What DINOv2's ``collate_data_and_cast`` tells of the masks, in shapes that depend on no data.

    Attributes:
        collated_masks: [B, L] bool, True where masked.
        mask_indices_list: [upperbound] int64, b · L + l of the masked patches in order, then −1.
        masks_weight: [upperbound] float32, 1 / (masked patches of the image), then 0.
        upperbound: the number of masked patches that no batch of this size exceeds.
        n_masked_patches: [1] int64, how many there are.

    Example:
        >>> masks = sslfast.masking.dinov3_masks([0, 1, 2, 3], grid=(16, 16))
        >>> masks.mask_indices_list.shape[0] == masks.upperbound
        True
    """

    collated_masks: Any
    mask_indices_list: Any
    masks_weight: Any
    upperbound: int
    n_masked_patches: Any


def _check_counts(counts: Array, patches: int) -> None:
    wrong = counts[~((counts >= 0) & (counts <= patches))]
    if wrong.size and patches > 0:  # a wrong grid is named as such
        raise ValueError(f"counts must be between 0 and the {patches} patches, got {wrong.flat[0]}")


def _counts(count: float | Sequence[float] | Tensor | Array, ids: Tensor | Array, patches: int) -> Any:
    """[B] float64, of the samples' kind and on their device."""
    if isinstance(ids, np.ndarray):
        given = np.asarray(count, dtype=np.float64)
        counts: Any = np.full(len(ids), given) if given.ndim == 0 else given
    elif isinstance(count, Tensor):
        counts = count.to(torch.float64)
    elif isinstance(count, (int, float, np.number)):
        _check_counts(np.asarray(count), patches)
        return torch.full((len(ids),), float(count), dtype=torch.float64, device=ids.device)
    else:
        _check_counts(np.asarray(count), patches)
        counts = towards(torch.from_numpy(np.array(count, dtype=np.float64)), ids.device)
    if tuple(counts.shape) != (len(ids),):
        raise ValueError(f"count must be a number or one of each of the {len(ids)} images, got {tuple(counts.shape)}")
    return counts


def block_masks(
    samples: Samples,
    grid: Sequence[int],
    count: float | Sequence[float] | Tensor | Array,
    *,
    least: float = 4,
    most: float | None = None,
    aspect: Sequence[float] = ASPECT,
    tries: int = 10,
    complete: bool = False,
    seed: int = 0,
    epoch: int = 0,
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
        grid: (height, width) in patches, each at most 1024, at most 2¹⁷ patches.
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
    ids = as_samples(samples, device)
    sides = [int(side) for side in grid]
    counts = _counts(count, ids, math.prod(sides))
    if len(aspect) != 2:
        raise ValueError(f"aspect must be two numbers, got {aspect!r}")
    area = (float(least), 2.0**40 if most is None else float(most))
    bounds = (float(aspect[0]), float(aspect[1]))
    if isinstance(ids, Tensor):
        return block_mask(
            *(ids, counts, sides),
            area=area,
            aspect=bounds,
            tries=tries,
            complete=complete,
            seed=seed,
            epoch=epoch,
            view=view,
        )
    log_aspect = check_blocks(sides, area, bounds, tries)
    key = {"seed": check_key(seed, epoch, view), "epoch": epoch, "view": view}
    _check_counts(counts, sides[0] * sides[1])
    function = reference.block_mask if _native.host is None else _native.host.block_mask
    return function(ids, counts, sides, area=area, log_aspect=log_aspect, tries=tries, complete=complete, **key)


def beit_masks(
    samples: Samples,
    grid: Sequence[int] = (14, 14),
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


def _batch_numbers(ids: Tensor, seed: int, epoch: int, view: int) -> Tensor:
    """[B, 4] float64 in [0, 1) of each sample, apart from its blocks: ratios and choices in the batch."""
    check_key(seed, epoch, view)
    first = torch.full_like(ids, stream_of("batch_of_masks", view) << 16)
    counter = (first, torch.full_like(ids, epoch), ids & LOW, ids >> 32 & LOW)
    return torch.stack(philox(counter, seed), 1).to(torch.float64) * 2.0**-32


def _filled(numbers: Sequence[float], device: torch.device) -> Tensor:
    """[n] float64 of numbers that the host knows. A copy to a GPU would wait for it, so they are kept per device."""
    if torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=torch.float64, device=device)
    return _constants(tuple(map(float, numbers)), device)


@kept_on_device
def _constants(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def _like(ids: Tensor | Array, x: Tensor) -> Any:
    return x.numpy() if isinstance(ids, np.ndarray) else x


def ibot_masks(
    samples: Samples,
    grid: Sequence[int],
    ratio: float | Sequence[float] = 0.3,
    variation: float | Sequence[float] = 0.0,
    *,
    shape: str = "block",
    aspect: Sequence[float] = ASPECT,
    seed: int = 0,
    epoch: int = 0,
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
    ratios = [float(r) for r in ratio] if isinstance(ratio, Sequence) else [float(ratio)]
    spread = [float(v) for v in variation] if isinstance(variation, Sequence) else [float(variation)] * len(ratios)
    if len(ratios) != len(spread) or not ratios:
        raise ValueError(f"variation must be one number or one for each ratio, got {variation!r} for {ratio!r}")
    if not all(0 <= v <= r and r + v <= 1 for r, v in zip(ratios, spread, strict=True)):
        raise ValueError(f"shares ratio ± variation must lie between 0 and 1, got {ratio!r} ± {variation!r}")
    if shape not in ("block", "random"):
        raise ValueError(f"shape must be 'block' or 'random', got {shape!r}")
    ids = as_samples(samples, device)
    numbers = _batch_numbers(torch.from_numpy(ids) if isinstance(ids, np.ndarray) else ids, seed, epoch, view)
    bounds = [(r - v, r + v) for r, v in zip(ratios, spread, strict=True)]
    choice = (numbers[:, 2] * len(ratios)).to(torch.int64)
    low, high = (_filled([bound[end] for bound in bounds], numbers.device)[choice] for end in (0, 1))
    share = torch.minimum(low + (high - low) * numbers[:, 1], high)
    return block_masks(
        ids,
        grid,
        _like(ids, share * (grid[0] * grid[1])),
        least=(min(grid) // 3) ** 2,
        aspect=aspect,
        tries=10 if shape == "block" else 0,
        complete=shape == "random",
        seed=seed,
        epoch=epoch,
        view=view,
    )


@constant_to_the_compiler
def _bins(ratios: tuple[float, float], bins: int, patches: int) -> tuple[list[float], list[int]]:
    """Bounds of the bins of ratios, in float32 as upstream has them, and int(patches · bound) of each."""
    return _bins_once(ratios, bins, patches)


@functools.cache
def _bins_once(ratios: tuple[float, float], bins: int, patches: int) -> tuple[list[float], list[int]]:
    with on_the_host():
        bounds = torch.linspace(*ratios, bins + 1, dtype=torch.float32)
        return bounds.tolist(), (patches * bounds).to(torch.int64).tolist()


def _dino_masks(
    samples: Samples,
    grid: Sequence[int],
    probability: float,
    ratios: Sequence[float],
    device: torch.device | str | None,
    *,
    least: float,
    most: float | None,
    exact: bool,
    shift: bool,
    **options: Any,
) -> PatchMasks:
    """``exact``: an image has the upper bound of its bin, met exactly; else a number from its bin, at most met."""
    if len(ratios) != 2 or not 0 <= ratios[0] <= ratios[1] <= 1:
        raise ValueError(f"ratios must be two rising numbers between 0 and 1, got {ratios!r}")
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be between 0 and 1, got {probability}")
    ids = as_samples(samples, device)
    tensor = torch.from_numpy(ids) if isinstance(ids, np.ndarray) else ids
    key = {name: options[name] for name in ("seed", "epoch", "view")}
    numbers = _batch_numbers(tensor, **key)
    height, width = (int(side) for side in grid)
    patches, bins = height * width, int(len(ids) * probability)
    bounds, whole = _bins((float(ratios[0]), float(ratios[1])), bins, patches)
    upperbound = sum(whole[1:])
    # Which image gets which bin: the images in the order of their first number, so that all orders are equally likely.
    order = torch.argsort(numbers[:, 0], stable=True)
    bound, most_of = _filled(bounds, tensor.device), _filled(whole[1:], tensor.device)
    of_bin = most_of
    if not exact:
        share = bound[:-1] + (bound[1:] - bound[:-1]) * numbers[order[:bins], 1]
        of_bin = torch.minimum((share * patches).floor(), most_of)
    counts = torch.zeros(len(ids), dtype=torch.float64, device=tensor.device).index_put((order[:bins],), of_bin)
    most = 0.5 * patches if most is None else most
    masks = block_masks(ids, grid, _like(ids, counts), least=least, most=most, complete=exact, **options)
    if shift:
        rows = (torch.arange(height, device=tensor.device) - (numbers[:, 2:3] * height).long()) % height
        columns = (torch.arange(width, device=tensor.device) - (numbers[:, 3:4] * width).long()) % width
        source = (rows[:, :, None] * width + columns[:, None, :]).reshape(len(ids), patches)
        masks = np.take_along_axis(masks, source.numpy(), 1) if isinstance(ids, np.ndarray) else masks.gather(1, source)
    listed = (reference.masked_rows if isinstance(ids, np.ndarray) else masked_rows)(masks, upperbound)
    return PatchMasks(masks, listed[0], listed[1], upperbound, listed[2])


def dinov2_masks(
    samples: Samples,
    grid: Sequence[int],
    probability: float = 0.5,
    ratios: Sequence[float] = (0.1, 0.5),
    *,
    least: float = 4,
    most: float | None = None,
    aspect: Sequence[float] = ASPECT,
    seed: int = 0,
    epoch: int = 0,
    view: int = 0,
    device: torch.device | str | None = None,
) -> PatchMasks:
    """The masks of DINOv2's ``collate_data_and_cast`` (Oquab et al., TMLR 2024), in shapes that depend on no data.

    int(B · probability) images are masked, in random places of the batch: one for each of as many bins of equal width
    between the two ratios, from which its share is drawn; its blocks may fall short of it.

    Args:
        samples: as in :func:`random_masks`, with an id of its own for each crop: which images are masked, and how much,
            depends on all ids of the batch.
        grid: (height, width) in patches, as in :func:`block_masks`.
        probability: share of the images that are masked. Default 0.5.
        ratios: smallest and largest share of an image's patches. Default (0.1, 0.5).
        least, most: area of a block in patches. Defaults 4 and half the patches (upstream truncates half the
            side first, which is less where that is no whole number).
        aspect, seed, epoch, view, device: as in :func:`block_masks`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range.

    Example:
        >>> masks = sslfast.masking.dinov2_masks([0, 1, 2, 3], grid=(16, 16))
        >>> masks.collated_masks.shape, masks.collated_masks.any(1).sum().item()  # half of the images
        (torch.Size([4, 256]), 2)
    """
    options: dict[str, Any] = {"aspect": aspect, "seed": seed, "epoch": epoch, "view": view}
    return _dino_masks(
        samples, grid, probability, ratios, device, least=least, most=most, exact=False, shift=False, **options
    )


def dinov3_masks(
    samples: Samples,
    grid: Sequence[int],
    probability: float = 0.5,
    ratios: Sequence[float] = (0.1, 0.5),
    *,
    circular_shift: bool = False,
    least: float = 4,
    most: float | None = None,
    aspect: Sequence[float] = ASPECT,
    seed: int = 0,
    epoch: int = 0,
    view: int = 0,
    device: torch.device | str | None = None,
) -> PatchMasks:
    """The masks of DINOv3's ``collate_data_and_cast``: as :func:`dinov2_masks`, with exact counts.

    An image has the upper bound of its bin, and patches drawn one by one make up for what its blocks leave missing, so
    ``upperbound`` is the number of masked patches of every batch of this size and the list has no padding.

    Args:
        circular_shift: each mask is moved round the edges of the grid by random distances. Default False.
        others: as in :func:`dinov2_masks`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range.

    Example:
        >>> masks = sslfast.masking.dinov3_masks([0, 1, 2, 3], grid=(16, 16))
        >>> masks.n_masked_patches.item() == masks.upperbound
        True
    """
    options: dict[str, Any] = {"aspect": aspect, "seed": seed, "epoch": epoch, "view": view}
    return _dino_masks(
        samples, grid, probability, ratios, device, least=least, most=most, exact=True, shift=circular_shift, **options
    )
