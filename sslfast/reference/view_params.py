"""The drawing of view parameters in NumPy: the same bits as the kernels'."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from .philox import LOW, exponential, philox4x32

ATTEMPTS = 10


def _box(
    blocks: Iterator[tuple[float, ...]], scale: Sequence[float], log_ratio: Sequence[float], height: int, width: int
) -> tuple[int, int, int, int]:
    """Torchvision's ``RandomResizedCrop.get_params``; scale (0, 0) is the whole image."""
    if scale[0] <= 0:
        return 0, 0, height, width
    for area, log, top, left in blocks:
        target = float(height) * float(width) * (scale[0] + (scale[1] - scale[0]) * area)
        ratio = exponential(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * log)
        w, h = int(np.rint(math.sqrt(target * ratio))), int(np.rint(math.sqrt(target / ratio)))
        if 0 < w <= width and 0 < h <= height:
            return int((height - h + 1) * top), int((width - w + 1) * left), h, w
    ratio, low, high = width / height, exponential(log_ratio[0]), exponential(log_ratio[1])
    h = int(np.rint(width / low)) if ratio < low else height
    w = int(np.rint(height * high)) if ratio > high else width
    h, w = min(max(h, 1), height), min(max(w, 1), width)
    return (height - h) // 2, (width - w) // 2, h, w


def view_params(
    ids: Tensor,
    size: tuple[int, int] | Tensor,
    numbers: Sequence[Sequence[float]],
    *,
    seed: int = 0,
    epoch: int = 0,
    view: int = 0,
) -> Tensor:
    """[V, B, 16] float32: see ``sslfast.ops.view_params``.

    Blocks of four words: 0: coins of flip, jitter, grey, blur; 1: coin of solarize, sigma, order; 2: the factors;
    3 … 12: attempts at a crop (area, ratio, top, left).
    """
    samples = ids.cpu().numpy().astype(np.uint64)
    sizes = size.cpu().tolist() if isinstance(size, Tensor) else [size] * len(samples)
    key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    rows = np.empty((len(numbers), len(samples), 16), dtype=np.float64)
    for v, spec in enumerate(numbers):
        scale, log_ratio, (flip_p, jitter_p), factors = spec[0:2], spec[2:4], spec[4:6], spec[6:14]
        used, (shuffle, grey_p, blur_p, sigma_low, sigma_high, solarize_p) = spec[14:18], spec[18:24]
        blocks = np.stack(
            [
                philox4x32((block | view + v << 16, epoch, samples & LOW, samples >> np.uint64(32)), key)
                for block in range(3 + ATTEMPTS)
            ]
        )  # [blocks, 4, B]
        units = blocks.astype(np.float64) * 2.0**-32
        for b, (height, width) in enumerate(sizes):
            coins, shape, draws = units[0, :, b], units[1, :, b], units[2, :, b]
            box = _box((tuple(block) for block in units[3:, :, b].tolist()), scale, log_ratio, height, width)
            left, order, code = [0, 1, 2, 3], [], int(24 * shape[2])
            for weight in (6, 2, 1, 1):  # the order from its Lehmer code
                pick = code // weight if shuffle and len(left) > 1 else 0
                code -= pick * weight
                order.append(left.pop(pick))
            order = [op for op in order if used[op]] if coins[1] < jitter_p else []
            rows[v, b] = (
                *box,
                coins[0] < flip_p,
                *(factors[2 * f] + (factors[2 * f + 1] - factors[2 * f]) * draws[f] for f in range(4)),
                *(order + [-1] * 4)[:4],
                coins[2] < grey_p,
                sigma_low + (sigma_high - sigma_low) * shape[1] if coins[3] < blur_p else 0.0,
                shape[0] < solarize_p,
            )
    return torch.from_numpy(rows.astype(np.float32)).to(ids.device)
