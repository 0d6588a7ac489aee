"""Products of second_moment by tiles: M of a symmetric matrix by half, its squares without M, and what M multiplies.

See ``second_moment.py`` for the notation. Where the result has few tiles, several programs share the sum of each. There
are no atomics: the result is the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _configs
from ._common import Config, architecture, dot_precision
from ._configs import MOMENT_GRAM, MOMENT_PRODUCT
from ._matrices import load_tile, store_tile

# Programs wanted in a launch. Partial products take at most 2·4·PROGRAMS·block_m·block_n bytes: 8 MiB of small tiles,
# 32 MiB of large ones.
PROGRAMS = 256
# Row blocks of tiles that run at the same time, so that they share what they load.
GROUP = tl.constexpr(8)


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
def _squares(m, i0, j0, SYMMETRIC: tl.constexpr):
    """Σ_{i≠j} m_ij² of a tile; if SYMMETRIC, entries above the diagonal stand for two, and a tile on it holds both."""
    i, j = i0 + tl.arange(0, m.shape[0])[:, None], j0 + tl.arange(0, m.shape[1])[None, :]
    # Not 0 on the diagonal: NaN and infinity give NaN, as their difference with themselves does.
    apart = tl.where(i == j, m - m, m)
    value = apart * apart
    if SYMMETRIC:
        value = tl.where(i < j, 2.0 * value, tl.where(i == j, value, 0.0))
    # As a matrix of one row: Triton 3.6 does not compile the sum of a vector that a product was reduced to, for sm_100.
    return tl.sum(tl.reshape(tl.sum(value, 1).to(tl.float64), (1, m.shape[0])), 1)


@triton.jit(do_not_specialize=["N", "S", "C", "width8", "pitch8"])
def _second_moment_gram_kernel(
    A,  # [V, N, 8·width8]
    B,  # like A, or None where it is A
    Moments,  # [splits, V, S, 8·pitch8] or None
    SquareSums,  # [V, tiles] float64, without Moments
    N,
    S,
    C,
    width8,
    pitch8,
    DUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (t, h, v): tile t of AᵀB (or AAᵀ, if DUAL) of view v, over the h-th part of the sum."""
    SYMMETRIC: tl.constexpr = DUAL or B is None
    down, across = tl.cdiv(S, BLOCK_M), tl.cdiv(C, BLOCK_N)
    tile, view = tl.program_id(0), tl.program_id(2)
    tile_i, tile_j = tl.swizzle2d(tile // across, tile % across, down, across, GROUP)
    if SYMMETRIC & (tile_j < tile_i):
        if SquareSums is not None:
            tl.store(SquareSums + view * down * across + tile + tl.arange(0, 1), tl.zeros((1,), tl.float64))
        return
    i0, j0 = tile_i * BLOCK_M, tile_j * BLOCK_N
    # Rows start at 16-byte boundaries; the product with 8 lets the compiler know.
    width, pitch, height, columns = width8 * 8, pitch8 * 8, tl.cdiv(S, 8) * 8, tl.cdiv(C, 8) * 8
    A += tl.cast(view, tl.int64) * N * width
    total = width if DUAL else N
    share = tl.cdiv(tl.cdiv(total, BLOCK_K), tl.num_programs(1)) * BLOCK_K
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, total)
    right = A if B is None else B
    m = _tile_product(
        A, right, i0, j0, begin, end, N, height, columns, width, BLOCK_M, BLOCK_N, BLOCK_K, DUAL, PRECISION
    )
    if Moments is None:
        tl.store(SquareSums + view * down * across + tile + tl.arange(0, 1), _squares(m, i0, j0, SYMMETRIC))
    else:
        at = Moments + (tl.program_id(1) * tl.num_programs(2) + view) * (tl.cast(S, tl.int64) * pitch)
        store_tile(at, m, i0, j0, S, C, pitch)
        if SYMMETRIC & (i0 < j0):
            store_tile(at, tl.trans(m), j0, i0, S, C, pitch)


@triton.jit(do_not_specialize=["N", "C", "terms", "left8", "right8", "pitch8"])
def _second_moment_product_kernel(
    Left,  # [N, 8·left8]: zero beyond ``terms``
    Right,  # [terms, 8·right8], or if TRANSPOSED [C, 8·right8]
    Out,  # [N, 8·pitch8] float32
    N,
    C,
    terms,
    left8,
    right8,
    pitch8,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Out = Left · Right[:, :C], or Left · Rightᵀ; C is a multiple of 8."""
    blocks, across = tl.cdiv(N, BLOCK_M), tl.cdiv(C, BLOCK_N)
    block, column = tl.swizzle2d(tl.program_id(0) // across, tl.program_id(0) % across, blocks, across, GROUP)
    row0, col0 = block * BLOCK_M, column * BLOCK_N
    left, right, pitch = left8 * 8, right8 * 8, pitch8 * 8
    d = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, terms, BLOCK_K):
        a = load_tile(Left, row0, first, N, left, left, BLOCK_M, BLOCK_K)
        if TRANSPOSED:
            b = tl.trans(load_tile(Right, col0, first, C, terms, right, BLOCK_N, BLOCK_K))
        else:
            b = load_tile(Right, first, col0, terms, C, right, BLOCK_K, BLOCK_N)
        d = tl.dot(a, b, d, input_precision=PRECISION)
    store_tile(Out, d, row0, col0, N, C, pitch)


def _config(table: dict[tuple[int, int, bool], Config], z: Tensor, entries: int) -> Config:
    return table[architecture(z), z.element_size(), entries >= _configs.LARGE]


def gram(left: Tensor, right: Tensor | None, dual: bool, m: Tensor | None) -> Tensor | None:
    """Products of X̂, or sums of their squares without them.

    Args:
        left: [V, N, D′] of X̂; right: one more [1, N, D″], some of its columns, or ``None`` where it is ``left``.
        dual: ``m`` is ``left leftᵀ`` [V, N, N], else ``leftᵀ right`` [V, D′, D″].
        m: float32, its rows' stride a multiple of 8, written; or ``None``.

    Returns:
        Without ``m`` [V, ·] float64: to be summed, Σ_{i≠j} M_ij².
    """
    views, n, width = left.shape
    rows, columns = (n, n) if dual else (width, (left if right is None else right).shape[2])
    symmetric = dual or right is None
    config = _config(MOMENT_GRAM, left, views * rows * columns // (1 + symmetric))
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n)
    steps = triton.cdiv(width if dual else n, config.block_k)
    splits, out, squares = 1, m, None
    if m is None:
        squares = left.new_empty((views, tiles), dtype=torch.float64)
    else:
        splits = max(1, min(PROGRAMS * (1 + symmetric) // (views * tiles), steps // 2))
        if splits > 1:
            out = left.new_empty((splits, views, rows, m.stride(1)), dtype=torch.float32)
    _second_moment_gram_kernel[(tiles, splits, views)](
        left, right, out, squares, n, rows, columns, width // 8, 0 if m is None else m.stride(1) // 8,
        DUAL=dual, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        PRECISION=dot_precision(left.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits > 1:
        torch.sum(out[..., :columns], 0, out=m)
    return squares


def product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """``out`` [N, C] = ``left`` [N, K] · ``right`` [K, C] in float32; C a multiple of 8, as are the strides."""
    (n, terms), columns = left.shape, right.shape[1]
    transposed = right.stride(1) != 1
    config = _config(MOMENT_PRODUCT, left, n * columns)
    _second_moment_product_kernel[(triton.cdiv(n, config.block_m) * triton.cdiv(columns, config.block_n),)](
        left, right, out, n, columns, terms,
        left.stride(0) // 8, right.stride(1 if transposed else 0) // 8, out.stride(0) // 8,
        TRANSPOSED=transposed, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        PRECISION=dot_precision(left.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
