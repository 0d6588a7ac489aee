"""Gram anchoring by bands: differences of two Gram matrices [P, P] of each image, a bounded part of them at a time.

    D_ij = f(x_i·x_j) − h(y_i·y_j),   loss = Σ D²/(B P²),   W_ij = D_ij f'(x_i·x_j),   dx = 4/(B P²) W x

A program computes a tile of both products and writes W and the tile's Σ D²; the library multiplies W x. A band is as
many images as fit into BAND_BYTES, or rows of one image. Where it holds whole images W is symmetric: tiles below the
diagonal are copied from above, which halves the products. There are no atomics: the result is the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import architecture, dot_precision, upcast
from ._configs import GRAM_ANCHOR, config_for
from ._tiles import padded, wide_products
from .second_moment import multiply

BAND_BYTES = 64 * 2**20


@triton.jit(do_not_specialize=["P", "first_row", "height"])
def _gram_anchor_kernel(
    X,  # [B, P, D]
    Y,  # [B, P, D]
    Weights,  # [B, height, P] or None: W of rows from first_row on
    Sums,  # [B, tiles] float64: Σ D² of a tile
    P,
    first_row,
    height,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NEGATIVES: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program (t, b): tile t of image b; BLOCK_M = BLOCK_N if SYMMETRIC, and the band then is all of the rows."""
    across = tl.cdiv(P, BLOCK_N)
    tile, image = tl.program_id(0), tl.program_id(1)
    i, j = tile // across, tile % across
    if SYMMETRIC & (j < i):
        tl.store(Sums + image * tl.num_programs(0) + tile + tl.arange(0, 1), tl.zeros((1,), tl.float64))
        return
    rows, cols = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
    x, y = X + tl.cast(image, tl.int64) * P * D, Y + tl.cast(image, tl.int64) * P * D
    s = wide_products(x, x, first_row + rows, cols, P, P, D, BLOCK_K, PRECISION, UPCAST)
    t = wide_products(y, y, first_row + rows, cols, P, P, D, BLOCK_K, PRECISION, UPCAST)
    # Comparisons are written so that a NaN stays one.
    d = (tl.where(s < 0, 0.0, s) if NEGATIVES == 1 else s) - (tl.where(t < 0, 0.0, t) if NEGATIVES > 0 else t)
    inside = (rows[:, None] < height) & (cols[None, :] < P)
    d = tl.where(inside, d, 0.0)
    squares = d * d
    if SYMMETRIC & (i < j):
        squares = 2.0 * squares
    total = tl.sum(tl.reshape(tl.sum(squares, 1).to(tl.float64), (1, BLOCK_M)), 1)
    tl.store(Sums + image * tl.num_programs(0) + tile + tl.arange(0, 1), total)
    if Weights is not None:
        w = tl.where(s < 0, 0.0, d) if NEGATIVES == 1 else d
        w = w.to(Weights.dtype.element_ty)
        at = Weights + tl.cast(image, tl.int64) * height * P
        tl.store(at + rows[:, None].to(tl.int64) * P + cols[None, :], w, mask=inside)
        if SYMMETRIC & (i < j):
            tl.store(at + cols[None, :].to(tl.int64) * P + rows[:, None], w, mask=inside)


def gram_anchor(x: Tensor, y: Tensor, negatives: int, gradient: bool) -> tuple[Tensor, Tensor]:
    """The loss of x, y [B, P, D] float32 or 16-bit, and its gradient with respect to ``x``.

    Args:
        negatives: 0 keeps negative products, 1 clamps both at 0, 2 the teacher's.

    Returns:
        loss [] and dx [B, P, D], float32; without ``gradient`` dx has no images.
    """
    images, p, features = x.shape
    x, y = (padded(t.flatten(0, 1)).view(images, p, -1) for t in (x, y))
    width = x.shape[2]
    config = config_for(GRAM_ANCHOR, architecture(x), x.element_size(), width)
    most = max(1, BAND_BYTES // (p * x.element_size()))  # rows of a band
    whole = most >= p
    count, height = (min(images, most // p), p) if whole else (1, min(p, most))
    dx = x.new_empty((images if gradient else 0, p, width), dtype=torch.float32)
    weights = x.new_empty((count, height, p)) if gradient else None
    sums = []
    with torch.cuda.device_of(x):
        for image in range(0, images, count):
            some = min(count, images - image)
            for row in range(0, p, height):
                rows = min(height, p - row)
                tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(p, config.block_n)
                part = x.new_empty((some, tiles), dtype=torch.float64)
                w = None if weights is None else weights.view(-1)[: some * rows * p].view(some, rows, p)
                _gram_anchor_kernel[(tiles, some)](
                    x[image:], y[image:], w, part, p, row, rows,
                    D=width, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
                    NEGATIVES=negatives, SYMMETRIC=whole, PRECISION=dot_precision(x.dtype), UPCAST=upcast(x.dtype),
                    num_warps=config.num_warps, num_stages=config.num_stages,
                )  # fmt: skip
                sums.append(part.sum())
                if w is not None:
                    dx[image : image + some, row : row + rows] = multiply(w, x[image : image + some])
    entries = images * p * p
    loss = (torch.stack(sums).sum() / entries).to(torch.float32)
    dx.mul_(4 / entries)
    return loss, dx[..., :features].contiguous()
