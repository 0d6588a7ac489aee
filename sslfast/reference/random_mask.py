"""Random masks in NumPy: the same bits as the kernels'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._random.streams import stream_of
from .philox import LOW, philox4x32

Array = np.ndarray[Any, np.dtype[Any]]


def mask_words(
    samples: Array, first_block: int, count: int, *, stream: int, seed: int, epoch: int
) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """[B, count] random words: word i of a sample is word i mod 4 of its block ``first_block`` + ⌊i / 4⌋."""
    ids = np.asarray(samples).astype(np.uint64)[:, None]
    block = np.arange(first_block, first_block + -(-count // 4))[None] | stream << 16
    words = philox4x32((block, epoch, ids & LOW, ids >> np.uint64(32)), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    shape = (len(ids), block.shape[1])
    return np.stack([np.broadcast_to(word, shape) for word in words], 2).reshape(len(ids), 4 * shape[1])[:, :count]


def random_mask(
    samples: Array,
    grid: Sequence[int],
    kept: int,
    *,
    unit: Sequence[int] = (1, 1, 1),
    noise: Array | None = None,
    ascending: bool = True,
    seed: int = 0,
    epoch: int = 0,
    view: int = 0,
) -> tuple[Array, Array, Array]:
    """ids of kept and masked cells and where each cell went: see ``sslfast.ops.random_mask``."""
    (t, h, w), (ut, uh, uw) = grid, unit
    # [units, cells of a unit]: axes (time, inside a unit, height, inside, width, inside) brought into that order.
    cells = np.arange(t * h * w).reshape(t // ut, ut, h // uh, uh, w // uw, uw).transpose(0, 2, 4, 1, 3, 5)
    cells = cells.reshape(-1, ut * uh * uw)
    if noise is None:
        keys: Array = mask_words(samples, 0, len(cells), stream=stream_of("random_mask", view), seed=seed, epoch=epoch)
    else:
        keys = noise
    order = np.argsort(keys, axis=1, kind="stable")
    ids = cells[order].reshape(len(samples), cells.size)
    keep, masked = np.split(ids, [kept * cells.shape[1]], axis=1)
    if ascending:
        keep, masked = np.sort(keep, axis=1), np.sort(masked, axis=1)
    restore = np.argsort(np.concatenate([keep, masked], axis=1), axis=1)
    return keep, masked, restore
