"""I-JEPA's masks (Assran et al., CVPR 2023): a few target blocks, and one context block without what they cover."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data._utils.collate import default_collate_fn_map

from .. import _native
from .._checks import real_numbers, whole_number
from .._random.key import key_of
from .._random.philox import LOW, philox
from .._random.streams import stream_of
from ..ops.multiblock_mask import MOST_PATCHES, MOST_TARGETS, multiblock_mask
from ..reference.multiblock_mask import multiblock_arrays
from ._samples import Grid, Samples, as_samples, epoch_for, rectangle

Pair = tuple[float, float]


class MultiBlockMasks(NamedTuple):
    """Patch numbers y·W + x, ascending in every row; tensors, or NumPy arrays from NumPy samples.

    Attributes:
        context: [B, Kc] int64.
        targets: [T, B, Kt] int64.

    Example:
        >>> context, targets = sslfast.masking.multiblock_masks([0, 1], grid=(14, 14), context_size=28)
        >>> bool(torch.isin(context[0], targets[:, 0]).any())  # nothing is in both
        False
    """

    context: Any
    targets: Any


def _joined(batch: Sequence[MultiBlockMasks], *, collate_fn_map: Any = None) -> MultiBlockMasks:
    """The masks of several images as those of one batch of tensors."""
    if len({(masks.context.shape[1], *masks.targets.shape[::2]) for masks in batch}) > 1:
        raise ValueError(
            "masks of single images have contexts or targets of different sizes: give context_size, and the same step "
            "for a whole batch, or make them where the batch is known (collate_fn)"
        )
    context = torch.cat([torch.as_tensor(masks.context) for masks in batch])
    return MultiBlockMasks(context, torch.cat([torch.as_tensor(masks.targets) for masks in batch], dim=1))


default_collate_fn_map[MultiBlockMasks] = _joined  # of tuples a DataLoader would stack the parts


def _block(grid: tuple[int, int], scale: float, aspect: float, upstream: bool) -> tuple[int, int]:
    """Height and width of a block of ``scale`` of the grid's patches, height/width = ``aspect``, within the grid."""
    area = int(grid[0] * grid[1] * scale)
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if upstream:  # never as high or wide as the grid
        return min(height, grid[0] - 1), min(width, grid[1] - 1)
    return min(max(height, 1), grid[0]), min(max(width, 1), grid[1])


def _largest_target(grid: tuple[int, int], scale: Pair, aspect: Pair) -> int:
    """The most patches that a target block can have, whatever is drawn."""
    area, most = max(1, int(grid[0] * grid[1] * scale[1])), 1
    for height in range(1, grid[0] + 1):
        ratio = max(aspect[0], (height - 0.5) ** 2 / area)  # the lowest at which a block is so high, so the widest one
        if ratio <= aspect[1]:
            most = max(most, height * min(grid[1], max(1, math.floor(math.sqrt(area / ratio) + 0.5))))
    return most


def _checked_range(name: str, given: Pair, most: float = 1.0) -> Pair:
    numbers = real_numbers(name, given)
    if len(numbers) != 2 or not 0 < numbers[0] <= numbers[1] <= most:  # false for NaN too
        raise ValueError(f"{name} must be 0 < low <= high{' <= 1' * (most == 1)}, got {given!r}")
    return numbers[0], numbers[1]


def multiblock_masks(
    samples: Samples,
    grid: Grid,
    *,
    targets: int = 4,
    target_scale: Pair = (0.15, 0.2),
    target_aspect: Pair = (0.75, 1.5),
    context_scale: Pair = (0.85, 1.0),
    context_size: int | None = None,
    min_keep: int = 10,
    allow_overlap: bool = False,
    upstream: bool = False,
    step: int = 0,
    seed: int = 0,
    epoch: int | None = None,
    view: int = 0,
    device: torch.device | str | None = None,
) -> MultiBlockMasks:
    """Masks of a batch: T target blocks of one size an image, and one context without the patches that they cover.

    The sizes of the blocks are drawn once for the batch, on the host, from (seed, epoch, view, step), so that shapes
    are known without waiting for a device; places are drawn per sample. A context below ``min_keep`` patches is drawn
    anew, 20 times at most, and the best one taken. All contexts get one length: of a longer one a random choice stays,
    a shorter one is completed by a random choice of patches outside its block, never of a target's.

    Facebook's ``multiblock.py`` differs in ways that its users report as bugs, and ``upstream=True`` repeats them: one
    random number drives a block's scale and its aspect; no block reaches the grid's last row or column; masks are cut
    to the shortest of the batch in the order of patch numbers, so from the bottom of the image; a context of just
    ``min_keep`` patches is too small, and after every 20 attempts it may cover one more target, from the last one on.

    Args:
        samples: the images' dataset indices, or just how many images there are, as in :func:`random_masks`. A NumPy
            array gives NumPy arrays, made without torch's operators, as for a data loader's worker.
        grid: patches (H, W), or the side of a square; at most 2^17 of them.
        targets: T, 1 to 256. Default 4.
        target_scale: share of the grid's patches in a target block, range of a uniform number. Default (0.15, 0.2).
        target_aspect: its height/width, range of a uniform number. Default (0.75, 1.5).
        context_scale: the same share of the (square) context block. Default (0.85, 1).
        context_size: the length of every context, at most H·W − T · the largest target block. Default: the shortest in
            the batch (but min_keep where the targets leave so many for certain); on a GPU reading it waits for the
            device once. With ``allow_overlap`` it is the context block itself.
        min_keep: see above. Default 10.
        allow_overlap: the context keeps what targets cover. Default ``False``.
        upstream: see above; ``context_size`` must then be ``None``. Default ``False``.
        step: number of the batch, 0 to 2⁶⁴ − 1, the same on every rank. Without it all batches of an epoch have blocks
            of the same sizes. Default 0.
        seed: any 64-bit whole number. Default 0.
        epoch: the current epoch, as in :func:`random_masks`.
        view: 0 to 1023. Default 0.
        device: of the result; default: the samples', else the CPU.

    Returns:
        ``MultiBlockMasks``: context [B, Kc] int64 and targets [T, B, Kt] int64, ascending in every row.

    Raises:
        TypeError, ValueError: which argument is wrong, what it was, what is allowed; also where no patch is left for
            the context of some sample.

    Example:
        >>> masks = sslfast.masking.multiblock_masks([0, 1], grid=(14, 14), context_size=28)
        >>> masks.context.shape, masks.targets.shape[:2]
        (torch.Size([2, 28]), torch.Size([4, 2]))
    """
    grid = rectangle(grid)
    patches = whole_number("grid's patches", grid[0] * grid[1], 1, MOST_PATCHES)
    if min(grid) < 1:
        raise ValueError(f"grid must have sides of at least 1, got {grid}")
    targets = whole_number("targets", targets, 1, MOST_TARGETS)
    min_keep = whole_number("min_keep", min_keep, 0, patches)
    step = whole_number("step", step, 0, 2**64 - 1)
    target_scale = _checked_range("target_scale", target_scale)
    target_aspect = _checked_range("target_aspect", target_aspect, math.inf)
    context_scale = _checked_range("context_scale", context_scale)
    seed, epoch, view = key_of(seed, epoch_for(epoch, samples), view)
    # Block sizes are shapes, so their numbers are drawn on the host.
    words = philox((stream_of("multiblock_sizes", view) << 16, epoch, step & LOW, step >> 32), seed)
    u = [word * 2.0**-32 for word in words]
    ranges = (target_scale, target_aspect, context_scale)
    scale, aspect, share = (low + (high - low) * u[i] for i, (low, high) in enumerate(ranges))
    if upstream:
        aspect = target_aspect[0] + (target_aspect[1] - target_aspect[0]) * u[0]
    blocks = (_block(grid, scale, aspect, upstream), _block(grid, share, 1.0, upstream))
    if upstream and min(h * w for h, w in blocks) <= min_keep:
        (a, b), (c, d) = blocks
        raise ValueError(
            f"upstream=True draws until a block has more than min_keep = {min_keep} patches, and blocks of {a} × {b} "
            f"(targets) and {c} × {d} (context) never have"
        )
    if context_size is not None:
        covered = 0 if allow_overlap else targets * _largest_target(grid, target_scale, target_aspect)
        most = patches - covered
        if not upstream:
            context_size = whole_number("context_size", context_size, -(2**63))
        if upstream or not 1 <= context_size <= most:
            allowed = "None with upstream=True" if upstream else f"from 1 to {most}, which targets always leave"
            raise ValueError(f"context_size must be {allowed}, got {context_size}")

    ids = as_samples(samples, device)

    def place(kept: int) -> tuple[Any, Any, Any]:
        if isinstance(ids, torch.Tensor):
            options: dict[str, Any] = {"min_keep": min_keep, "allow_overlap": allow_overlap, "upstream": upstream}
            return multiblock_mask(ids, grid, targets, *blocks, kept, **options, seed=seed, epoch=epoch, view=view)
        function = multiblock_arrays if _native.host is None else _native.host.multiblock_mask
        return function(ids, grid, targets, *blocks, kept, min_keep, allow_overlap, upstream, seed, epoch, view)

    whole_block = blocks[1][0] * blocks[1][1] if allow_overlap else 0  # 0: known only once they are counted
    kept = whole_block if context_size is None else context_size
    context, target, counts = place(kept)
    if kept == 0 and len(ids):
        free = 0 if upstream else patches - targets * target.shape[2]
        kept = max(int(counts.min()), min(min_keep, free))
        if kept < 1:
            raise ValueError(
                f"no patch of {grid[0]} × {grid[1]} is left for the context of some sample: targets = {targets} blocks "
                f"of {blocks[0][0]} × {blocks[0][1]} are too many or too large"
            )
        context, target, _ = place(kept)
    return MultiBlockMasks(context, target)
