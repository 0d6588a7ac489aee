"""Second moments of columns, M = ÂᵀB̂ [D, D] (or ÂᵀÂ and B̂ᵀB̂), from tiles of M or from N × N Gram matrices.

    x̂ = (x − mean)·factor                 per column
    primal   off = Σ_{i≠j} M_ij²            dÂ = 2g·B̂ offdiag(M)ᵀ,  dB̂ = 2g·Â offdiag(M)
    dual     off = ⟨G_A, G_B⟩ − Σ_i M_ii²   dÂ = 2g·(G_B Â − B̂ diag(M_ii)), dB̂ alike;  G_X = X̂X̂ᵀ
    dx = factor·(dx̂ − mean_n dx̂ − x̂·w·Σ_n dx̂·x̂),   w = 1/N ("variance"), 1 ("norm", if above eps), 0 ("none")

with g the gradient of off; B̂ = Â doubles the gradient. To dÂ come B̂·h and to dB̂ Â·h, h that of M_ii.

Forward: the columns' statistics, by chunks of rows that a second kernel merges; X̂ in the dtype of the input, once, so
that products load their factors as they are; then tiles of the product, whose squares are summed on the spot. M and G
are symmetric where Â = B̂ and always, so only tiles that reach the diagonal or lie above it are computed. Where the
result has few tiles, several programs share the sum of each, and a second kernel adds them up. There are no atomics:
the result is the same in every run.

Backward: offdiag(M) or G goes through one product, whose epilogue adds the terms of the diagonals and takes the column
sums; a second kernel finishes elementwise. In the dual form the diagonal of G, which is the largest part of it, is a
term of its own in float32. If M was not kept, its columns are computed again a chunk at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _second_moment_configs
from ._common import architecture, dot_precision
from ._second_moment_configs import GRAM, PAIR
from .second_moment_backward import (
    GROUP,
    Batch,
    Gradient,
    as_operand,
    load_tile,
    store_tile,
)
from .second_moment_statistics import standardize, statistics

__all__ = ["second_moment", "second_moment_backward"]

# Programs wanted in a launch of products. Partial products take at most 2·4·PROGRAMS·block_m·block_n bytes: 8 MiB of
# small tiles, 32 MiB of large ones.
PROGRAMS = 256
# Numbers of M that the backward computes again at a time (16 MiB in float32).
CHUNK = 4 << 20
COMBINE = 32


@triton.jit
def _tile_product(
    A, B, i0, j0, begin, end, N, height, columns, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DUAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of ``A.T @ B``, or of ``A @ B.T`` if DUAL, over rows (features) [begin, end).

    A is zero beyond ``height`` columns, B is not read beyond ``columns``; both are multiples of 8.
    """
    m = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(begin, end, BLOCK_K):
        if DUAL:
            a = load_tile(A, i0, k0, N, width, width, BLOCK_M, BLOCK_K)
            b = load_tile(B, j0, k0, N, width, width, BLOCK_N, BLOCK_K)
            m = tl.dot(a, tl.trans(b), m, input_precision=PRECISION)
        else:
            a = load_tile(A, k0, i0, N, height, width, BLOCK_K, BLOCK_M)
            b = load_tile(B, k0, j0, N, columns, width, BLOCK_K, BLOCK_N)
            m = tl.dot(tl.trans(a), b, m, input_precision=PRECISION)
    return m


@triton.jit
def _finish_tile(
    g, h, i0, j0, S, C, Squares, Moments, view, DUAL: tl.constexpr, SYMMETRIC: tl.constexpr, PAIR: tl.constexpr
):
    """Store what each row of a tile adds to ⟨G, H⟩ (DUAL) or to Σ_{i≠j} g_ij², and the moments if they are kept.

    If SYMMETRIC, entries above the diagonal stand for two, and a tile above it is stored with its mirror image. A tile
    on it holds both sides already.
    """
    i, j = i0 + tl.arange(0, g.shape[0])[:, None], j0 + tl.arange(0, g.shape[1])[None, :]
    if DUAL:
        value = g * h
    else:
        # Not 0 on the diagonal: NaN and infinity give NaN, as their difference with themselves does.
        apart = tl.where(i == j, g - g, g)
        value = apart * apart
    if SYMMETRIC:
        value = tl.where(i < j, 2.0 * value, tl.where(i == j, value, 0.0))
    tl.store(Squares + tl.arange(0, g.shape[0]), tl.sum(value, 1))
    if Moments is not None:
        plane = tl.cast(S, tl.int64) * C
        store_tile(Moments + view * plane, g, i0, j0, S, C, C)
        if PAIR:
            store_tile(Moments + plane, h, i0, j0, S, C, C)
        if SYMMETRIC & (i0 < j0):
            store_tile(Moments + view * plane, tl.trans(g), j0, i0, S, C, C)
            if PAIR:
                store_tile(Moments + plane, tl.trans(h), j0, i0, S, C, C)


@triton.jit(do_not_specialize=["N", "S", "C", "width8"])
def _second_moment_gram_kernel(
    A,  # [V, N, 8·width8]
    B,  # like A, or None where it is A
    Squares,  # [V, tiles, BLOCK_M], zero
    Moments,  # [V, S, C] or None; of a pair [2, S, C]
    Partial,  # [splits, V, S, C] or None: in place of both; of a pair [splits, 2, S, C]
    N,
    S,
    C,
    width8,
    DUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (t, h, v): tile t of AᵀB (or AAᵀ, if DUAL; and of BBᵀ) of view v, over the h-th part of the sum."""
    SYMMETRIC: tl.constexpr = DUAL or B is None
    PAIR: tl.constexpr = DUAL and B is not None
    down, across = tl.cdiv(S, BLOCK_M), tl.cdiv(C, BLOCK_N)
    tile, view = tl.program_id(0), tl.program_id(2)
    tile_i, tile_j = tl.swizzle2d(tile // across, tile % across, down, across, GROUP)
    if SYMMETRIC & (tile_j < tile_i):
        return
    i0, j0 = tile_i * BLOCK_M, tile_j * BLOCK_N
    # Rows start at 16-byte boundaries; the product with 8 lets the compiler know.
    width, height, columns = width8 * 8, tl.cdiv(S, 8) * 8, tl.cdiv(C, 8) * 8
    A += tl.cast(view, tl.int64) * N * width
    total = width if DUAL else N
    share = tl.cdiv(tl.cdiv(total, BLOCK_K), tl.num_programs(1)) * BLOCK_K
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, total)
    right = A if B is None or PAIR else B
    m = _tile_product(
        A, right, i0, j0, begin, end, N, height, columns, width, BLOCK_M, BLOCK_N, BLOCK_K, DUAL, PRECISION
    )
    other = m
    if PAIR:
        other = _tile_product(
            B, B, i0, j0, begin, end, N, height, columns, width, BLOCK_M, BLOCK_N, BLOCK_K, DUAL, PRECISION
        )
    if Partial is not None:
        planes = 2 if PAIR else tl.num_programs(2)
        plane = tl.cast(S, tl.int64) * C
        at = Partial + (tl.program_id(1) * planes + view) * plane
        store_tile(at, m, i0, j0, S, C, C)
        if PAIR:
            store_tile(at + plane, other, i0, j0, S, C, C)
    else:
        at = Squares + (view * down * across + tile) * BLOCK_M
        _finish_tile(m, other, i0, j0, S, C, at, Moments, view, DUAL, SYMMETRIC, PAIR)


@triton.jit(do_not_specialize=["splits", "S", "C"])
def _second_moment_combine_kernel(
    Partial,  # [splits, V, S, C]; of a pair [splits, 2, S, C]
    Squares,  # [V, tiles, BLOCK], zero
    Moments,  # like Partial without its first dimension, or None
    splits,
    S,
    C,
    DUAL: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (t, v): add up a tile that several programs shared, and do with it what one alone would have done."""
    across = tl.cdiv(C, BLOCK)
    tile, view = tl.program_id(0), tl.program_id(1)
    if SYMMETRIC & (tile % across < tile // across):
        return
    i0, j0 = tile // across * BLOCK, tile % across * BLOCK
    plane = tl.cast(S, tl.int64) * C
    planes = 2 if PAIR else tl.num_programs(1)
    m, other = tl.zeros((BLOCK, BLOCK), tl.float32), tl.zeros((BLOCK, BLOCK), tl.float32)
    for split in range(splits):
        at = Partial + (split * planes + view) * plane
        m += load_tile(at, i0, j0, S, C, C, BLOCK, BLOCK)
        if PAIR:
            other += load_tile(at + plane, i0, j0, S, C, C, BLOCK, BLOCK)
    if not PAIR:
        other = m
    at = Squares + (view * tl.num_programs(0) + tile) * BLOCK
    _finish_tile(m, other, i0, j0, S, C, at, Moments, view, DUAL, SYMMETRIC, PAIR)


def gram(left: Tensor, right: Tensor | None, dual: bool, rows: int, columns: int, moments: Tensor | None) -> Tensor:
    """Sums of squares of the products of X̂, and the products themselves if there is room for them.

    Args:
        left: [V, N, D′] of :func:`standardize`; right: one more [1, N, D′], or ``None`` where it is ``left``.
        dual: False for ``leftᵀ right`` [rows, columns], True for ``left leftᵀ`` (and ``right rightᵀ``) [N, N].
        moments: [V, rows, columns] (a pair's [2, N, N]) float32, written; or ``None``.

    Returns:
        [V, ·] float32: to be summed, Σ_{i≠j} M_ij², or if ``dual`` ‖G‖² (a pair's ⟨G_A, G_B⟩).

    A library's product in place of the tiles is one branch here: it writes ``moments``, and torch sums their squares.
    """
    views, n, width = left.shape
    symmetric, pair = dual or right is None, dual and right is not None
    large = views * rows * columns // (1 + symmetric) >= _second_moment_configs.LARGE
    config = (PAIR if pair else GRAM)[architecture(left), left.element_size(), large]
    grid = triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n)
    steps = triton.cdiv(width if dual else n, config.block_k)
    splits = max(1, min(PROGRAMS * (1 + symmetric) // (views * grid), steps // 2))
    planes = 2 if pair else views
    partial = left.new_empty((splits, planes, rows, columns), dtype=torch.float32) if splits > 1 else None
    tiles, block = grid, config.block_m
    if partial is not None:
        tiles, block = triton.cdiv(rows, COMBINE) * triton.cdiv(columns, COMBINE), COMBINE
    squares = left.new_zeros((views, tiles * block), dtype=torch.float32)
    _second_moment_gram_kernel[(grid, splits, views)](
        left, right, squares, moments if partial is None else None, partial,
        n, rows, columns, width // 8,
        DUAL=dual, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        PRECISION=dot_precision(left.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if partial is not None:
        _second_moment_combine_kernel[(tiles, views)](
            partial, squares, moments, splits, rows, columns,
            DUAL=dual, SYMMETRIC=symmetric, PAIR=pair, BLOCK=COMBINE, num_warps=4,
        )  # fmt: skip
    return squares


def _gram_of(hat: Tensor, view: int, features: int, left: int | None = None, first: int = 0) -> Tensor:
    """X̂X̂ᵀ [N, N] of a view; or with ``left``, a chunk of columns ``first`` … of L̂ᵀX̂ [D, ·], some of them of zeros."""
    n, width = hat.shape[1:]
    if left is None:
        moments = hat.new_empty((1, n, n), dtype=torch.float32)
        gram(hat[view : view + 1], None, True, n, n, moments)
    else:
        columns = min(max(128, CHUNK // features // 128 * 128), width - first)
        moments = hat.new_empty((1, features, columns), dtype=torch.float32)
        part = hat[view : view + 1, :, first : first + columns]
        gram(hat[left : left + 1], part, False, features, columns, moments)
    return moments[0]


def second_moment(
    a: Tensor, b: Tensor | None, cross: bool, center: bool, scale: int, eps: float, dual: bool, keep: bool
) -> tuple[Tensor, ...]:
    """Squares off the diagonal, and the diagonal, of M.

    Args:
        a, b: [N, D] contiguous; float32, bfloat16 or float16.
        cross: M = ÂᵀB̂, else ÂᵀÂ and, with ``b``, B̂ᵀB̂.
        center, scale, eps: how columns are standardized; scale 0 not at all, 1 by the variance, 2 by the norm.
        dual: N × N Gram matrices instead of D × D tiles; keep: return what the backward can use again.

    Returns:
        off_diagonal [R], diagonal [R, D], distance [] (of two batches without ``cross``, else 0), mean [V, D],
        factor [V, D], moments (``keep``: M [R, D, D], if ``dual`` X̂X̂ᵀ [V, N, N]; else [0]): float32.
    """
    (n, d), views = a.shape, 1 if b is None else 2
    with torch.cuda.device_of(a):
        mean, factor, diagonal, distance = statistics(a, b, cross, center, scale, eps)
        hat, rounded = standardize(a, b, mean, factor, cross, dual)
        shape = (views, n, n) if dual else (len(diagonal), d, d)
        moments = a.new_empty(shape if keep else 0, dtype=torch.float32)
        left, right = (hat[:1], hat[1:]) if cross else (hat, None)
        squares = gram(left, right, dual, *shape[1:], moments if keep else None)
        off = squares.double().sum(1)
        if rounded is not None:  # nearly all of it may be the diagonal
            off = (off - rounded.double().square().sum(1)).clamp_min(0)
    return off.float(), diagonal, distance, mean, factor, moments


def second_moment_backward(
    grad_off: Tensor,
    grad_diagonal: Tensor,
    grad_distance: Tensor,
    a: Tensor,
    b: Tensor | None,
    diagonal: Tensor,
    mean: Tensor,
    factor: Tensor,
    moments: Tensor,
    cross: bool,
    center: bool,
    scale: int,
    eps: float,
    dual: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients, from those of off_diagonal [R], diagonal [R, D] and distance [].

    The other arguments are those of :func:`second_moment` and what it returned.

    Returns:
        da, db: [N, D] in the dtype of ``a``; [0] where not needed.
    """
    batches = [Batch(x, mean[v], factor[v]) for v, x in enumerate((a, b)) if x is not None]
    features, kept, grads = a.shape[1], moments.numel() > 0, [a.new_empty(0), a.new_empty(0)]
    with torch.cuda.device_of(a):
        hat, rounded = standardize(a, b, mean, factor, cross, dual)
        for v, needed in enumerate((need_a, need_b)[: len(batches)]):
            if not needed:
                continue
            m, partner = (0, 1 - v) if cross else (v, v)
            weight = grad_off[m] * (2 if cross else 4)
            column_term, row_term = grad_diagonal[m] * (1 if cross else 2), None
            if rounded is not None:
                g = moments[partner] if kept else _gram_of(hat, partner, features)
                row_term, column_term = weight * g.diagonal(), column_term - weight * rounded[m]
            gradient = Gradient(batches[v], batches[partner] if cross else None, column_term, row_term)
            first = 0
            while first < features:
                if rounded is None and kept:
                    g = moments[m].T if cross and v == 0 else moments[m]
                elif rounded is None:
                    g = _gram_of(hat, v, features, partner, first)
                operand, power = as_operand(g, first, hat.dtype)
                factors = (operand, hat[v]) if dual else (hat[partner], operand)
                gradient.product(weight if power is None else weight / power, *factors, first)
                first += factors[1].shape[1]
            other = None if b is None or cross else (b, a)[v]
            grads[v] = gradient.finish(other, grad_distance, center, scale, eps)
    return grads[0], grads[1]
