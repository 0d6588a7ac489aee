"""The largest dot products of q [M, D] with k [N, D], biased or not, and their columns, without the M × N matrix.

A similarity and its column make one 64-bit key, whose order is the order of neighbours: the float's bits, turned so
that integers compare as the numbers do, and below them the column, counted down. Keys are all different, so the largest
ones are the same whatever the order in which they are compared; NaN is above all numbers, −inf stands for none.

One neighbour: a program takes one block of rows and a run of tiles with a running maximum; the largest key over the
runs is the result. Several: the keys of a band of rows are stored, and PyTorch's ``topk`` takes the largest of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import architecture, dot_precision, multiprocessors, upcast
from ._configs import NEAREST_NEIGHBOURS, config_for
from ._tiles import EXACT, block_ranges, contiguous, dot_products, load_rows, overlap, padded

# Programs wanted in a launch for each multiprocessor, so that the last wave is a small part of the time.
PROGRAMS = 8
BAND_BYTES = 256 * 2**20  # of keys, unless one block of rows has more
MOST = tl.constexpr(0x7FFFFFFF)
NOTHING = tl.constexpr(-2139095041)  # the order of −inf


@triton.jit
def _order(x):
    """float32 as int32 of the same order: −0 is 0, NaN is above +inf."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, MOST, tl.where(bits < 0, bits ^ MOST, bits))


@triton.jit
def _key(order, cols):
    """The smaller of two columns has the larger key."""
    return (order.to(tl.int64) << 32) | (cols ^ MOST).to(tl.int64)


@triton.jit(do_not_specialize=["M", "N", "first_block", "run_length"])
def _nearest_neighbours_kernel(
    Q,  # [M, D]
    K,  # [N, D]
    Bias,  # [N] float32, or None
    RowIds,  # [M] or None
    ColIds,  # [N], with RowIds
    ColRanges,  # [4, tiles], with RowIds
    Best,  # [runs, M]: the largest key of each run of tiles, or None
    Keys,  # [band, N]: all keys of the band's rows, or None
    M,
    N,
    first_block,
    run_length,
    ITSELF: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program (b, r): rows of block ``first_block + b`` against the r-th run of ``run_length`` tiles of columns.

    ITSELF: k is q, no row is its own neighbour, and the bias is added for the row too.
    """
    run = tl.program_id(1)
    row0 = (first_block + tl.program_id(0)) * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    qi = load_rows(Q, rows, 0, M, D, BLOCK_K, UPCAST)
    top = tl.full((BLOCK_M,), NOTHING, tl.int32)
    place = tl.zeros((BLOCK_M,), tl.int32)
    tiles = tl.cdiv(N, BLOCK_N)
    for tile in range(run * run_length, tl.minimum((run + 1) * run_length, tiles)):
        col0 = tile * BLOCK_N
        cols = col0 + tl.arange(0, BLOCK_N)
        kj = load_rows(K, cols, 0, N, D, BLOCK_K, UPCAST)
        x = dot_products(qi, kj, Q, K, rows, cols, M, N, D, BLOCK_K, PRECISION, UPCAST)
        if Bias is not None:
            added = tl.load(Bias + tl.minimum(cols, N - 1))[None, :]
            if ITSELF:
                added = tl.load(Bias + tl.minimum(rows, M - 1))[:, None] + added
            x += added
        masked = col0 + BLOCK_N > N
        if ITSELF:
            masked |= overlap(row0, BLOCK_M, col0, BLOCK_N)
        if RowIds is not None:
            row_ids = tl.load(RowIds + tl.minimum(rows, M - 1))
            meets = (tl.min(row_ids, 0) <= tl.load(ColRanges + tiles + tile)) & (
                tl.max(row_ids, 0) >= tl.load(ColRanges + tile)
            )
            masked |= meets
        if masked:
            keep = cols[None, :] < N
            if ITSELF:
                keep = keep & (rows[:, None] != cols[None, :])
            if RowIds is not None:
                col_ids = tl.load(ColIds + tl.minimum(cols, N - 1))
                keep = keep & (row_ids[:, None] != col_ids[None, :])
            x = tl.where(keep, x, float("-inf"))
        order = _order(x)
        if Keys is not None:
            at = (rows - first_block * BLOCK_M).to(tl.int64)[:, None] * N + cols[None, :]
            inside = (rows[:, None] < M) & (cols[None, :] < N)
            tl.store(Keys + at, _key(order, cols[None, :]), mask=inside)
        else:
            largest = tl.max(order, 1)
            first = tl.min(tl.where(order == largest[:, None], cols[None, :], MOST), 1)
            place = tl.where(largest > top, first, place)  # of equals the earlier one stays
            top = tl.maximum(top, largest)
    if Best is not None:
        tl.store(Best + run.to(tl.int64) * M + rows, _key(top, place), mask=rows < M)


def _decoded(key: Tensor) -> tuple[Tensor, Tensor]:
    """The similarities and the columns of keys; −inf and −1 for none."""
    order = (key >> 32).to(torch.int32)
    similarity = torch.where(order < 0, order ^ MOST.value, order).view(torch.float32)
    return similarity, torch.where(order == NOTHING.value, -1, (key & 0xFFFFFFFF) ^ MOST.value)


def nearest_neighbours(
    q: Tensor, k: Tensor | None, bias: Tensor | None, row_ids: Tensor | None, col_ids: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    """The largest similarities and their columns, [M, count] each, the largest first.

    Args:
        q: [M, D]; k: [N, D], or ``None`` for the rows of q, each without itself; float32, bfloat16 or float16.
        bias: [N] float32, or ``None``.
        row_ids, col_ids: [M], [N] int64; without k the rows' count.
    """
    itself = k is None
    q = padded(q.contiguous())
    k = q if k is None else padded(k.contiguous())
    bias = None if bias is None else bias.contiguous()
    row_ids, col_ids = contiguous(row_ids, row_ids if itself else col_ids)
    (m, d), n = q.shape, k.shape[0]
    config = config_for(NEAREST_NEIGHBOURS, architecture(q), q.element_size(), d)
    blocks, tiles = triton.cdiv(m, config.block_m), triton.cdiv(n, config.block_n)
    band = blocks if count == 1 else min(blocks, max(1, BAND_BYTES // (8 * n * config.block_m)))
    run_length = min(max(1, band * tiles // (PROGRAMS * multiprocessors(q))), tiles)
    runs = triton.cdiv(tiles, run_length)
    best = q.new_empty((runs, m), dtype=torch.int64) if count == 1 else None
    found = []
    with torch.cuda.device_of(q):
        ranges = None if row_ids is None else block_ranges(col_ids, None, 0, config.block_n)
        for first in range(0, blocks, band):
            present = min(band, blocks - first)
            rows = min(present * config.block_m, m - first * config.block_m)
            keys = q.new_empty((rows, n), dtype=torch.int64) if best is None else None
            _nearest_neighbours_kernel[(present, runs)](
                q, k, bias, row_ids, col_ids, ranges, best, keys, m, n, first, run_length,
                ITSELF=itself, D=d, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
                PRECISION=dot_precision(q.dtype), UPCAST=upcast(q.dtype),
                num_warps=config.num_warps, num_stages=config.num_stages, **EXACT,
            )  # fmt: skip
            if keys is not None:
                found.append(keys.topk(count, dim=1).values)
    return _decoded(torch.cat(found) if best is None else best.amax(0)[:, None])
