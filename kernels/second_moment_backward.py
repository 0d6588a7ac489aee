"""Gradients of second_moment through the columns: see ``second_moment.py`` for the notation and the formulas.

The products of the backward are in memory, as float32 [N, D]. To them come the terms of the diagonals, then the column
sums that centring and scaling take out. As in ``second_moment_columns.py`` a program has COLS columns, and takes all
their rows or those of one chunk, whose sums a second launch merges.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import upcast
from ._matrices import load_float, load_tile, place, store_tile
from .second_moment_columns import (
    CHUNKS,
    HINGE,
    IDENTITY,
    NOTHING,
    PARTIAL,
    REST,
    WARPS,
    WHOLE,
    Columns,
    Options,
    chunks_of,
    deviation,
    is_transposed,
    stride_of,
    tile_of,
)


@triton.jit
def _given(Grad, offset, GradLoss, weight):
    """The gradient in one number: what came for itself, and what came for the loss."""
    grad = 0.0
    if Grad is not None:
        grad += tl.load(Grad + offset).to(tl.float32)
    if GradLoss is not None:
        grad += weight * tl.load(GradLoss).to(tl.float32)
    return grad


@triton.jit
def _diagonal_gradient(
    GradDiagonal, GradLoss, Diagonal, matrix, cols, N, D, row_stride, column_stride, weight, PENALTY: tl.constexpr
):
    """The gradient in M_ii of one matrix."""
    grad = tl.zeros(cols.shape, tl.float32)
    if GradDiagonal is not None:
        at = GradDiagonal + matrix * row_stride + cols.to(tl.int64) * column_stride
        grad += tl.load(at, mask=cols < D, other=0.0)
    if GradLoss is not None:
        loss = weight * tl.load(GradLoss).to(tl.float32)
        if PENALTY == IDENTITY:
            diagonal = tl.load(Diagonal + matrix * D + cols, mask=cols < D, other=0.0)
            grad += loss * (2.0 * (diagonal / N.to(tl.float32) - 1.0) / N.to(tl.float32))
        elif PENALTY != NOTHING and PENALTY != HINGE:
            grad += loss
    return grad


@triton.jit
def _tile(
    Product, X, Y, Trace, row0, end, col0, N, D, width, x_stride, scale, weight, column_term,
    x_mean, x_factor, y_mean, y_factor, CROSS: tl.constexpr, DUAL: tl.constexpr, TRANSPOSED: tl.constexpr,
    UPCAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A tile of dx̂ = scale·product + ŷ·column term + weight·trace·x̂, of x and of x̂."""
    x, inside = load_float(X, row0, col0, end, D, x_stride, ROWS, COLS, TRANSPOSED, UPCAST)
    hat = tl.where(inside, (x - x_mean[None, :]) * x_factor[None, :], 0.0)
    d = load_tile(Product, row0, col0, end, D, width, ROWS, COLS) * scale
    if CROSS:
        y, inside = load_float(Y, row0, col0, end, D, x_stride, ROWS, COLS, TRANSPOSED, UPCAST)
        d += tl.where(inside, (y - y_mean[None, :]) * y_factor[None, :], 0.0) * column_term[None, :]
    else:
        d += hat * column_term[None, :]
    if DUAL:
        rows = row0 + tl.arange(0, ROWS)
        d += hat * (weight * tl.load(Trace + rows, mask=rows < N, other=0.0))[:, None]
    return d, x, hat


@triton.jit
def _merged(Partial, chunks, col0, D, CHUNKS: tl.constexpr, COLS: tl.constexpr):
    """The sums over all rows from those of the chunks [3, chunks, D]."""
    plane = chunks.to(tl.int64) * D
    d_sums, projections = tl.zeros((CHUNKS, COLS), tl.float32), tl.zeros((CHUNKS, COLS), tl.float32)
    lefts = tl.zeros((CHUNKS, COLS), tl.float32)
    for first in range(0, chunks, CHUNKS):
        at, inside = place(Partial, first, col0, chunks, D, D, CHUNKS, COLS)
        d_sums += tl.load(at, mask=inside, other=0.0)
        projections += tl.load(at + plane, mask=inside, other=0.0)
        lefts += tl.load(at + 2 * plane, mask=inside, other=0.0)
    return tl.sum(d_sums, 0), tl.sum(projections, 0), tl.sum(lefts, 0)


@triton.jit(do_not_specialize=["N", "share", "chunks", "width8", "trace", "first_view"])
def _second_moment_gradient_kernel(
    Product,  # [views asked for, N, 8·width8] float32: what M without its diagonal contributes, but for a factor
    A,  # [N, D]
    B,  # [N, D]; A where there is none
    Stats,  # [·, D] of the columns
    Diagonal,  # [R, D]
    Trace,  # [P, trace]: the power of two that is in the product; if DUAL, the diagonal of the Gram matrix
    GradLoss,  # [] or None
    GradOff,  # [R] or None
    GradDiagonal,  # [R, D] or None
    GradDistance,  # [] or None
    Partial,  # [views asked for, 3, chunks, D]: Σ dx̂, Σ dx̂·x̂ and Σ x̂ of each chunk; None if WHOLE
    GradA,  # [N, D]; any where not asked for
    GradB,  # [N, D]; any where not asked for
    N,
    D,
    x_stride,
    dx_stride,
    grad_off_stride,
    grad_diagonal_row,
    grad_diagonal_column,
    share,
    chunks,
    width8,
    trace,
    first_view,
    eps,
    floor,
    off_weight,
    distance_weight,
    penalty_weight,
    VIEWS: tl.constexpr,
    CROSS: tl.constexpr,
    CENTER: tl.constexpr,
    SCALE: tl.constexpr,
    DUAL: tl.constexpr,
    PENALTY: tl.constexpr,
    DISTANCE: tl.constexpr,
    PHASE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DX_TRANSPOSED: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """dx = factor·(dx̂ − mean of dx̂ − x̂·w·Σ dx̂·x̂) + 2·h·(x − mean) + 2·g·(x − other).

    h is the gradient in Σ of a column's squared deviations, g that of the distance. Program (c, r, v): the c-th COLS
    columns of a view; of the rows, the r-th ``share``.
    """
    SUMS: tl.constexpr = CENTER or SCALE != 0
    col0, view = tl.program_id(0) * COLS, tl.program_id(2) + first_view
    cols = col0 + tl.arange(0, COLS)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, N)
    width = width8 * 8
    Product += tl.program_id(2) * (N.to(tl.int64) * width)
    X, Y, DX = tl.where(view == 0, A, B), tl.where(view == 0, B, A), tl.where(view == 0, GradA, GradB)
    # M of a cross is one matrix; Gram matrices multiply the other view.
    matrix = 0 if CROSS else view
    gram = 1 - view if CROSS and DUAL else matrix
    x_mean = tl.load(Stats + view * D + cols, mask=cols < D, other=0.0)
    x_factor = tl.load(Stats + (VIEWS + view) * D + cols, mask=cols < D, other=0.0)
    y_mean, y_factor = x_mean, x_factor
    if CROSS:
        y_mean = tl.load(Stats + (1 - view) * D + cols, mask=cols < D, other=0.0)
        y_factor = tl.load(Stats + (VIEWS + 1 - view) * D + cols, mask=cols < D, other=0.0)
    weight = _given(GradOff, matrix * grad_off_stride, GradLoss, off_weight) * (2.0 if CROSS else 4.0)
    scale = weight / tl.load(Trace + gram * trace)
    column_term = _diagonal_gradient(
        GradDiagonal, GradLoss, Diagonal, matrix, cols, N, D, grad_diagonal_row, grad_diagonal_column, penalty_weight,
        PENALTY,
    ) * (1.0 if CROSS else 2.0)  # fmt: skip
    if DUAL:
        rounded = tl.load(Stats + (3 * VIEWS + matrix) * D + cols, mask=cols < D, other=0.0)
        column_term -= weight * rounded
        Trace += gram * trace + 1
    d_sum, projection, left = (
        tl.zeros((COLS,), tl.float32),
        tl.zeros((COLS,), tl.float32),
        tl.zeros((COLS,), tl.float32),
    )
    if SUMS:
        if PHASE == REST:
            part = Partial + tl.program_id(2) * (3 * chunks.to(tl.int64) * D)
            d_sum, projection, left = _merged(part, chunks, col0, D, CHUNKS, COLS)
        else:
            d_sums, projections = tl.zeros((ROWS, COLS), tl.float32), tl.zeros((ROWS, COLS), tl.float32)
            lefts = tl.zeros((ROWS, COLS), tl.float32)
            for row0 in range(begin, end, ROWS):
                d, x, hat = _tile(
                    Product, X, Y, Trace, row0, end, col0, N, D, width, x_stride, scale, weight, column_term,
                    x_mean, x_factor, y_mean, y_factor, CROSS, DUAL, TRANSPOSED, UPCAST, ROWS, COLS,
                )  # fmt: skip
                d_sums += d
                projections += d * hat
                lefts += hat
            d_sum, projection, left = tl.sum(d_sums, 0), tl.sum(projections, 0), tl.sum(lefts, 0)
    if PHASE == PARTIAL:
        plane = chunks.to(tl.int64) * D
        at = Partial + tl.program_id(2) * (3 * plane) + tl.program_id(1).to(tl.int64) * D + cols
        tl.store(at, d_sum, mask=cols < D)
        tl.store(at + plane, projection, mask=cols < D)
        tl.store(at + 2 * plane, left, mask=cols < D)
    else:
        # Σ x̂ is what rounding of the mean left, of a mean far from zero too much to pass over.
        d_mean, hat_mean = d_sum / N.to(tl.float32), left / N.to(tl.float32)
        if CENTER:
            projection -= d_mean * left
        if SCALE == 1:
            projection = projection / N.to(tl.float32)
        elif SCALE == 2:
            # A column whose norm is below eps is divided by eps, a constant.
            square = tl.load(Stats + (2 * VIEWS + view) * D + cols, mask=cols < D, other=0.0)
            projection = tl.where(tl.sqrt_rn(square) < eps, 0.0, projection)
        spread = tl.zeros((COLS,), tl.float32)
        if PENALTY == HINGE:
            square = tl.load(Stats + (2 * VIEWS + view) * D + cols, mask=cols < D, other=0.0)
            std = deviation(square, N, floor)
            slope = (-penalty_weight * tl.load(GradLoss).to(tl.float32)) / (std * (N - 1).to(tl.float32))
            spread = tl.where(std >= 1.0, 0.0, slope)
        apart = 2.0 * _given(GradDistance, 0, GradLoss, distance_weight)
        for row0 in range(begin, end, ROWS):
            d, x, hat = _tile(
                Product, X, Y, Trace, row0, end, col0, N, D, width, x_stride, scale, weight, column_term,
                x_mean, x_factor, y_mean, y_factor, CROSS, DUAL, TRANSPOSED, UPCAST, ROWS, COLS,
            )  # fmt: skip
            if CENTER:
                d -= d_mean[None, :]
                hat -= hat_mean[None, :]
            if SCALE != 0:
                d -= hat * projection[None, :]
            d *= x_factor[None, :]
            if PENALTY == HINGE:
                d += (x - x_mean[None, :]) * spread[None, :]
            if DISTANCE:
                y, inside = load_float(Y, row0, col0, end, D, x_stride, ROWS, COLS, TRANSPOSED, UPCAST)
                d += (x - y) * apart
            store_tile(DX, d, row0, col0, end, D, dx_stride, DX_TRANSPOSED)


class Grads(NamedTuple):
    """Gradients that came: of the loss [], off_diagonal [R], diagonal [R, D] and distance []; any strides."""

    loss: Tensor | None
    off: Tensor | None
    diagonal: Tensor | None
    distance: Tensor | None


def gradient(
    product: Tensor,
    a: Tensor,
    b: Tensor | None,
    columns: Columns,
    trace: Tensor,
    grads: Grads,
    options: Options,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """da, db: [N, D] in the dtype and layout of ``a``; [0] where not wanted.

    Args:
        product: [views wanted, N, D′] float32; trace: of ``off_diagonal``.
    """
    (n, d), views = a.shape, 1 if b is None else 2
    rows, cols = tile_of(d)
    summed = options.center or options.scale != 0
    chunks, share = chunks_of(n, d, options.dual and summed, split=not summed)
    asked = sum(wanted)
    partial = a.new_empty((asked, 3, chunks, d), dtype=torch.float32) if summed and chunks > 1 else None
    da, db = (torch.empty_like(a) if w else a.new_empty(0) for w in wanted)
    like = da if wanted[0] else db
    off, diagonal = grads.off, grads.diagonal
    phases = (PARTIAL, REST) if partial is not None else (WHOLE,) if summed else (REST,)
    for phase in phases:
        _second_moment_gradient_kernel[(triton.cdiv(d, cols), chunks, asked)](
            product, a, a if b is None else b, columns.stats, columns.diagonal, trace, *grads, partial,
            da if wanted[0] else db, db if wanted[1] else da,
            n, d, stride_of(a), stride_of(like),
            0 if off is None else off.stride(0), *((0, 0) if diagonal is None else diagonal.stride()),
            share, chunks, columns.hat.shape[2] // 8, trace.shape[1], 0 if wanted[0] else 1,
            options.eps, options.floor, *options.weights,
            VIEWS=views, CROSS=options.cross, CENTER=options.center, SCALE=options.scale, DUAL=options.dual,
            PENALTY=options.penalty if grads.loss is not None else 0,
            DISTANCE=views == 2 and not options.cross and (grads.loss is not None or grads.distance is not None),
            PHASE=phase.value, TRANSPOSED=is_transposed(a), DX_TRANSPOSED=is_transposed(like),
            UPCAST=upcast(a.dtype), ROWS=rows, COLS=cols, CHUNKS=CHUNKS, num_warps=WARPS,
        )  # fmt: skip
    return da, db
