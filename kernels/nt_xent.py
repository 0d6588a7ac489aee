"""NT-Xent on rows ``z = [z0; z1]`` [M = 2N, D] without the M × M matrix.

    s_ij = z_i·z_j / τ · log2 e  (j ≠ i),   p(i) = (i + N) mod M,   P_ij = 2^(s_ij − max_i) / sum_i
    loss = mean_i ln 2 · ((max_i − s_ip) + log2 sum_i),   max_i = max_j s_ij,   sum_i = Σ_j 2^(s_ij − max_i)
    W_ij = (g / M)(P_ij + P_ji − 2·[j = p(i)]),   dz = W z / τ,   dτ = −Σ_i z_i·dz_i / (2τ)
    1 − P_ip = Σ_{j ≠ p} P_ij, summed apart from the positive: loss and W stay exact where P_ip is nearly 1

That of dτ is Euler's identity: the loss depends on z zᵀ/τ alone.

Forward: S is symmetric, so only tiles on and above the diagonal are computed; a tile above it serves its rows and its
columns, which halves the products. Row blocks are taken a band at a time: every tile writes the (max, sum) of its
columns into a small buffer, every program those of its rows, without the positives; a second kernel merges both and the
positives in a fixed order. There are no atomics: the result is the same in every run.

Where |s| ≤ PLAIN_LIMIT for all pairs, by the norms of the rows, sums are relative to 0 in place of the maximum.

Backward: a program owns rows of dz and streams over the columns, recomputing S; or by bands (``_gradient_forms.py``).

Rounding: s_ij is one number wherever it is used (``_tiles.py``), so that s_ip cancels against an equal maximum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import architecture, launch_options, multiprocessors
from ._configs import NT_XENT_FORWARD, config_for
from ._tiles import (
    BOUND_FROM,
    EXACT,
    LN2,
    LOG2E,
    PLAIN_LIMIT,
    accumulate,
    accumulate_bounded,
    dot_products,
    finite_or_zero,
    fold,
    largest_norm,
    load_rows,
    log1p,
    overlap,
    padded,
)
from .nt_xent_backward import nt_xent_backward

__all__ = ["nt_xent_backward", "nt_xent_forward"]

# Row blocks of one band. Column partials take 8 bytes for each row of z and block of the band: COLUMN_BYTES in all, or
# 512 bytes a row (BAND blocks; as much as float32 rows of 128 features). Row partials take 8·band·block_m·runs with
# runs = blocks / run length, a few MiB. So memory is O(M), where the matrix takes 4·M². One band serves all of
# M ≤ 32,768 rows; beyond that each band is two launches.
BAND = 64
COLUMN_BYTES = 64 * 2**20
# The forward makes its runs of tiles as long as FORWARD_PROGRAMS for each multiprocessor allow, so that the last wave
# is a small part of the time.
FORWARD_PROGRAMS = 8
MERGE_ROWS = 32


@triton.jit(do_not_specialize=["M", "first_block", "run_length"])
def _nt_xent_forward_kernel(
    Z,  # [M, D]
    Temperature,  # []
    Norm,  # []: the largest norm of a row, or None: the maxima are taken in any case
    RowPartial,  # [2, runs, band·BLOCK_M]: maxima, then sums, of each run of tiles
    ColPartial,  # [2, band, M]: maxima, then sums, over the rows of each row block of the band
    Positive,  # [M]: s_ip
    M,
    first_block,
    run_length,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BOUNDED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (b, r): rows of block ``first_block + b`` against the r-th run of ``run_length`` blocks of columns.

    A block is BLOCK_M rows or columns; it is crossed in tiles of BLOCK_N columns. With Norm, only one of the kernels
    BOUNDED and not BOUNDED does anything: which one is known on the device alone, and the former takes half of the
    latter's registers.
    """
    band, runs = tl.num_programs(0), tl.num_programs(1)
    block = first_block + tl.program_id(0)
    begin = first_block + tl.program_id(1) * run_length
    end = (begin + run_length) * BLOCK_M
    begin = tl.maximum(begin, block) * BLOCK_M
    if begin >= end:  # the whole run lies below the diagonal
        return
    N = M // 2
    scale = tl.full((), LOG2E, tl.float32) / tl.load(Temperature)
    row0 = block * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    partner = tl.where(rows < N, rows + N, rows - N)
    zi = load_rows(Z, rows, 0, M, D, BLOCK_K, UPCAST)
    if Norm is not None:  # by Cauchy–Schwarz, with room for rounding; NaN is not bounded
        norm = tl.load(Norm)
        bounded = norm * norm * tl.abs(scale) < 0.99 * PLAIN_LIMIT
        if (bounded == 0) if BOUNDED else bounded:
            return
    top = tl.full((BLOCK_M,), 0.0 if BOUNDED else float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for col0 in range(begin, tl.minimum(end, M), BLOCK_N):
        cols = col0 + tl.arange(0, BLOCK_N)
        zj = load_rows(Z, cols, 0, M, D, BLOCK_K, UPCAST)
        s = dot_products(zi, zj, Z, Z, rows, cols, M, M, D, BLOCK_K, PRECISION, UPCAST) * scale

        # Only tiles of the diagonal block, on the line of positives j − i = N and at the ragged edge need masks. Rows
        # are ragged in the last block alone, which meets no other block than itself.
        above = col0 >= row0 + BLOCK_M
        if (above == 0) | overlap(row0 + N, BLOCK_M, col0, BLOCK_N) | (col0 + BLOCK_N > M):
            chosen = tl.where(cols[None, :] == partner[:, None], s, 0.0)
            here = (partner >= col0) & (partner < col0 + BLOCK_N) & (rows < M)
            tl.store(Positive + rows, tl.sum(chosen, 1), mask=here)
            # Above the diagonal the same entry is the positive of its column too.
            mate = cols - N
            here = (mate >= row0) & (mate < row0 + BLOCK_M) & (cols < M) & above
            tl.store(Positive + cols, tl.sum(chosen, 0), mask=here)
            others = (rows[:, None] != cols[None, :]) & (partner[:, None] != cols[None, :])
            s = tl.where(others & (cols[None, :] < M), s, float("-inf"))

        if BOUNDED:
            total, col_total = accumulate_bounded(total, s)
            col_top = tl.zeros((BLOCK_N,), tl.float32)
        else:
            top, total = accumulate(top, total, s)
            col_top = tl.max(s, 0)
            col_total = tl.sum(tl.exp2(s - finite_or_zero(col_top)[None, :]), 0)
        # The diagonal block holds both (i, j) and (j, i), so its rows are enough.
        at = ColPartial + tl.program_id(0).to(tl.int64) * M + cols
        tl.store(at, col_top, mask=(cols < M) & above)
        tl.store(at + band.to(tl.int64) * M, col_total, mask=(cols < M) & above)
    at = RowPartial + (tl.program_id(1) * band + tl.program_id(0)).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(at, top)
    tl.store(at + runs.to(tl.int64) * band * BLOCK_M, total)


@triton.jit(do_not_specialize=["M", "first_block", "band", "runs", "run_length"])
def _nt_xent_merge_kernel(
    RowPartial,  # [2, runs, band·BLOCK]
    ColPartial,  # [2, band, M]
    Positive,  # [M]
    RowMax,  # [M], running over the bands
    RowSum,  # [M], running over the bands
    RowRest,  # [M]: 1 − P_ip, the share of all others; written, as the loss, when the row's own band is done
    RowLoss,  # [M]
    M,
    first_block,
    band,
    runs,
    run_length,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """ROWS rows of block J: column partials of the band's row blocks before J, and row partials if J is in the band."""
    start = first_block * BLOCK + tl.program_id(0) * ROWS
    rows = start + tl.arange(0, ROWS)
    parts = tl.arange(0, PARTS)
    before = start // BLOCK - first_block  # row blocks of the band above J
    own = before < band
    seen = (rows < M) & (first_block > 0)
    top = tl.load(RowMax + rows, mask=seen, other=float("-inf"))
    total = tl.load(RowSum + rows, mask=seen, other=0.0)

    plane = band.to(tl.int64) * M
    count = tl.minimum(before, band)
    for first in range(0, count, PARTS):
        part = (first + parts)[:, None]
        inside = (part < count) & (rows[None, :] < M)
        top, total = fold(top, total, ColPartial, part.to(tl.int64) * M + rows[None, :], plane, inside)

    plane = runs.to(tl.int64) * band * BLOCK
    for first in range(before // run_length, tl.where(own, runs, 0), PARTS):
        part = (first + parts)[:, None]
        offsets = part.to(tl.int64) * band * BLOCK + (rows - first_block * BLOCK)[None, :]
        top, total = fold(top, total, RowPartial, offsets, plane, (part < runs) & (rows[None, :] < M))

    # The positive comes in last, apart from the sum of the others: loss = log(1 + sum·2^(max − s_ip)) then keeps its
    # relative accuracy where the positive dominates.
    done = own & (rows < M)
    positive = tl.load(Positive + rows, mask=done, other=0.0)
    beyond = top - positive
    less, more = tl.exp2(tl.minimum(beyond, 0.0)), tl.exp2(-tl.maximum(beyond, 0.0))
    near = log1p(total * less)
    far = (beyond + tl.log2(tl.where(done, total + more, 1.0))) * LN2
    loss = tl.where(beyond > 0, far, near)
    best, whole = tl.maximum(top, positive), total * less + more
    # An infinite logit makes its row's loss and gradient NaN, as in torch's log_softmax.
    bad = (positive != positive) | (best == float("inf")) | (whole == float("inf"))
    loss, whole = tl.where(bad, float("nan"), loss), tl.where(bad, float("nan"), whole)
    tl.store(RowLoss + rows, loss, mask=done)
    tl.store(RowRest + rows, total * less / tl.where(done, whole, 1.0), mask=done)
    tl.store(RowMax + rows, tl.where(done, best, top), mask=rows < M)
    tl.store(RowSum + rows, tl.where(done, whole, total), mask=rows < M)


def nt_xent_forward(z: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and row statistics.

    Args:
        z: [M, D] contiguous; rows i and i + M/2 are the two views of an image; float32, bfloat16 or float16.
        temperature: [] float32 on ``z``'s device, read there.

    Returns:
        loss [], row_max [M], row_sum [M], row_rest [M]: float32, base 2; row_max is the maximum (where the logits are
        known to need none: the larger of 0 and the positive's), the sum is relative to it, and row_rest is 1 − P_ip.
    """
    z = padded(z)
    m, d = z.shape
    config = config_for(NT_XENT_FORWARD, architecture(z), z.element_size(), d)
    block = config.block_m
    blocks = triton.cdiv(m, block)
    row_max, row_sum, row_rest, row_loss, positive = (z.new_empty(m, dtype=torch.float32) for _ in range(5))
    norm = largest_norm(z) if m * m >= BOUND_FROM else None
    most = min(blocks, max(BAND, COLUMN_BYTES // (8 * m)))
    col_partial = z.new_empty((2, most, m), dtype=torch.float32)
    programs = FORWARD_PROGRAMS * multiprocessors(z)
    with torch.cuda.device_of(z):
        for first in range(0, blocks, most):
            left = blocks - first
            band = min(most, left)
            tiles = band * left - band * (band - 1) // 2
            run_length = min(max(1, tiles // programs), left)
            runs = triton.cdiv(left, run_length)
            row_partial = z.new_empty((2, runs, band * block), dtype=torch.float32)
            for bounded in (True, False) if norm is not None else (False,):
                _nt_xent_forward_kernel[(band, runs)](
                    z, temperature, norm, row_partial, col_partial, positive, m, first, run_length,
                    BOUNDED=bounded, **launch_options(config, z), **EXACT,
                )  # fmt: skip
            _nt_xent_merge_kernel[(triton.cdiv(m - first * block, MERGE_ROWS),)](
                row_partial, col_partial, positive, row_max, row_sum, row_rest, row_loss, m, first, band, runs,
                run_length,
                BLOCK=block, ROWS=MERGE_ROWS, PARTS=64, num_warps=4, **EXACT,
            )  # fmt: skip
    return row_loss.mean(), row_max, row_sum, row_rest
