"""I-JEPA's multi-block masks of given block sizes: places are drawn per sample, and every context has one length.

Philox4x32-10 keyed by seed, with (block, view, epoch, sample) as its counter: the same sample gets the same masks on
every device, in every batch, worker and rank.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _backends, _library, reference
from . import _devices

BACKENDS = ("cpu", "cuda", "reference")
why_not = functools.partial(_devices.why_not, "multiblock_mask", "samples")
MOST_TARGETS = 256  # as in csrc/common/multiblock_mask.h
MOST_PATCHES = 2**17


def _fake(
    samples: Tensor,
    grid: Sequence[int],
    targets: int,
    target_block: Sequence[int],
    context_block: Sequence[int],
    kept: int,
    min_keep: int,
    allow_overlap: bool,
    upstream: bool,
    seed: int,
    epoch: int,
    view: int,
) -> tuple[Tensor, Tensor, Tensor]:
    count = samples.shape[0]
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
    if not isinstance(samples, Tensor) or samples.dtype != torch.int64 or samples.dim() != 1:
        got = f"{list(samples.shape)} of {samples.dtype}" if isinstance(samples, Tensor) else type(samples).__name__
        raise TypeError(f"samples must be a vector of int64, got {got}")
    patches = grid[0] * grid[1]
    for name, block in (("target_block", target_block), ("context_block", context_block)):
        most = [side - 1 if upstream else side for side in grid]
        if not all(1 <= size <= side for size, side in zip(block, most, strict=True)):
            raise ValueError(f"{name} must be from 1 × 1 to {most[0]} × {most[1]}, got {block[0]} × {block[1]}")
    for name, value, least, largest in (
        ("grid's patches", patches, 1, MOST_PATCHES),
        ("targets", targets, 1, MOST_TARGETS),
        ("kept", kept, 0, patches),
        ("min_keep", min_keep, 0, MOST_PATCHES),
        ("seed", seed, -(2**63), 2**64 - 1),
        ("epoch", epoch, 0, 2**32 - 1),
        ("view", view, 0, 1023),
    ):
        if not least <= value <= largest:
            raise ValueError(f"{name} must be a whole number from {least} to {largest}, got {value}")
    seed = seed - 2**64 if seed >= 2**63 else seed  # as the schema's signed 64 bits
    preferred = "cuda" if samples.device.type == "cuda" else "cpu"
    backend = _backends.select("multiblock_mask", preferred, lambda name: why_not(name, samples))
    function = reference.multiblock_mask if backend == "reference" else torch.ops.sslfast.multiblock_mask.default
    blocks = (list(grid), targets, list(target_block), list(context_block))
    return function(samples, *blocks, kept, min_keep, allow_overlap, upstream, seed, epoch, view)
