"""DINOv2's and DINOv3's masks of a batch: which images, how much of each, and the list of what is masked."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data._utils.collate import default_collate_fn_map

from .._checks import check_share, real_numbers
from .._library import constant_to_the_compiler, on_the_host
from .._random.key import Key, key_of
from ..ops.masked_rows import masked_rows
from ._samples import Array, Grid, Samples, as_samples, as_tensor, epoch_for, like_samples, rectangle
from .block_masks import ASPECT, batch_numbers, block_masks, on_device


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


def _not_joined(batch: Sequence[PatchMasks], *, collate_fn_map: Any = None) -> PatchMasks:
    raise TypeError("PatchMasks are those of a whole batch, not of single images: make them in the collate_fn")


default_collate_fn_map[PatchMasks] = _not_joined  # of tuples a DataLoader would stack the parts


@constant_to_the_compiler
def _bins(ratios: tuple[float, float], bins: int, patches: int) -> tuple[list[float], list[int]]:
    """Bounds of the bins of ratios, in float32 as upstream has them, and int(patches · bound) of each."""
    return _bins_once(ratios, bins, patches)


@functools.cache
def _bins_once(ratios: tuple[float, float], bins: int, patches: int) -> tuple[list[float], list[int]]:
    with on_the_host():
        bounds = torch.linspace(*ratios, bins + 1, dtype=torch.float32)
        return bounds.tolist(), (patches * bounds).to(torch.int64).tolist()


class _Shares(NamedTuple):
    """Which images DINO's collate functions mask, and how much of them.

    int(B · probability) images, one for each of as many bins of equal width between the two ratios.
    """

    probability: float
    ratios: tuple[float, float]
    exact: bool  # an image has the upper bound of its bin, met exactly; else a number from its bin, at most met


def _checked_shares(probability: float, ratios: Sequence[float], exact: bool) -> _Shares:
    bounds = real_numbers("ratios", ratios)
    if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] <= 1:
        raise ValueError(f"ratios must be two rising numbers between 0 and 1, got {ratios!r}")
    return _Shares(check_share("probability", probability), (bounds[0], bounds[1]), exact)


def _dino_counts(shares: _Shares, numbers: Tensor, patches: int) -> tuple[Tensor, int]:
    """[B] float64, how many patches of each image are to be masked, and the most that a batch of this size can have."""
    batch, device = len(numbers), numbers.device
    masked = int(batch * shares.probability)
    bounds, most = _bins(shares.ratios, masked, patches)
    upper = on_device(most[1:], device)
    # The images in the order of their first number, so that all orders are equally likely: image i gets bin i.
    images = torch.argsort(numbers[:, 0], stable=True)[:masked]
    counts = upper
    if not shares.exact:
        edges = on_device(bounds, device)
        drawn = edges[:-1] + (edges[1:] - edges[:-1]) * numbers[images, 1]
        counts = torch.minimum((drawn * patches).floor(), upper)
    nothing = torch.zeros(batch, dtype=torch.float64, device=device)
    return nothing.index_put((images,), counts), sum(most[1:])


def _rolled(masks: Tensor, shift: Tensor, height: int, width: int) -> Tensor:
    """Each mask moved round the edges of its grid, by its share [B, 2] of the height and of the width."""
    down, across = (shift * on_device((height, width), masks.device)).long().split(1, dim=1)  # [B, 1]
    rows = (torch.arange(height, device=masks.device) - down) % height
    columns = (torch.arange(width, device=masks.device) - across) % width
    return masks.gather(1, (rows[:, :, None] * width + columns[:, None, :]).flatten(1))


def _dino_masks(
    ids: Tensor | Array,
    grid: tuple[int, int],
    shares: _Shares,
    area: tuple[float, float | None],
    aspect: Sequence[float],
    key: Key,
    *,
    shift: bool = False,
) -> PatchMasks:
    """Counts of each image, blocks that meet them, a shift, and the list of what is masked."""
    height, width = grid
    patches = height * width
    numbers = batch_numbers(as_tensor(ids), *key)
    counts, upperbound = _dino_counts(shares, numbers, patches)
    least, most = area
    placed = block_masks(
        ids,
        grid,
        *like_samples(ids, counts),
        least=least,
        most=0.5 * patches if most is None else most,
        aspect=aspect,
        complete=shares.exact,
        **key._asdict(),
    )
    masks = as_tensor(placed)
    if shift:
        masks = _rolled(masks, numbers[:, 2:], height, width)
    rows, weights, count = masked_rows(masks, upperbound)
    masks, rows, weights, count = like_samples(ids, masks, rows, weights, count)
    return PatchMasks(masks, rows, weights, upperbound, count)


def dinov2_masks(
    samples: Samples,
    grid: Grid,
    probability: float = 0.5,
    ratios: Sequence[float] = (0.1, 0.5),
    *,
    least: float = 4,
    most: float | None = None,
    aspect: Sequence[float] = ASPECT,
    seed: int = 0,
    epoch: int | None = None,
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
    key = key_of(seed, epoch_for(epoch, samples), view)
    shares = _checked_shares(probability, ratios, exact=False)
    return _dino_masks(as_samples(samples, device), rectangle(grid), shares, (least, most), aspect, key)


def dinov3_masks(
    samples: Samples,
    grid: Grid,
    probability: float = 0.5,
    ratios: Sequence[float] = (0.1, 0.5),
    *,
    circular_shift: bool = False,
    least: float = 4,
    most: float | None = None,
    aspect: Sequence[float] = ASPECT,
    seed: int = 0,
    epoch: int | None = None,
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
    key = key_of(seed, epoch_for(epoch, samples), view)
    shares, ids = _checked_shares(probability, ratios, exact=True), as_samples(samples, device)
    return _dino_masks(ids, rectangle(grid), shares, (least, most), aspect, key, shift=circular_shift)
