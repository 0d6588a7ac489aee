"""Columns of second_moment's batches: their statistics, and X̂ itself. See ``second_moment.py`` for the notation.

A program has COLS columns of all batches. Where the rows are few, or the columns many, it takes all their rows, in one
launch: it reads them once for their mean, once for squared deviations, once for X̂. Else the rows are split into chunks
and there are two: of each chunk the first stores the mean and squared deviations, which every program of the second
merges for its columns (Chan, Golub and LeVeque, 1983) before it writes X̂ of its chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import upcast
from ._matrices import load_float, load_tile, place, store_tile

# What a launch does: all of it, or its first or second part where the rows are split.
WHOLE, PARTIAL, REST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Penalties of the columns, by number: see ``Loss`` in ``ops``.
NOTHING, IDENTITY, HINGE, TRACE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
# From so many rows on they are split, except in dual form, which has more columns than rows.
SPLIT_ROWS = 2048
# Programs wanted in a launch that splits them.
PROGRAMS = 512
# Partial sums that a program merges at a time.
CHUNKS = 16
WARPS = 8


@triton.jit
def _pivot(X, cols, D, x_stride, CENTER: tl.constexpr, TRANSPOSED: tl.constexpr, UPCAST: tl.constexpr):
    """The first row in float32: what is left of ``x`` without it is of the size of the deviations, so that a mean that
    is far from zero costs no accuracy. 0 without CENTER."""
    pivot = tl.zeros(cols.shape, tl.float32)
    if CENTER:
        step = x_stride if TRANSPOSED else 1
        first = tl.load(X + cols.to(tl.int64) * step, mask=cols < D, other=0.0)
        if UPCAST:
            first = first.to(tl.float32)
        pivot += first.to(tl.float32)
    return pivot


@triton.jit
def _sums(
    A, B, a_pivot, b_pivot, begin, end, col0, D, x_stride,
    CROSS: tl.constexpr, CENTER: tl.constexpr, TRANSPOSED: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Of rows [begin, end): means less the pivots, squared deviations from them, of a and of b; Σ of products of the
    deviations if CROSS, else Σ (a − b)². Without CENTER means are 0 and deviations are x."""
    a_mean, b_mean = tl.zeros((COLS,), tl.float32), tl.zeros((COLS,), tl.float32)
    if CENTER:
        a_sum, b_sum = tl.zeros((ROWS, COLS), tl.float32), tl.zeros((ROWS, COLS), tl.float32)
        for row0 in range(begin, end, ROWS):
            a, inside = load_float(A, row0, col0, end, D, x_stride, ROWS, COLS, TRANSPOSED, UPCAST)
            a_sum += tl.where(inside, a - a_pivot[None, :], 0.0)
            if B is not None:
                b, inside = load_float(B, row0, col0, end, D, x_stride, ROWS, COLS, TRANSPOSED, UPCAST)
                b_sum += tl.where(inside, b - b_pivot[None, :], 0.0)
        count = (end - begin).to(tl.float32)
        a_mean, b_mean = tl.sum(a_sum, 0) / count, tl.sum(b_sum, 0) / count
    a_square, b_square = tl.zeros((ROWS, COLS), tl.float32), tl.zeros((ROWS, COLS), tl.float32)
    joint = tl.zeros((ROWS, COLS), tl.float32)
    for row0 in range(begin, end, ROWS):
        a, inside = load_float(A, row0, col0, end, D, x_stride, ROWS, COLS, TRANSPOSED, UPCAST)
        a_deviation = tl.where(inside, (a - a_pivot[None, :]) - a_mean[None, :], 0.0)
        a_square += a_deviation * a_deviation
        if B is not None:
            b, inside = load_float(B, row0, col0, end, D, x_stride, ROWS, COLS, TRANSPOSED, UPCAST)
            b_deviation = tl.where(inside, (b - b_pivot[None, :]) - b_mean[None, :], 0.0)
            b_square += b_deviation * b_deviation
            joint += a_deviation * b_deviation if CROSS else (a - b) * (a - b)
    return a_mean, tl.sum(a_square, 0), b_mean, tl.sum(b_square, 0), tl.sum(joint, 0)


@triton.jit
def _merged_mean(Partial, chunks, share, N, D, col0, CHUNKS: tl.constexpr, COLS: tl.constexpr):
    """The mean over all rows of the chunks' means [chunks, D]."""
    total = tl.zeros((CHUNKS, COLS), tl.float32)
    for first in range(0, chunks, CHUNKS):
        rows = (first + tl.arange(0, CHUNKS)) * share
        count = tl.maximum(tl.minimum(N - rows, share), 0).to(tl.float32)
        total += load_tile(Partial, first, col0, chunks, D, D, CHUNKS, COLS) * count[:, None]
    return tl.sum(total, 0) / N.to(tl.float32)


@triton.jit
def _merged(
    Partial, chunks, share, N, D, col0, BOTH: tl.constexpr, CROSS: tl.constexpr, CENTER: tl.constexpr,
    CHUNKS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """What :func:`_sums` gives of all rows, from what it gave of the chunks."""
    plane = chunks.to(tl.int64) * D
    a_mean, b_mean = tl.zeros((COLS,), tl.float32), tl.zeros((COLS,), tl.float32)
    if CENTER:
        a_mean = _merged_mean(Partial, chunks, share, N, D, col0, CHUNKS, COLS)
        if BOTH:
            b_mean = _merged_mean(Partial + 2 * plane, chunks, share, N, D, col0, CHUNKS, COLS)
    a_square, b_square = tl.zeros((CHUNKS, COLS), tl.float32), tl.zeros((CHUNKS, COLS), tl.float32)
    joint = tl.zeros((CHUNKS, COLS), tl.float32)
    for first in range(0, chunks, CHUNKS):
        rows = (first + tl.arange(0, CHUNKS)) * share
        count = tl.maximum(tl.minimum(N - rows, share), 0).to(tl.float32)[:, None]
        at, inside = place(Partial, first, col0, chunks, D, D, CHUNKS, COLS)
        a_apart = tl.load(at, mask=inside, other=0.0) - a_mean[None, :]
        a_square += tl.load(at + plane, mask=inside, other=0.0) + count * (a_apart * a_apart)
        if BOTH:
            b_apart = tl.load(at + 2 * plane, mask=inside, other=0.0) - b_mean[None, :]
            b_square += tl.load(at + 3 * plane, mask=inside, other=0.0) + count * (b_apart * b_apart)
            joint += tl.load(at + 4 * plane, mask=inside, other=0.0)
            if CROSS:
                joint += count * (a_apart * b_apart)
    return a_mean, tl.sum(a_square, 0), b_mean, tl.sum(b_square, 0), tl.sum(joint, 0)


@triton.jit
def _factor(square, N, eps, SCALE: tl.constexpr):
    factor = tl.full(square.shape, 1.0, tl.float32)
    if SCALE == 1:
        factor = tl.div_rn(factor, tl.sqrt_rn(square / N + eps))
    elif SCALE == 2:
        factor = tl.div_rn(factor, tl.maximum(tl.sqrt_rn(square), eps, propagate_nan=tl.PropagateNan.ALL))
    return factor


@triton.jit
def deviation(square, N, floor):
    """Unbiased standard deviation, from Σ of squared deviations; ``floor`` is added to the variance."""
    return tl.sqrt_rn(square / (N - 1).to(tl.float32) + floor)


@triton.jit
def _penalty(diagonal, square, N, floor, PENALTY: tl.constexpr):
    """What each column of one batch, or of one M, adds to the penalty."""
    if PENALTY == IDENTITY:
        apart = diagonal / N.to(tl.float32) - 1.0
        value = apart * apart
    elif PENALTY == HINGE:
        value = tl.maximum(1.0 - deviation(square, N, floor), 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        value = diagonal
    return value


@triton.jit
def _standardized(
    X, Hat, mean, factor, row0, end, col0, D, width, x_stride,
    TRANSPOSED: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A tile of X̂, as it was rounded and stored, in float32."""
    x, inside = load_float(X, row0, col0, end, D, x_stride, ROWS, COLS, TRANSPOSED, UPCAST)
    hat = tl.where(inside, (x - mean[None, :]) * factor[None, :], 0.0).to(Hat.dtype.element_ty)
    store_tile(Hat, hat, row0, col0, end, width, width)
    return hat.to(tl.float32)


@triton.jit
def _store_statistics(
    Stats, Diagonal, ColumnSums, a_mean, a_factor, a_square, b_mean, b_factor, b_square, joint, N, D, floor,
    BOTH: tl.constexpr, CROSS: tl.constexpr, PENALTY: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Stats but for its last rows, Diagonal, and ColumnSums of the penalty and of the distance."""
    V: tl.constexpr = 2 if BOTH else 1
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    diagonal = joint * a_factor * b_factor if CROSS else a_square * a_factor * a_factor
    tl.store(Stats + cols, a_mean, mask=cols < D)
    tl.store(Stats + V * D + cols, a_factor, mask=cols < D)
    tl.store(Stats + 2 * V * D + cols, a_square, mask=cols < D)
    tl.store(Diagonal + cols, diagonal, mask=cols < D)
    ColumnSums += tl.program_id(0)
    if PENALTY != NOTHING:
        value = _penalty(diagonal, a_square, N, floor, PENALTY)
    if BOTH:
        tl.store(Stats + D + cols, b_mean, mask=cols < D)
        tl.store(Stats + 3 * D + cols, b_factor, mask=cols < D)
        tl.store(Stats + 5 * D + cols, b_square, mask=cols < D)
        b_diagonal = b_square * b_factor * b_factor
        if not CROSS:
            tl.store(Diagonal + D + cols, b_diagonal, mask=cols < D)
            tl.store(ColumnSums + tl.num_programs(0), tl.sum(joint.to(tl.float64), 0))
        if PENALTY == HINGE or (PENALTY != NOTHING and not CROSS):
            value += _penalty(b_diagonal, b_square, N, floor, PENALTY)
    if PENALTY != NOTHING:
        tl.store(ColumnSums, tl.sum(tl.where(cols < D, value, 0.0).to(tl.float64), 0))


@triton.jit
def _store_rounded(rounded, Stats, ColumnSums, row, plane, D, COLS: tl.constexpr):
    """M_ii of X̂ as it is rounded, and the sum of its squares."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    wide = rounded.to(tl.float64)
    tl.store(Stats + row * D + cols, rounded, mask=cols < D)
    tl.store(ColumnSums + plane * tl.num_programs(0) + tl.program_id(0), tl.sum(wide * wide, 0))


@triton.jit
def _standardize(
    A, B, Stats, Hat, ColumnSums, a_mean, a_factor, b_mean, b_factor, begin, end, N, D, x_stride, width,
    CROSS: tl.constexpr, DUAL: tl.constexpr, TRANSPOSED: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """X̂ of rows [begin, end); if DUAL, which means all rows, its diagonals."""
    col0 = tl.program_id(0) * COLS
    first, second = tl.zeros((ROWS, COLS), tl.float32), tl.zeros((ROWS, COLS), tl.float32)
    for row0 in range(begin, end, ROWS):
        a = _standardized(A, Hat, a_mean, a_factor, row0, end, col0, D, width, x_stride, TRANSPOSED, UPCAST, ROWS, COLS)
        b = a
        if B is not None:
            b = _standardized(
                B, Hat + N.to(tl.int64) * width, b_mean, b_factor, row0, end, col0, D, width, x_stride,
                TRANSPOSED, UPCAST, ROWS, COLS,
            )  # fmt: skip
        if DUAL:
            first += a * b if CROSS else a * a
            second += b * b
    if DUAL:
        _store_rounded(tl.sum(first, 0), Stats, ColumnSums, 6 if B is not None else 3, 2, D, COLS)
        if (B is not None) and (not CROSS):
            _store_rounded(tl.sum(second, 0), Stats, ColumnSums, 7, 3, D, COLS)


@triton.jit(do_not_specialize=["N", "share", "chunks", "width8"])
def _second_moment_columns_kernel(
    A,  # [N, D]
    B,  # [N, D] or None
    Partial,  # [5, chunks, D] or, of one batch, [2, chunks, D]; None if WHOLE
    Stats,  # [·, D]: mean, factor, Σ of squared deviations, V rows each; if DUAL, R rows: M_ii of X̂ as it is rounded
    Diagonal,  # [R, D]
    Hat,  # [V, N, 8·width8]: zero beyond D
    ColumnSums,  # [4, blocks] float64: of the penalty; of the distance; if DUAL, of the rounded diagonals' squares
    N,
    D,
    x_stride,
    share,
    chunks,
    width8,
    eps,
    floor,
    CROSS: tl.constexpr,
    CENTER: tl.constexpr,
    SCALE: tl.constexpr,
    DUAL: tl.constexpr,
    PENALTY: tl.constexpr,
    PHASE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Program (c, r): the c-th COLS columns; of the rows, the r-th ``share``."""
    BOTH: tl.constexpr = B is not None
    col0 = tl.program_id(0) * COLS
    cols = col0 + tl.arange(0, COLS)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, N)
    a_pivot = _pivot(A, cols, D, x_stride, CENTER, TRANSPOSED, UPCAST)
    b_pivot = _pivot(B, cols, D, x_stride, CENTER, TRANSPOSED, UPCAST) if BOTH else a_pivot
    if PHASE == REST:
        a_mean, a_square, b_mean, b_square, joint = _merged(
            Partial, chunks, share, N, D, col0, BOTH, CROSS, CENTER, CHUNKS, COLS
        )
    else:
        a_mean, a_square, b_mean, b_square, joint = _sums(
            A, B, a_pivot, b_pivot, begin, end, col0, D, x_stride,
            CROSS, CENTER, TRANSPOSED, UPCAST, ROWS, COLS,
        )  # fmt: skip
    if PHASE == PARTIAL:
        at, plane = Partial + tl.program_id(1).to(tl.int64) * D + cols, chunks.to(tl.int64) * D
        tl.store(at, a_mean, mask=cols < D)
        tl.store(at + plane, a_square, mask=cols < D)
        if BOTH:
            tl.store(at + 2 * plane, b_mean, mask=cols < D)
            tl.store(at + 3 * plane, b_square, mask=cols < D)
            tl.store(at + 4 * plane, joint, mask=cols < D)
    else:
        a_mean += a_pivot
        b_mean += b_pivot
        a_factor, b_factor = _factor(a_square, N, eps, SCALE), _factor(b_square, N, eps, SCALE)
        if tl.program_id(1) == 0:
            _store_statistics(
                Stats, Diagonal, ColumnSums, a_mean, a_factor, a_square, b_mean, b_factor, b_square, joint, N, D, floor,
                BOTH, CROSS, PENALTY, COLS,
            )  # fmt: skip
        _standardize(
            A, B, Stats, Hat, ColumnSums, a_mean, a_factor, b_mean, b_factor, begin, end, N, D, x_stride, width8 * 8,
            CROSS, DUAL, TRANSPOSED, UPCAST, ROWS, COLS,
        )  # fmt: skip


class Options(NamedTuple):
    """What is asked for: see ``ops/second_moment.py``.

    Attributes:
        dual: N × N Gram matrices instead of D × D moments.
        scale: 0 not at all, 1 by the variance, 2 by the norm.
        penalty: of the columns: 0 none, IDENTITY, HINGE or TRACE; floor: added to the variances of HINGE.
        weights: in the loss, of the squares off the diagonal, of the distance and of the penalty.
    """

    cross: bool
    center: bool
    scale: int
    eps: float
    dual: bool
    penalty: int
    floor: float
    weights: tuple[float, float, float]


class Columns(NamedTuple):
    """What the launches give: see the kernel's arguments of these names; ``sums`` are for the forward alone."""

    stats: Tensor
    diagonal: Tensor
    hat: Tensor
    sums: Tensor | None = None


def tile_of(columns: int) -> tuple[int, int]:
    """Rows and columns of a program's tiles: narrow ones where wide ones are too few for a GPU."""
    return (32, 64) if columns >= 128 * 64 else (128, 16)


def chunks_of(n: int, d: int, dual: bool, split: bool = False) -> tuple[int, int]:
    """Into how many chunks a pass over [n, d] splits its rows, and the rows of each; ``split``: always."""
    if (dual or n <= SPLIT_ROWS) and not split:
        return 1, n
    rows, cols = tile_of(d)
    wanted = max(1, min(triton.cdiv(n, rows), PROGRAMS // triton.cdiv(d, cols)))
    share = triton.cdiv(n, wanted)
    return triton.cdiv(n, share), share


def operand_kind(dtype: torch.dtype) -> torch.dtype:
    """In which dtype the factors of a product are kept: that of the input, if the interpreter need not widen it."""
    return torch.float32 if upcast(dtype) else dtype


def columns(a: Tensor, b: Tensor | None, options: Options) -> Columns:
    """Statistics of the columns of [N, D] and X̂, in the dtype of the products.

    Args:
        a, b: both row-major or both column-major, with one stride: see ``aligned`` in ``ops``.
    """
    (n, d), views = a.shape, 1 if b is None else 2
    matrices = 1 if options.cross else views
    width = triton.cdiv(d, 8) * 8
    rows, cols = tile_of(d)
    blocks, (chunks, share) = triton.cdiv(d, cols), chunks_of(n, d, options.dual)
    found = Columns(
        stats=a.new_empty((3 * views + (matrices if options.dual else 0), d), dtype=torch.float32),
        diagonal=a.new_empty((matrices, d), dtype=torch.float32),
        hat=a.new_empty((views, n, width), dtype=operand_kind(a.dtype)),
        sums=a.new_empty((4, blocks), dtype=torch.float64),
    )
    partial = a.new_empty((5 if views == 2 else 2, chunks, d), dtype=torch.float32) if chunks > 1 else None
    for phase in (WHOLE,) if partial is None else (PARTIAL, REST):
        _second_moment_columns_kernel[(blocks, chunks)](
            a, b, partial, *found, n, d, stride_of(a), share, chunks, width // 8, options.eps, options.floor,
            CROSS=options.cross, CENTER=options.center, SCALE=options.scale, DUAL=options.dual,
            PENALTY=options.penalty, PHASE=phase.value, TRANSPOSED=is_transposed(a), UPCAST=upcast(a.dtype),
            ROWS=rows, COLS=cols, CHUNKS=CHUNKS, num_warps=WARPS,
        )  # fmt: skip
    return found


def is_transposed(x: Tensor) -> bool:
    """Whether it is the columns of ``x`` [N, D] that are contiguous, and not the rows."""
    return x.stride(1) != 1 and x.stride(0) == 1


def stride_of(x: Tensor) -> int:
    """From row to row, or of a transposed matrix from column to column."""
    return x.stride(1) if is_transposed(x) else x.stride(0)
