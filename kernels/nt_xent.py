"""NT-Xent on rows ``z = [z0; z1]`` [M = 2N, D] without the M × M matrix.

    s_ij = z_i·z_j / τ · log2 e  (j ≠ i),   p(i) = (i + N) mod M,   P_ij = 2^(s_ij − max_i) / sum_i
    loss = mean_i ln 2 · ((max_i − s_ip) + log2 sum_i),   max_i = max_j s_ij,   sum_i = Σ_j 2^(s_ij − max_i)
    W_ij = (g / M)(P_ij + P_ji − 2·[j = p(i)]),   dz = W z / τ,   dτ = −Σ_i z_i·dz_i / (2τ)

The last equation is Euler's identity: the loss depends on z zᵀ/τ alone.

Forward: S is symmetric, so only tiles on and above the diagonal are computed; a tile above it serves its rows and its
columns, which halves the products. Row blocks are taken a band at a time: every tile writes the (max, sum) of its
columns into a small buffer, every program those of its rows, and a second kernel merges both in a fixed order. There
are no atomics: the result is the same in every run.

Backward: a program owns rows of dz and streams over the columns, recomputing S.

Rounding: s_ij is one number wherever it is used (``_tiles.py``), so that s_ip cancels against an equal maximum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import architecture, dot_precision, upcast
from ._nt_xent_configs import BACKWARD, FORWARD, config_for
from ._tiles import EXACT, LN2, LOG2E, accumulate, finite_or_zero, fold, load_rows, overlap, padded, wide_products

# |row_max| up to which 2^s and 2^(−row_max) are both far from float32's limits (2^±126); see the backward kernel.
PLAIN_LIMIT = tl.constexpr(60.0)

# Row blocks of one band. Column partials take 8·BAND bytes a row of z (512: as much as float32 rows of 128 features),
# row partials 8·BAND·block_m·runs with runs = blocks / run length, a few MiB: O(M) in all, where the matrix takes 4·M².
# One band serves M ≤ BAND·block_m rows (8192); beyond that each band is two launches, with up to 64 · M/128 blocks of
# work between them.
BAND = 64
# Programs wanted in a launch, several for each multiprocessor, so that the last wave is a small part of the time. The
# forward makes its runs of tiles as long as that allows; the backward splits the columns of one row block among up to
# MAX_SPLIT programs, whose dz partials take 4·split·M·D ≤ 4·BACKWARD_PROGRAMS·block_m·block_d = 32 MiB for any M and D.
FORWARD_PROGRAMS = 1024
BACKWARD_PROGRAMS = 512
MAX_SPLIT = 8
MERGE_ROWS = 32


@triton.jit(do_not_specialize=["M", "first_block", "run_length"])
def _nt_xent_forward_kernel(
    Z,  # [M, D]
    Temperature,  # []
    RowPartial,  # [2, runs, band·BLOCK_M]: maxima, then sums, of each run of tiles
    ColPartial,  # [2, band, M]: maxima, then sums, over the rows of each row block of the band
    Positive,  # [M]: s_ip
    M,
    first_block,
    run_length,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program (b, r): rows of block ``first_block + b`` against the r-th run of ``run_length`` blocks of columns.

    A block is BLOCK_M rows or columns; it is crossed in tiles of BLOCK_N columns.
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
    if D <= BLOCK_K:
        zi = load_rows(Z, rows, 0, M, D, BLOCK_K, UPCAST)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for col0 in range(begin, tl.minimum(end, M), BLOCK_N):
        cols = col0 + tl.arange(0, BLOCK_N)
        if D <= BLOCK_K:
            zj = load_rows(Z, cols, 0, M, D, BLOCK_K, UPCAST)
            s = tl.dot(zi, tl.trans(zj), input_precision=PRECISION) * scale
        else:
            s = wide_products(Z, Z, rows, cols, M, M, D, BLOCK_K, PRECISION, UPCAST) * scale

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
            s = tl.where((rows[:, None] != cols[None, :]) & (cols[None, :] < M), s, float("-inf"))

        top, total = accumulate(top, total, s)
        # The diagonal block holds both (i, j) and (j, i), so its rows are enough.
        col_top = tl.max(s, 0)
        col_total = tl.sum(tl.exp2(s - finite_or_zero(col_top)[None, :]), 0)
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
    RowLoss,  # [M], written when the row's own band is done
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

    # An infinite logit makes its row's loss and gradient NaN, as in torch's log_softmax.
    total = tl.where(total == float("inf"), float("nan"), total)
    tl.store(RowMax + rows, top, mask=rows < M)
    tl.store(RowSum + rows, total, mask=rows < M)
    done = own & (rows < M)
    positive = tl.load(Positive + rows, mask=done, other=0.0)
    log_sum = tl.log2(tl.where(done, total, 1.0))
    tl.store(RowLoss + rows, ((top - positive) + log_sum) * LN2, mask=done)


@triton.jit(do_not_specialize=["M"])
def _nt_xent_stats_kernel(
    RowMax,  # [M]
    RowSum,  # [M]
    Stats,  # [2, M]: 1/sum, and 2^(−max)/sum
    InRange,  # [blocks]: 1 where |max| ≤ PLAIN_LIMIT in the whole block
    M,
    BLOCK: tl.constexpr,
):
    """What the backward needs of each column, once instead of once a tile."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    top = tl.load(RowMax + rows, mask=rows < M, other=0.0)
    inverse = 1.0 / tl.load(RowSum + rows, mask=rows < M, other=1.0)
    tl.store(Stats + rows, inverse, mask=rows < M)
    tl.store(Stats + M + rows, tl.exp2(-top) * inverse, mask=rows < M)
    tl.store(InRange + tl.program_id(0), tl.min((tl.abs(top) <= PLAIN_LIMIT).to(tl.int32), 0))


@triton.jit(do_not_specialize=["M"])
def _nt_xent_backward_kernel(
    GradLoss,  # []
    Z,  # [M, D]
    Temperature,  # []
    RowMax,  # [M]
    Stats,  # [2, M]
    InRange,  # [cdiv(M, BLOCK_N)]
    DZ,  # [splits, M, D]
    RowDot,  # [splits, chunks, M]: z_i·dz_i over this program's features and columns
    M,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program (b, c, h): row block b, features [c·BLOCK_D, (c+1)·BLOCK_D) of dz, the h-th part of the columns.

    W is formed without its factor g/M, which float16 could not hold for many rows, and for float16 times 2^14: |W| ≤ 2
    then fills its range, and P stays normal down to 4e-9. Both factors come in at the end, in float32.
    """
    W_SCALE: tl.constexpr = 16384.0 if Z.dtype.element_ty == tl.float16 else 1.0
    N = M // 2
    temperature = tl.load(Temperature)
    scale = tl.full((), LOG2E, tl.float32) / temperature
    row0 = tl.program_id(0) * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    partner = tl.where(rows < N, rows + N, rows - N)
    chunk = tl.program_id(1) * BLOCK_D
    top_i = tl.load(RowMax + rows, mask=rows < M, other=0.0)
    inverse_i = tl.load(Stats + rows, mask=rows < M, other=0.0) * W_SCALE
    weight_i = tl.load(Stats + M + rows, mask=rows < M, other=0.0) * W_SCALE
    rows_in_range = tl.min((tl.abs(top_i) <= PLAIN_LIMIT).to(tl.int32), 0) != 0
    if D <= BLOCK_K:
        zi = load_rows(Z, rows, 0, M, D, BLOCK_K, UPCAST)
    dz = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    tiles = tl.cdiv(M, BLOCK_N)
    share = tl.cdiv(tiles, tl.num_programs(2))
    begin = tl.program_id(2) * share
    for tile in range(begin, tl.minimum(begin + share, tiles)):
        col0 = tile * BLOCK_N
        cols = col0 + tl.arange(0, BLOCK_N)
        zj = load_rows(Z, cols, chunk, M, D, BLOCK_D, UPCAST)
        if D <= BLOCK_K:
            s = tl.dot(zi, tl.trans(zj), input_precision=PRECISION) * scale
        else:
            s = wide_products(Z, Z, rows, cols, M, M, D, BLOCK_K, PRECISION, UPCAST) * scale

        plain = rows_in_range & (tl.load(InRange + tile) != 0) & (col0 + BLOCK_N <= M)
        plain = plain & (overlap(row0, BLOCK_M, col0, BLOCK_N) == 0)
        plain = plain & (overlap(row0 + N, BLOCK_M, col0, BLOCK_N) == 0)
        plain = plain & (overlap(row0 - N, BLOCK_M, col0, BLOCK_N) == 0)
        if plain:
            # P_ij + P_ji = 2^s (2^(−max_i)/sum_i + 2^(−max_j)/sum_j): one exponential for two probabilities. s is at
            # most either maximum, so nothing overflows, and where 2^s underflows both probabilities are below 2^−66.
            weight_j = tl.load(Stats + M + cols) * W_SCALE
            w = tl.exp2(s) * (weight_i[:, None] + weight_j[None, :])
        else:
            # The exact form: where P_ip is nearly 1 it cancels here, before the product.
            top_j = tl.load(RowMax + cols, mask=cols < M, other=0.0)
            inverse_j = tl.load(Stats + cols, mask=cols < M, other=0.0) * W_SCALE
            positive = tl.where(cols[None, :] == partner[:, None], W_SCALE, 0.0)
            w = tl.exp2(s - top_i[:, None]) * inverse_i[:, None] - positive
            w += tl.exp2(s - top_j[None, :]) * inverse_j[None, :] - positive
            w = tl.where((rows[:, None] != cols[None, :]) & (cols[None, :] < M), w, 0.0)
        dz = tl.dot(w.to(zj.dtype), zj, dz, input_precision=PRECISION)

    dz = dz * (tl.load(GradLoss) / (temperature * M * W_SCALE))
    features = chunk + tl.arange(0, BLOCK_D)
    offsets = (tl.program_id(2).to(tl.int64) * M + rows)[:, None] * D + features[None, :]
    tl.store(DZ + offsets, dz, mask=(rows[:, None] < M) & (features[None, :] < D))
    # Rows and features outside z are zero there, so they add nothing.
    z = load_rows(Z, rows, chunk, M, D, BLOCK_D, UPCAST).to(tl.float32)
    at = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * M + rows
    tl.store(RowDot + at, tl.sum(z * dz, 1), mask=rows < M)


def nt_xent_forward(z: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and row statistics.

    Args:
        z: [M, D] contiguous; rows i and i + M/2 are the two views of an image; float32, bfloat16 or float16.
        temperature: [] float32 on ``z``'s device, read there.

    Returns:
        loss [], row_max [M], row_sum [M]: float32, base 2.
    """
    z = padded(z)
    m, d = z.shape
    config = config_for(FORWARD, architecture(z), z.element_size(), d)
    block = config.block_m
    blocks = triton.cdiv(m, block)
    row_max, row_sum, row_loss, positive = (z.new_empty(m, dtype=torch.float32) for _ in range(4))
    col_partial = z.new_empty((2, min(BAND, blocks), m), dtype=torch.float32)
    with torch.cuda.device_of(z):
        for first in range(0, blocks, BAND):
            left = blocks - first
            band = min(BAND, left)
            tiles = band * left - band * (band - 1) // 2
            run_length = min(max(1, tiles // FORWARD_PROGRAMS), left)
            runs = triton.cdiv(left, run_length)
            row_partial = z.new_empty((2, runs, band * block), dtype=torch.float32)
            _nt_xent_forward_kernel[(band, runs)](
                z, temperature, row_partial, col_partial, positive, m, first, run_length,
                D=d, BLOCK_M=block, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
                PRECISION=dot_precision(z.dtype), UPCAST=upcast(z.dtype),
                num_warps=config.num_warps, num_stages=config.num_stages, **EXACT,
            )  # fmt: skip
            _nt_xent_merge_kernel[(triton.cdiv(m - first * block, MERGE_ROWS),)](
                row_partial, col_partial, positive, row_max, row_sum, row_loss, m, first, band, runs, run_length,
                BLOCK=block, ROWS=MERGE_ROWS, PARTS=64, num_warps=4, **EXACT,
            )  # fmt: skip
    return row_loss.mean(), row_max, row_sum


def nt_xent_backward(
    grad_loss: Tensor, z: Tensor, temperature: Tensor, row_max: Tensor, row_sum: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the loss.

    Args:
        grad_loss: [] float32.
        z, temperature: as given to :func:`nt_xent_forward`; row_max, row_sum: [M] float32, what it returned.

    Returns:
        dz [M, D] and dtemperature [], float32.
    """
    features = z.shape[1]
    z = padded(z)
    m, d = z.shape
    config = config_for(BACKWARD, architecture(z), z.element_size(), d)
    row_blocks, chunks = triton.cdiv(m, config.block_m), triton.cdiv(d, config.block_d)
    col_blocks = triton.cdiv(m, config.block_n)
    split = max(1, min(MAX_SPLIT, BACKWARD_PROGRAMS // (row_blocks * chunks), col_blocks))
    stats = z.new_empty((2, m), dtype=torch.float32)
    in_range = z.new_empty(col_blocks, dtype=torch.int32)
    dz = z.new_empty((split, m, d), dtype=torch.float32)
    row_dot = z.new_empty((split, chunks, m), dtype=torch.float32)
    with torch.cuda.device_of(z):
        _nt_xent_stats_kernel[(col_blocks,)](
            row_max, row_sum, stats, in_range, m, BLOCK=config.block_n, num_warps=1, **EXACT
        )
        _nt_xent_backward_kernel[(row_blocks, chunks, split)](
            grad_loss, z, temperature, row_max, stats, in_range, dz, row_dot, m,
            D=d, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_D=config.block_d,
            PRECISION=dot_precision(z.dtype), UPCAST=upcast(z.dtype),
            num_warps=config.num_warps, num_stages=config.num_stages, **EXACT,
        )  # fmt: skip
    dz = dz[0] if split == 1 else dz.sum(0)
    return dz[:, :features].contiguous(), row_dot.sum() * (-0.5 / temperature)
