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

from ._common import Config, architecture, best_split, dot_precision, multiprocessors, upcast
from ._configs import NT_XENT_BACKWARD, NT_XENT_FORWARD, config_for
from ._gradient_forms import gradient_form
from ._tiles import (
    BOUND_FROM,
    EXACT,
    LN2,
    LOG2E,
    PLAIN_LIMIT,
    accumulate,
    accumulate_bounded,
    finite_or_zero,
    fold,
    largest_norm,
    load_rows,
    log1p,
    overlap,
    padded,
    wide_products,
)
from .similarity_bands import Terms, band_gradients, finish

# Row blocks of one band. Column partials take 8 bytes for each row of z and block of the band: COLUMN_BYTES in all, or
# 512 bytes a row (BAND blocks; as much as float32 rows of 128 features). Row partials take 8·band·block_m·runs with
# runs = blocks / run length, a few MiB. So memory is O(M), where the matrix takes 4·M². One band serves all of
# M ≤ 32,768 rows; beyond that each band is two launches.
BAND = 64
COLUMN_BYTES = 64 * 2**20
# The forward makes its runs of tiles as long as FORWARD_PROGRAMS for each multiprocessor allow, so that the last wave
# is a small part of the time. The backward splits the columns of one row block among up to MAX_SPLIT programs, as long
# as two waves hold all of them: their dz partials take 4·split·M·D ≤ 8·slots·block_m·block_d, 26 MB on an H200.
FORWARD_PROGRAMS = 8
BACKWARD_WAVES = 2
MAX_SPLIT = 8
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
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
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
    if D <= BLOCK_K:
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
    RowRest,  # [M]: 1 − P_ip
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
    rest_i = tl.load(RowRest + rows, mask=rows < M, other=0.0) * W_SCALE
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
            # The exact form. Where P_ip is nearly 1, P_ip − 1 would be rounding: the share of all others is known.
            top_j = tl.load(RowMax + cols, mask=cols < M, other=0.0)
            inverse_j = tl.load(Stats + cols, mask=cols < M, other=0.0) * W_SCALE
            rest = rest_i[:, None] + (tl.load(RowRest + cols, mask=cols < M, other=0.0) * W_SCALE)[None, :]
            w = tl.exp2(s - top_i[:, None]) * inverse_i[:, None] + tl.exp2(s - top_j[None, :]) * inverse_j[None, :]
            w = tl.where(cols[None, :] == partner[:, None], -rest, w)
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
                    D=d, BLOCK_M=block, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
                    BOUNDED=bounded, PRECISION=dot_precision(z.dtype), UPCAST=upcast(z.dtype),
                    num_warps=config.num_warps, num_stages=config.num_stages, **EXACT,
                )  # fmt: skip
            _nt_xent_merge_kernel[(triton.cdiv(m - first * block, MERGE_ROWS),)](
                row_partial, col_partial, positive, row_max, row_sum, row_rest, row_loss, m, first, band, runs,
                run_length,
                BLOCK=block, ROWS=MERGE_ROWS, PARTS=64, num_warps=4, **EXACT,
            )  # fmt: skip
    return row_loss.mean(), row_max, row_sum, row_rest


def nt_xent_backward(
    grad_loss: Tensor, z: Tensor, temperature: Tensor, row_max: Tensor, row_sum: Tensor, row_rest: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the loss.

    Args:
        grad_loss: [] float32.
        z, temperature: as given to :func:`nt_xent_forward`; row_max, row_sum, row_rest: [M] float32, what it returned.

    Returns:
        dz [M, D] and dtemperature [], float32.
    """
    features = z.shape[1]
    z = padded(z)
    config = config_for(NT_XENT_BACKWARD, architecture(z), z.element_size(), z.shape[1])
    found = None
    with torch.cuda.device_of(z):
        if gradient_form(z, 1, config) == "banded":
            found = _banded(grad_loss, z, temperature, row_max, row_sum, row_rest)
        if found is None:
            found = _streamed(grad_loss, z, temperature, (row_max, row_sum, row_rest), config)
    dz, dtemperature = found
    return dz[:, :features].contiguous(), dtemperature


def _banded(
    grad_loss: Tensor, z: Tensor, temperature: Tensor, row_max: Tensor, row_sum: Tensor, row_rest: Tensor
) -> tuple[Tensor, Tensor] | None:
    """``None`` where memory has no room for a band."""
    # As W_SCALE in the streamed kernel: float16 cannot hold the factor g/M, which comes in at the end.
    w_scale = 16384.0 if z.dtype == torch.float16 else 1.0
    factor = z.new_full((), w_scale, dtype=torch.float32) if w_scale != 1.0 else None
    terms = Terms(None, row_max, row_sum, None, row_max, row_sum, grad_positive=row_rest, factor=factor, pairs=True)
    found = band_gradients(z, z, temperature, terms, True, False, False)
    if found is None:
        return None
    dz = found[0]
    assert dz is not None
    multiplier = grad_loss / (temperature * (len(z) * w_scale))
    dots = finish(z, dz, multiplier)
    return dz, dots * multiplier * (-0.5 / temperature)


def _streamed(
    grad_loss: Tensor, z: Tensor, temperature: Tensor, rows: tuple[Tensor, Tensor, Tensor], config: Config
) -> tuple[Tensor, Tensor]:
    row_max, row_sum, row_rest = rows
    m, d = z.shape
    row_blocks, chunks = triton.cdiv(m, config.block_m), triton.cdiv(d, config.block_d)
    col_blocks = triton.cdiv(m, config.block_n)
    programs, slots = row_blocks * chunks, config.resident * multiprocessors(z)
    most = min(MAX_SPLIT, BACKWARD_WAVES * slots // programs, col_blocks)
    split = best_split(programs, slots, most)
    stats = z.new_empty((2, m), dtype=torch.float32)
    in_range = z.new_empty(col_blocks, dtype=torch.int32)
    dz = z.new_empty((split, m, d), dtype=torch.float32)
    row_dot = z.new_empty((split, chunks, m), dtype=torch.float32)
    _nt_xent_stats_kernel[(col_blocks,)](
        row_max, row_sum, stats, in_range, m, BLOCK=config.block_n, num_warps=1, **EXACT
    )
    _nt_xent_backward_kernel[(row_blocks, chunks, split)](
        grad_loss, z, temperature, row_max, stats, in_range, row_rest, dz, row_dot, m,
        D=d, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_D=config.block_d,
        PRECISION=dot_precision(z.dtype), UPCAST=upcast(z.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages, **EXACT,
    )  # fmt: skip
    return dz[0] if split == 1 else dz.sum(0), row_dot.sum() * (-0.5 / temperature)
