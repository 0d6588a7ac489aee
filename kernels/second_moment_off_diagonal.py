"""What second_moment takes from its moment or Gram matrices: squares, and the operands of the backward's products.

See ``second_moment.py`` for the notation. The matrices are in memory, whole or a band of columns at a time. An operand
is one without its diagonal, in the dtype of X̂: the diagonal, the largest part of a Gram matrix, stays in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._matrices import load_tile, place
from .second_moment_columns import Columns, Options

# Rows of a program, and columns that it takes at a time.
ROWS, BLOCK = 4, 512
# Numbers that one program of `totals` adds at a time.
TOTALS = 1024


@triton.jit
def _finite(x):
    """NaN and infinity, which no range holds, as 0."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _largest(Stats, first, views, D, BLOCK: tl.constexpr):
    """The largest Σ x̂² of a column of view ``first``, from its statistics."""
    top = tl.zeros((BLOCK,), tl.float32)
    for col0 in range(0, D, BLOCK):
        cols = col0 + tl.arange(0, BLOCK)
        factor = tl.load(Stats + (views + first) * D + cols, mask=cols < D, other=0.0)
        square = tl.load(Stats + (2 * views + first) * D + cols, mask=cols < D, other=0.0)
        top = tl.maximum(top, _finite(square * factor * factor))
    return tl.max(top, 0)


@triton.jit
def _largest_diagonal(M, height, pitch, BLOCK: tl.constexpr):
    top = tl.zeros((BLOCK,), tl.float32)
    for row0 in range(0, height, BLOCK):
        rows = row0 + tl.arange(0, BLOCK)
        top = tl.maximum(top, _finite(tl.load(M + rows.to(tl.int64) * (pitch + 1), mask=rows < height, other=0.0)))
    return tl.max(top, 0)


@triton.jit
def _power(bound):
    """The power of two that brings ``bound`` to 2^13 … 2^14.

    A second moment is a sum over rows (or features) and may pass float16's 65504. No entry of one is larger than
    ``bound`` (Cauchy–Schwarz), and the smaller ones stay normal numbers down to 2^−27 of it.
    """
    exponent = ((bound.to(tl.int32, bitcast=True) >> 23) & 255) - 126  # bound < 2^exponent
    return ((14 - tl.maximum(exponent, -100) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _store_operand(
    Operand, g, power, row0, col0, first, height, width, pitch, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr
):
    """A tile of M without its diagonal, and zeros from ``width`` to ``pitch``; returns what is on its diagonal."""
    rows = row0 + tl.arange(0, g.shape[0])[:, None]
    cols = col0 + tl.arange(0, BLOCK)[None, :]
    diagonal = rows == cols + first
    # Not 0: NaN and infinity give NaN, as their difference with themselves does.
    value = tl.where(diagonal, g * 0.0, g) * power
    at, inside = place(Operand, row0, col0, height, pitch, pitch, g.shape[0], BLOCK)
    if IN_PLACE:
        inside = inside & (diagonal | (cols >= width))
    tl.store(at, value.to(Operand.dtype.element_ty), mask=inside)
    return tl.sum(tl.where(diagonal, g, 0.0), 1)


@triton.jit(
    do_not_specialize=["height", "width", "pitch8", "operand8", "first", "squares", "trace", "first_matrix", "D"]
)
def _second_moment_off_diagonal_kernel(
    M,  # [P, height, 8·pitch8] float32: columns first … first + width of M, or a Gram matrix of each view
    Stats,  # [·, D] of the columns, with RANGED
    SquareSums,  # [R, squares] float64 or None: one number from each program
    Operand,  # [P, height, 8·operand8] or None; M itself if IN_PLACE
    Trace,  # [P, trace], with Operand: the power of two that is in it; if DUAL, the diagonal
    height,
    width,
    pitch8,
    operand8,
    first,
    squares,
    trace,
    first_matrix,
    D,
    VIEWS: tl.constexpr,
    CROSS: tl.constexpr,
    DUAL: tl.constexpr,
    IN_PLACE: tl.constexpr,
    RANGED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (r, m): rows r·ROWS … of the m-th matrix; of the two Gram matrices of a CROSS.

    Of a symmetric M only the rows down to the band's last one need be given: those above the band count twice.
    """
    PAIR: tl.constexpr = CROSS and DUAL
    row0, matrix = tl.program_id(0) * ROWS, tl.program_id(1)
    pitch, operand_pitch = pitch8 * 8, operand8 * 8
    plane, operand_plane = height.to(tl.int64) * pitch, height.to(tl.int64) * operand_pitch
    rows = row0 + tl.arange(0, ROWS)
    m = M + matrix * plane
    power, other_power = 1.0, 1.0
    if RANGED and Operand is not None:
        if DUAL:
            power = _power(_largest_diagonal(m, height, pitch, BLOCK))
            if PAIR:
                other_power = _power(_largest_diagonal(m + plane, height, pitch, BLOCK))
        elif CROSS:
            bound = tl.sqrt_rn(_largest(Stats, 0, VIEWS, D, BLOCK)) * tl.sqrt_rn(_largest(Stats, 1, VIEWS, D, BLOCK))
            power = _power(bound)
        else:
            power = _power(_largest(Stats, first_matrix + matrix, VIEWS, D, BLOCK))
    total = tl.zeros((ROWS,), tl.float64)
    diagonal, other_diagonal = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for col0 in range(0, tl.maximum(width, operand_pitch), BLOCK):
        g = load_tile(m, row0, col0, height, width, pitch, ROWS, BLOCK)
        h = load_tile(m + plane, row0, col0, height, width, pitch, ROWS, BLOCK) if PAIR else g
        if SquareSums is not None:
            if DUAL:
                value = g * h
            else:
                apart = tl.where(rows[:, None] == first + col0 + tl.arange(0, BLOCK)[None, :], g - g, g)
                value = apart * apart
            total += tl.sum(value, 1).to(tl.float64)
        if Operand is not None:
            at = Operand + matrix * operand_plane
            diagonal += _store_operand(at, g, power, row0, col0, first, height, width, operand_pitch, IN_PLACE, BLOCK)
            if PAIR:
                other_diagonal += _store_operand(
                    at + operand_plane, h, other_power, row0, col0, first, height, width, operand_pitch, IN_PLACE, BLOCK
                )
    if SquareSums is not None:
        if not (CROSS or DUAL):
            total = tl.where(rows < first, 2.0 * total, total)
        tl.store(SquareSums + matrix.to(tl.int64) * squares + tl.program_id(0), tl.sum(total, 0))
    if Operand is not None:
        Trace += matrix.to(tl.int64) * trace
        if tl.program_id(0) == 0:
            tl.store(Trace, power)
            if PAIR:
                tl.store(Trace + trace, other_power)
        if DUAL:
            tl.store(Trace + 1 + rows, diagonal, mask=rows < height)
            if PAIR:
                tl.store(Trace + trace + 1 + rows, other_diagonal, mask=rows < height)


@triton.jit
def _total(X, length, BLOCK: tl.constexpr):
    """The sum of X [length], in one order."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(X + at, mask=at < length, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["squares", "blocks"])
def _second_moment_totals_kernel(
    SquareSums,  # [R, squares] float64
    ColumnSums,  # [4, blocks] float64, of the columns
    Loss,  # []
    Off,  # [R]
    Distance,  # []
    squares,
    blocks,
    off_weight,
    distance_weight,
    penalty_weight,
    MATRICES: tl.constexpr,
    DISTANCE: tl.constexpr,
    DUAL: tl.constexpr,
    PENALTY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the sums of what the others have left, and the loss that is a sum of these."""
    loss = tl.zeros((), tl.float64)
    for matrix in tl.static_range(MATRICES):
        off = _total(SquareSums + matrix * squares, squares, BLOCK)
        if DUAL:  # nearly all of it may be the diagonal
            off -= _total(ColumnSums + (2 + matrix) * blocks, blocks, BLOCK)
            off = tl.maximum(off, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(Off + matrix, off.to(tl.float32))
        loss += off * off_weight
    distance = tl.zeros((), tl.float64)
    if DISTANCE:
        distance = _total(ColumnSums + blocks, blocks, BLOCK)
        loss += distance * distance_weight
    tl.store(Distance, distance.to(tl.float32))
    if PENALTY != 0:
        loss += _total(ColumnSums, blocks, BLOCK) * penalty_weight
    tl.store(Loss, loss.to(tl.float32))


def programs(height: int) -> int:
    """Numbers that :func:`off_diagonal` writes for each matrix."""
    return triton.cdiv(height, ROWS)


def off_diagonal(
    m: Tensor,
    columns: Columns,
    options: Options,
    squares: Tensor | None,
    operand: Tensor | None = None,
    trace: Tensor | None = None,
    first: int = 0,
    matrix: int = 0,
) -> None:
    """Squares of M, and M without its diagonal: see the kernel's arguments of these names.

    Args:
        m: [P, height, width], one after the other, of rows with a stride that is a multiple of 8.
        squares: [R, ·], written from the start of its rows on.
        operand: [P, height, ·], its padding included; or ``m``.
        first: the number of the first column of ``m`` in M; matrix: that of its first matrix.
    """
    (planes, height, width), hat = m.shape, columns.hat
    in_place = operand is not None and operand.data_ptr() == m.data_ptr()
    _second_moment_off_diagonal_kernel[(programs(height), 1 if options.cross else planes)](
        m, columns.stats, squares, operand, trace,
        height, width, m.stride(1) // 8, 0 if operand is None else operand.stride(1) // 8,
        first, 0 if squares is None else squares.stride(0), 0 if trace is None else trace.stride(0),
        matrix, columns.stats.shape[1],
        VIEWS=len(hat), CROSS=options.cross, DUAL=options.dual, IN_PLACE=in_place, RANGED=hat.dtype == torch.float16,
        ROWS=ROWS, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def totals(squares: Tensor, columns: Columns, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """loss [], off_diagonal [R], distance []; ``squares`` [R, ·] are to be summed."""
    sums, matrices = columns.sums, len(squares)
    loss, off, distance = (sums.new_empty(shape, dtype=torch.float32) for shape in ((), (matrices,), ()))
    _second_moment_totals_kernel[(1,)](
        squares, sums, loss, off, distance, squares.shape[1], sums.shape[1], *options.weights,
        MATRICES=matrices, DISTANCE=len(columns.hat) == 2 and not options.cross, DUAL=options.dual,
        PENALTY=options.penalty, BLOCK=TOTALS, num_warps=4,
    )  # fmt: skip
    return loss, off, distance
