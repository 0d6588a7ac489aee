"""I-JEPA's multi-block masks of given block sizes: places are drawn per sample, and every context has one length.

Philox4x32-10 keyed by seed, with (block, view, epoch, sample) as its counter: the same sample gets the same masks on
every device, in every batch, worker and rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import _backends, _library, reference
from .._checks import whole_number, whole_numbers
from .._random.key import key_of
from . import _devices
from .random_mask import check_samples

BACKENDS = ("cpu", "cuda", "reference")
why_not = functools.partial(_devices.why_not, "multiblock_mask", "samples")
MOST_TARGETS = 256  # as in csrc/common/multiblock_mask.h
MOST_PATCHES = 2**17


def _fake(
    samples: Tensor, grid: Sequence[int], targets: int, target_block: Sequence[int], *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    count, (_, kept, *_) = samples.shape[0], rest
    target = samples.new_empty((targets, count, target_block[0] * target_block[1]))
    return samples.new_empty((count, kept)), target, samples.new_empty(count)


_library.define(
    "multiblock_mask(Tensor samples, int[] grid, int targets, int[] target_block, int[] context_block, int kept, "
    "int min_keep, bool allow_overlap, bool upstream, int seed, int epoch, int view) "
    "-> (Tensor context, Tensor target_ids, Tensor counts)",
    _fake,
)


def multiblock_mask(
    samples: Tensor,
    grid: Sequence[int],
    targets: int,
    target_block: Sequence[int],
    context_block: Sequence[int],
    kept: int,
    *,
    min_keep: int = 10,
    allow_overlap: bool = False,
    upstream: bool = False,
    seed: int = 0,
    epoch: int = 0,
    view: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Place blocks; ``sslfast.masking.multiblock_masks`` draws their sizes and tells what the options mean.

    Args:
        samples: [B] int64: which sample each image is.
        grid: patches (H, W), at most 2^17.
        targets: T, the number of target blocks, 1 to 256.
        target_block, context_block: (height, width) of a block, at most the grid's (``upstream``: less).
        kept: the length of every context; 0: contexts are only counted.
        seed, epoch, view: see ``sslfast.masking.multiblock_masks``; ``seed`` signed or not.

    Returns:
        context [B, kept] int64, ascending, −1 where fewer patches than ``kept`` lie outside the targets;
        targets [T, B, height · width] int64, ascending; counts [B] int64, each context's own size before it is thinned
        or completed.

    Raises:
        TypeError, ValueError: samples are not a vector of int64, or a number is out of range.
    """
    check_samples(samples)
    grid = whole_numbers("grid", grid, "(rows, columns)")
    patches = whole_number("grid's patches", math.prod(grid), 1, MOST_PATCHES)
    targets = whole_number("targets", targets, 1, MOST_TARGETS)
    kept = whole_number("kept", kept, 0, patches)
    min_keep = whole_number("min_keep", min_keep, 0, MOST_PATCHES)
    seed, epoch, view = key_of(seed, epoch, view)
    for name, block in (("target_block", target_block), ("context_block", context_block)):
        most = [side - 1 if upstream else side for side in grid]
        if not all(1 <= size <= side for size, side in zip(block, most, strict=True)):
            raise ValueError(f"{name} must be from 1 × 1 to {most[0]} × {most[1]}, got {block[0]} × {block[1]}")
    backend = _backends.serve("multiblock_mask", samples, "cuda", why_not)
    function = (
        reference.multiblock_mask if backend == "reference" else functools.partial(_library.call, "multiblock_mask")
    )
    blocks = (list(grid), targets, list(target_block), list(context_block))
    return function(samples, *blocks, kept, min_keep, allow_overlap, upstream, seed, epoch, view)
