"""Means, scales and diagonals of second_moment's columns, and X̂ itself: see ``second_moment.py`` for the notation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import upcast
from .second_moment_backward import load_standardized, load_tile, operand_kind, store_tile

# Programs wanted in a launch of a pass over [N, D].
PASS_PROGRAMS = 512
ROWS, COLS = 32, 64


@triton.jit
def _pivot(X, cols, D, CENTER: tl.constexpr, UPCAST: tl.constexpr):
    """The first row in float32: what is left of ``x`` without it is of the size of the deviations, so that a mean that
    is far from zero costs no accuracy. 0 without CENTER."""
    pivot = tl.zeros(cols.shape, tl.float32)
    if CENTER:
        first = tl.load(X + cols, mask=cols < D, other=0.0)
        if UPCAST:
            first = first.to(tl.float32)
        pivot += first.to(tl.float32)
    return pivot


@triton.jit
def _absorb(x, pivot, inside, seen, count, mean, square, CENTER: tl.constexpr):
    """``count`` more rows, a tile of them, in the running mean and sum of squared deviations of ``seen`` rows.

    Means are those of x − pivot. Also returns the tile's deviations from its own mean, and that mean's from the running
    one (Chan, Golub and LeVeque, 1983). Without CENTER means are 0 and deviations are x.
    """
    deviation = x
    delta = tl.zeros_like(mean)
    if CENTER:
        x = tl.where(inside, x - pivot[None, :], 0.0)
        own = tl.sum(x, 0) / count
        deviation = tl.where(inside, x - own[None, :], 0.0)
        delta = own - mean
    weight = count / (seen + count)
    square += tl.sum(deviation * deviation, 0) + delta * delta * (seen * weight)
    return mean + delta * weight, square, deviation, delta


@triton.jit(do_not_specialize=["N", "share"])
def _second_moment_statistics_kernel(
    A,  # [N, D]
    B,  # [N, D] or None
    Partial,  # [2, chunks, D], with B [5, chunks, D]: mean less pivot and squared deviations, of a and of b; joint sum
    N,
    D,
    share,
    CROSS: tl.constexpr,
    CENTER: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program (c, r): COLS columns of the r-th ``share`` rows; b joins a by Σ of products, or of (a − b)²."""
    col0 = tl.program_id(0) * COLS
    cols = col0 + tl.arange(0, COLS)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, N)
    a_mean, a_square = tl.zeros((COLS,), tl.float32), tl.zeros((COLS,), tl.float32)
    b_mean, b_square = tl.zeros((COLS,), tl.float32), tl.zeros((COLS,), tl.float32)
    joint = tl.zeros((COLS,), tl.float32)
    a_pivot = _pivot(A, cols, D, CENTER, UPCAST)
    if B is not None:
        b_pivot = _pivot(B, cols, D, CENTER, UPCAST)
    for row0 in range(begin, end, ROWS):
        inside = (row0 + tl.arange(0, ROWS) < end)[:, None] & (cols < D)[None, :]
        seen, count = tl.cast(row0 - begin, tl.float32), tl.cast(tl.minimum(end - row0, ROWS), tl.float32)
        a = load_tile(A, row0, col0, end, D, D, ROWS, COLS)
        if UPCAST:
            a = a.to(tl.float32)
        a = a.to(tl.float32)
        a_mean, a_square, a_deviation, a_delta = _absorb(a, a_pivot, inside, seen, count, a_mean, a_square, CENTER)
        if B is not None:
            b = load_tile(B, row0, col0, end, D, D, ROWS, COLS)
            if UPCAST:
                b = b.to(tl.float32)
            b = b.to(tl.float32)
            b_mean, b_square, b_deviation, b_delta = _absorb(b, b_pivot, inside, seen, count, b_mean, b_square, CENTER)
            if CROSS:
                joint += tl.sum(a_deviation * b_deviation, 0) + a_delta * b_delta * (seen * count / (seen + count))
            else:
                joint += tl.sum((a - b) * (a - b), 0)
    at = Partial + tl.program_id(1).to(tl.int64) * D + cols
    plane = tl.num_programs(1).to(tl.int64) * D
    tl.store(at, a_mean, mask=cols < D)
    tl.store(at + plane, a_square, mask=cols < D)
    if B is not None:
        tl.store(at + 2 * plane, b_mean, mask=cols < D)
        tl.store(at + 3 * plane, b_square, mask=cols < D)
        tl.store(at + 4 * plane, joint, mask=cols < D)


@triton.jit
def _factor(square, N, eps, SCALE: tl.constexpr):
    factor = tl.full(square.shape, 1.0, tl.float32)
    if SCALE == 1:
        factor = tl.div_rn(factor, tl.sqrt_rn(square / N + eps))
    elif SCALE == 2:
        factor = tl.div_rn(factor, tl.maximum(tl.sqrt_rn(square), eps, propagate_nan=tl.PropagateNan.ALL))
    return factor


@triton.jit(do_not_specialize=["N", "share", "chunks"])
def _second_moment_merge_kernel(
    Partial,  # [2, chunks, D], with B [5, chunks, D]
    A,  # [N, D]
    B,  # [N, D] or None
    Mean,  # [V, D]
    Factor,  # [V, D]
    Diagonal,  # [R, D]
    Distance,  # [D], for two batches without CROSS
    N,
    D,
    share,
    chunks,
    eps,
    CROSS: tl.constexpr,
    CENTER: tl.constexpr,
    SCALE: tl.constexpr,
    COLS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    plane = chunks.to(tl.int64) * D
    a_mean, a_square = tl.zeros((COLS,), tl.float32), tl.zeros((COLS,), tl.float32)
    b_mean, b_square = tl.zeros((COLS,), tl.float32), tl.zeros((COLS,), tl.float32)
    joint = tl.zeros((COLS,), tl.float32)
    for chunk in range(chunks):
        seen, count = (chunk * share).to(tl.float32), tl.minimum(N - chunk * share, share).to(tl.float32)
        weight = count / (seen + count)
        at = Partial + tl.cast(chunk, tl.int64) * D + cols
        a_delta = tl.load(at, mask=cols < D, other=0.0) - a_mean
        a_square += tl.load(at + plane, mask=cols < D, other=0.0) + a_delta * a_delta * (seen * weight)
        a_mean += a_delta * weight
        if B is not None:
            b_delta = tl.load(at + 2 * plane, mask=cols < D, other=0.0) - b_mean
            b_square += tl.load(at + 3 * plane, mask=cols < D, other=0.0) + b_delta * b_delta * (seen * weight)
            b_mean += b_delta * weight
            joint += tl.load(at + 4 * plane, mask=cols < D, other=0.0)
            if CROSS:
                joint += a_delta * b_delta * (seen * weight)
    a_factor = _factor(a_square, N, eps, SCALE)
    tl.store(Mean + cols, a_mean + _pivot(A, cols, D, CENTER, UPCAST), mask=cols < D)
    tl.store(Factor + cols, a_factor, mask=cols < D)
    if B is not None:
        b_factor = _factor(b_square, N, eps, SCALE)
        tl.store(Mean + D + cols, b_mean + _pivot(B, cols, D, CENTER, UPCAST), mask=cols < D)
        tl.store(Factor + D + cols, b_factor, mask=cols < D)
    if CROSS:
        tl.store(Diagonal + cols, joint * a_factor * b_factor, mask=cols < D)
    else:
        tl.store(Diagonal + cols, a_square * a_factor * a_factor, mask=cols < D)
        if B is not None:
            tl.store(Diagonal + D + cols, b_square * b_factor * b_factor, mask=cols < D)
            tl.store(Distance + cols, joint, mask=cols < D)


@triton.jit(do_not_specialize=["N", "share", "width8"])
def _second_moment_standardize_kernel(
    A,  # [N, D]
    B,  # [N, D] or None
    Mean,  # [V, D]
    Factor,  # [V, D]
    Hat,  # [V, N, 8·width8]: zero beyond D
    Diagonal,  # [R, chunks, D] or None: that of M, as Hat is rounded
    N,
    D,
    share,
    width8,
    CROSS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    col0 = tl.program_id(0) * COLS
    cols = col0 + tl.arange(0, COLS)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, N)
    width = width8 * 8
    first, second = tl.zeros((COLS,), tl.float32), tl.zeros((COLS,), tl.float32)
    for row0 in range(begin, end, ROWS):
        _, a = load_standardized(A, Mean, Factor, row0, col0, end, D, D, ROWS, COLS, UPCAST)
        a = a.to(Hat.dtype.element_ty)
        store_tile(Hat, a, row0, col0, end, width, width)
        a = a.to(tl.float32)
        if B is not None:
            _, b = load_standardized(B, Mean + D, Factor + D, row0, col0, end, D, D, ROWS, COLS, UPCAST)
            b = b.to(Hat.dtype.element_ty)
            store_tile(Hat + N.to(tl.int64) * width, b, row0, col0, end, width, width)
            b = b.to(tl.float32)
            if CROSS:
                first += tl.sum(a * b, 0)
            else:
                second += tl.sum(b * b, 0)
        if CROSS == 0:
            first += tl.sum(a * a, 0)
    if Diagonal is not None:
        chunks = tl.num_programs(1)
        at = Diagonal + tl.program_id(1).to(tl.int64) * D + cols
        tl.store(at, first, mask=cols < D)
        if (B is not None) and (not CROSS):
            tl.store(at + chunks.to(tl.int64) * D, second, mask=cols < D)


def _chunks(n: int, columns: int) -> tuple[int, int]:
    """Into how many chunks a pass over [n, columns] splits its rows, and the rows of each."""
    wanted = max(1, min(triton.cdiv(n, ROWS), PASS_PROGRAMS // triton.cdiv(columns, COLS)))
    share = triton.cdiv(n, wanted)
    return triton.cdiv(n, share), share


def statistics(
    a: Tensor, b: Tensor | None, cross: bool, center: bool, scale: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean [V, D], factor [V, D], diagonal [R, D], distance []: float32."""
    n, d = a.shape
    views = 1 if b is None else 2
    chunks, share = _chunks(n, d)
    partial = a.new_empty((5 if views == 2 else 2, chunks, d), dtype=torch.float32)
    mean, factor = (a.new_empty((views, d), dtype=torch.float32) for _ in range(2))
    diagonal = a.new_empty((1 if cross else views, d), dtype=torch.float32)
    distance = a.new_zeros(d, dtype=torch.float32)
    blocks = triton.cdiv(d, COLS)
    _second_moment_statistics_kernel[(blocks, chunks)](
        a, b, partial, n, d, share,
        CROSS=cross, CENTER=center, ROWS=ROWS, COLS=COLS, UPCAST=upcast(a.dtype), num_warps=4,
    )  # fmt: skip
    _second_moment_merge_kernel[(blocks,)](
        partial, a, b, mean, factor, diagonal, distance, n, d, share, chunks, eps,
        CROSS=cross, CENTER=center, SCALE=scale, COLS=COLS, UPCAST=upcast(a.dtype), num_warps=1,
    )  # fmt: skip
    return mean, factor, diagonal, distance.sum()


def standardize(
    a: Tensor, b: Tensor | None, mean: Tensor, factor: Tensor, cross: bool, dual: bool
) -> tuple[Tensor, Tensor | None]:
    """X̂ [V, N, D′], D′ = D rounded up to a multiple of 8, in the dtype of the products; and if ``dual``, M_ii [R, D].

    That diagonal is the sum over the rounded X̂, which are what the Gram matrices have: nothing is left of it.
    """
    n, d = a.shape
    views = 1 if b is None else 2
    chunks, share = _chunks(n, d)
    width = triton.cdiv(d, 8) * 8
    hat = a.new_empty((views, n, width), dtype=operand_kind(a.dtype))
    partial = a.new_empty((1 if cross else views, chunks, d), dtype=torch.float32) if dual else None
    _second_moment_standardize_kernel[(triton.cdiv(d, COLS), chunks)](
        a, b, mean, factor, hat, partial, n, d, share, width // 8,
        CROSS=cross, ROWS=ROWS, COLS=COLS, UPCAST=upcast(a.dtype), num_warps=4,
    )  # fmt: skip
    return hat, None if partial is None else partial.sum(1)
