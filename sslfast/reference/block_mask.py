"""Masks made of blocks in NumPy: the same bits as the kernels'."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .._random.streams import stream_of
from .philox import exponential
from .random_mask import Array, mask_words

ATTEMPTS = 2**15  # blocks of a stream; the keys of the completion take the other half
AT_ONCE = 64  # attempts whose numbers are drawn together


def block_mask(
    samples: Array,
    counts: Array,
    grid: Sequence[int],
    *,
    area: tuple[float, float],
    log_aspect: tuple[float, float],
    tries: int = 10,
    complete: bool = False,
    seed: int = 0,
    epoch: int = 0,
    view: int = 0,
) -> Array:
    """[B, height · width] bool: see ``sslfast.ops.block_mask``."""
    height, width = grid
    masks = np.zeros((len(samples), height, width), dtype=bool)
    key = {"stream": stream_of("block_mask", view), "seed": seed, "epoch": epoch}
    for mask, sample, wanted in zip(masks, samples.reshape(-1, 1), counts.tolist(), strict=True):
        units = np.empty((0, 4))
        attempt, masked, failed = 0, 0, 0
        while masked < wanted and failed < tries and attempt < ATTEMPTS:
            if attempt == len(units):
                words = mask_words(sample, attempt, 4 * AT_ONCE, **key).reshape(-1, 4)
                units = np.concatenate([units, words.astype(np.float64) * 2.0**-32])
            u = units[attempt].tolist()
            attempt, failed = attempt + 1, failed + 1
            limit = min(area[1], wanted - masked)
            target = area[0] + (limit - area[0]) * u[0]
            aspect = exponential(log_aspect[0] + (log_aspect[1] - log_aspect[0]) * u[1])
            h, w = float(np.rint(math.sqrt(target * aspect))), float(np.rint(math.sqrt(target / aspect)))
            if h < 1 or w < 1 or h >= height or w >= width:
                continue
            top, left = int((height - h + 1) * u[2]), int((width - w + 1) * u[3])
            block = mask[top : top + int(h), left : left + int(w)]
            added = block.size - int(block.sum())
            if 0 < added <= limit:
                block[:] = True
                masked, failed = masked + added, 0
        missing = int(wanted) - masked
        if complete and missing > 0:
            flat = mask.reshape(-1)
            keys = mask_words(sample, ATTEMPTS, flat.size, **key)[0]
            free = np.flatnonzero(~flat)
            flat[free[np.argsort(keys[free], kind="stable")[:missing]]] = True
    return masks.reshape(len(samples), height * width)
