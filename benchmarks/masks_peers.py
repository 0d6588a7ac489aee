"""The block masks of BEiT and DINOv2 as plain Python over NumPy: what the public generators do, patch by patch.

Written from the published algorithm (microsoft/unilm ``beit/masking_generator.py``, facebookresearch/dinov2
``dinov2/data/masking.py``, bytedance/ibot ``loader.py``), with Python's own random numbers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

Mask = np.ndarray[Any, np.dtype[np.bool_]]
LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
TRIES = 10


def _add_block(mask: Mask, least: float, limit: float) -> int:
    """One block by at most ten attempts; how many patches it added."""
    height, width = mask.shape
    for _ in range(TRIES):
        area, aspect = random.uniform(least, limit), math.exp(random.uniform(*LOG_ASPECT))
        h, w = int(round(math.sqrt(area * aspect))), int(round(math.sqrt(area / aspect)))
        if w >= width or h >= height:
            continue
        top, left = random.randint(0, height - h), random.randint(0, width - w)
        masked = mask[top : top + h, left : left + w].sum()
        added = 0
        if 0 < h * w - masked <= limit:
            for i in range(top, top + h):
                for j in range(left, left + w):
                    if mask[i, j] == 0:
                        mask[i, j] = 1
                        added += 1
        if added > 0:
            return added
    return 0


def block_mask(grid: tuple[int, int], count: float, least: float, most: float) -> Mask:
    """[height, width] bool: blocks until ``count`` patches are masked or no attempt succeeds."""
    mask = np.zeros(grid, dtype=bool)
    masked = 0
    while masked < count:
        added = _add_block(mask, least, min(count - masked, most))
        if added == 0:
            break
        masked += added
    return mask


def complete(mask: Mask, count: int) -> Mask:
    """DINOv3's ``complete_mask_randomly``."""
    flat = mask.flatten()
    flat[np.random.choice(np.where(~flat)[0], size=count - flat.sum(), replace=False)] = True
    return flat.reshape(mask.shape)


def beit_masks(count: int, grid: tuple[int, int] = (14, 14), n_masked: int = 75, min_patches: int = 16) -> Mask:
    """[count, height, width]."""
    return np.stack([block_mask(grid, n_masked, min_patches, n_masked) for _ in range(count)])


def dinov2_masks(counts: Sequence[int], grid: tuple[int, int] = (14, 14), *, completed: bool = False) -> Mask:
    """[images, height, width] with at most ``counts`` masked patches each; exactly as many if ``completed``."""
    masks = [block_mask(grid, n, 4, 0.5 * grid[0] * grid[1]) for n in counts]
    return np.stack([complete(mask, n) for mask, n in zip(masks, counts, strict=True)] if completed else masks)


def ibot_masks(shares: Sequence[float], grid: tuple[int, int] = (14, 14)) -> Mask:
    """[images, height, width], each of a share of the patches."""
    patches = grid[0] * grid[1]
    return np.stack([block_mask(grid, s * patches, (min(grid) // 3) ** 2, math.inf) for s in shares])
