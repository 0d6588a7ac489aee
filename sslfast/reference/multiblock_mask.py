"""I-JEPA's multi-block masks in NumPy: the same bits as the kernels'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._random.streams import stream_of
from .philox import LOW, philox4x32

Array = np.ndarray[Any, Any]
TRIES = 20


def multiblock_arrays(
    samples: Array,
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
) -> tuple[Array, Array, Array]:
    """Context [B, kept], targets [T, B, h·w], and the contexts' own sizes [B]; see ``sslfast.ops.multiblock_mask``.

    Words 0 and 1 of block t: the corner of target t; of block 1024 + n: of the context at attempt n; word l%4 of block
    2^15 + l/4: the key of patch l.
    """
    height, width = grid
    number = np.arange(height * width).reshape(height, width)  # of each patch
    context = np.full((len(samples), kept), -1, dtype=np.int64)
    target = np.empty((targets, len(samples), target_block[0] * target_block[1]), dtype=np.int64)
    counts = np.empty(len(samples), dtype=np.int64)

    def draw(sample: np.uint64, block: Any) -> tuple[Array, ...]:
        counter = (block | stream_of("multiblock_mask", view) << 16, epoch, sample & LOW, sample >> np.uint64(32))
        return philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))

    def place(sample: np.uint64, block: int, size: Sequence[int]) -> Array:
        """A block's patches."""
        last = [grid[d] - size[d] + (0 if upstream else 1) for d in (0, 1)]
        top, left = (int(word) * last[d] >> 32 for d, word in enumerate(draw(sample, block)[:2]))
        return number[top : top + size[0], left : left + size[1]].reshape(-1)

    for b, sample in enumerate(samples.astype(np.int64).view(np.uint64)):
        for t in range(targets):
            target[t, b] = place(sample, t, target_block)
        best: list[int] | None = None
        best_forbidden: set[int] = set()
        for n in range(TRIES * (targets + 1) if upstream else TRIES):
            avoided = 0 if allow_overlap else max(0, targets - n // TRIES) if upstream else targets
            forbidden = set(target[:avoided, b].reshape(-1).tolist())
            found = [patch for patch in place(sample, 1024 + n, context_block).tolist() if patch not in forbidden]
            if best is None or len(found) > len(best):
                best, best_forbidden = found, forbidden
            if len(best) > min_keep or (len(best) == min_keep and not upstream):
                break
        assert best is not None
        counts[b] = len(best)
        # The context's own patches come first, then those outside its block and all targets, each at random.
        keys = np.stack(draw(sample, 2**15 + np.arange(-(-number.size // 4))), 1).reshape(-1)
        keys = np.zeros_like(keys) if upstream else keys
        inside = set(best)
        allowed = [patch for patch in range(number.size) if patch not in best_forbidden]
        allowed.sort(key=lambda patch: (patch not in inside, int(keys[patch]), patch))  # noqa: B023 (sorted at once)
        chosen = sorted(allowed[:kept])
        context[b, : len(chosen)] = chosen
    return context, target, counts


def multiblock_mask(samples: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``multiblock_arrays`` of a tensor."""
    context, target, counts = (torch.from_numpy(a) for a in multiblock_arrays(samples.cpu().numpy(), *rest))
    return context.to(samples.device), target.to(samples.device), counts.to(samples.device)
