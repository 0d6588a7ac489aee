"""Gradients of second_moment: see ``second_moment.py`` for the notation and the formulas."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _second_moment_configs
from ._common import architecture, dot_precision, upcast
from ._second_moment_configs import PRODUCT
from ._tiles import padded

# A tile of the last elementwise pass.
ROWS, COLS = 32, 64
# Row blocks of tiles that run at the same time, so that they share what they load.
GROUP = tl.constexpr(8)


@triton.jit
def _place(X, row0, col0, height, width, stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Addresses of ``X[row0 : row0 + ROWS, col0 : col0 + COLS]``, and which of them are inside [height, width].

    X may have more than 2^31 elements, so the corner is a 64-bit number; within a tile 32 bits do, and half the
    registers.
    """
    rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    corner = X + (tl.cast(row0, tl.int64) * stride + col0)
    return corner + (rows * stride + cols), (rows < height - row0) & (cols < width - col0)


@triton.jit
def load_tile(X, row0, col0, height, width, stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """``X[row0 : row0 + ROWS, col0 : col0 + COLS]``, zero outside [height, width]."""
    at, inside = _place(X, row0, col0, height, width, stride, ROWS, COLS)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def store_tile(X, tile, row0, col0, height, width, stride):
    """The part of ``tile`` inside [height, width] at ``X[row0 : …, col0 : …]``."""
    at, inside = _place(X, row0, col0, height, width, stride, tile.shape[0], tile.shape[1])
    tl.store(at, tile, mask=inside)


@triton.jit
def load_standardized(
    X, Mean, Factor, row0, col0, height, width, stride,
    ROWS: tl.constexpr, COLS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``x`` and ``x̂ = (x − mean)·factor`` of a tile in float32, zero outside [height, width]."""
    at, inside = _place(X, row0, col0, height, width, stride, ROWS, COLS)
    x = tl.load(at, mask=inside, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    x = x.to(tl.float32)
    cols = col0 + tl.arange(0, COLS)
    mean = tl.load(Mean + cols, mask=cols < width, other=0.0)
    factor = tl.load(Factor + cols, mask=cols < width, other=0.0)
    return x, tl.where(inside, (x - mean[None, :]) * factor[None, :], 0.0)


@triton.jit(do_not_specialize=["N", "C", "terms", "left8", "right8"])
def _second_moment_product_kernel(
    Left,  # [N, ·]: Ŷ, or G_Y without its diagonal
    Right,  # [terms, ·]: offdiag(M), or X̂; this many columns of it
    Scale,  # []
    X,  # [N, D]
    Mean,  # [D]
    Factor,  # [D]
    Y,  # [N, D] or None where it is X
    YMean,  # [D], with Y
    YFactor,  # [D], with Y
    ColumnTerm,  # [D]: times ŷ
    RowTerm,  # [N] or None: times x̂
    DHat,  # [N, D]: gradient in x̂
    Sums,  # [3, blocks, D]: Σ dx̂, Σ dx̂·x̂ and Σ x̂ over the rows of each block
    N,
    D,
    C,
    terms,
    left8,
    right8,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dx̂ = scale·Left·Right + ŷ·column term + row term·x̂ in columns [0, C) of the D that a row of X has."""
    blocks, across = tl.cdiv(N, BLOCK_M), tl.cdiv(C, BLOCK_N)
    block, column = tl.swizzle2d(tl.program_id(0) // across, tl.program_id(0) % across, blocks, across, GROUP)
    row0, col0 = block * BLOCK_M, column * BLOCK_N
    # Rows of both factors start at 16-byte boundaries; the product with 8 lets the compiler know.
    left, right, columns = left8 * 8, right8 * 8, tl.cdiv(C, 8) * 8
    d = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, terms, BLOCK_K):
        a = load_tile(Left, row0, first, N, left, left, BLOCK_M, BLOCK_K)
        b = load_tile(Right, first, col0, terms, columns, right, BLOCK_K, BLOCK_N)
        d = tl.dot(a, b, d, input_precision=PRECISION)
    d = d * tl.load(Scale)

    cols = col0 + tl.arange(0, BLOCK_N)
    _, x = load_standardized(X, Mean, Factor, row0, col0, N, C, D, BLOCK_M, BLOCK_N, UPCAST)
    column_term = tl.load(ColumnTerm + cols, mask=cols < C, other=0.0)[None, :]
    if Y is not None:
        _, y = load_standardized(Y, YMean, YFactor, row0, col0, N, C, D, BLOCK_M, BLOCK_N, UPCAST)
        d += y * column_term
    else:
        d += x * column_term
    if RowTerm is not None:
        rows = row0 + tl.arange(0, BLOCK_M)
        d += x * tl.load(RowTerm + rows, mask=rows < N, other=0.0)[:, None]
    store_tile(DHat, d, row0, col0, N, C, D)
    at, plane = Sums + tl.cast(block, tl.int64) * D + cols, tl.cast(blocks, tl.int64) * D
    tl.store(at, tl.sum(d, 0), mask=cols < C)
    tl.store(at + plane, tl.sum(d * x, 0), mask=cols < C)
    tl.store(at + 2 * plane, tl.sum(x, 0), mask=cols < C)


@triton.jit
def _second_moment_input_gradient_kernel(
    DHat,  # [N, D]: gradient in x̂
    Totals,  # [3, D]: its column sums, those of dx̂·x̂, and those of x̂
    X,  # [N, D]
    Mean,  # [D]
    Factor,  # [D]
    Other,  # [N, D] or None: the other batch, where the distance has a gradient
    GradDistance,  # [], with Other
    DX,  # [N, D]
    N,
    D,
    eps,
    CENTER: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dx = factor·(dx̂ − mean of dx̂ − x̂·w·Σ dx̂·x̂) + 2·grad_distance·(x − other)."""
    row0, col0 = tl.program_id(0) * ROWS, tl.program_id(1) * COLS
    cols = col0 + tl.arange(0, COLS)
    x, hat = load_standardized(X, Mean, Factor, row0, col0, N, D, D, ROWS, COLS, UPCAST)
    d = load_tile(DHat, row0, col0, N, D, D, ROWS, COLS)
    factor = tl.load(Factor + cols, mask=cols < D, other=0.0)
    if SCALE != 0:
        along = tl.load(Totals + D + cols, mask=cols < D, other=0.0)
    if CENTER:
        d_mean = tl.load(Totals + cols, mask=cols < D, other=0.0) / N
        d -= d_mean[None, :]
        if SCALE != 0:
            # Σ x̂ is what rounding of the mean left, of a mean far from zero too much to pass over.
            left = tl.load(Totals + 2 * D + cols, mask=cols < D, other=0.0)
            along -= d_mean * left
            hat -= (left / N)[None, :]
    if SCALE != 0:
        # A column whose norm is below eps is divided by eps, a constant; the same division made its factor.
        along = along / N if SCALE == 1 else tl.where(factor == tl.div_rn(1.0, eps), 0.0, along)
        d -= hat * along[None, :]
    d *= factor[None, :]
    if Other is not None:
        other = load_tile(Other, row0, col0, N, D, D, ROWS, COLS)
        if UPCAST:
            other = other.to(tl.float32)
        d += (x - other.to(tl.float32)) * (2.0 * tl.load(GradDistance))
    store_tile(DX, d, row0, col0, N, D, D)


class Batch(NamedTuple):
    """A batch [N, D] and what standardizes its columns, [D] each."""

    x: Tensor
    mean: Tensor
    factor: Tensor

    def columns(self, first: int) -> Batch:
        return Batch(self.x[:, first:], self.mean[first:], self.factor[first:])


def as_operand(moments: Tensor, first: int, kind: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """``moments`` without the entries (first + j, j), in ``kind``, and the power of two that is then in them.

    A second moment is a sum over rows (or features) and may pass float16's 65504: the largest is brought to 2^13 …
    2^14. The smaller ones stay normal numbers down to 2^−27 of it.
    """
    factor = None
    if kind == torch.float16:
        largest = moments.abs().nan_to_num(0.0, 0.0).amax()
        factor = torch.ldexp(torch.ones_like(largest), 14 - torch.frexp(largest).exponent.clamp(min=-100))
        moments = moments * factor
    operand = padded(moments.to(kind, copy=True, memory_format=torch.contiguous_format))
    operand.diagonal(-first).mul_(0.0)  # not zero_: NaN and infinity give NaN, as their difference with themselves
    return operand, factor


def operand_kind(dtype: torch.dtype) -> torch.dtype:
    """In which dtype the factors of a product are kept: that of the input, if the interpreter need not widen it."""
    return torch.float32 if upcast(dtype) else dtype


class Gradient:
    """The gradient in one batch, from the products that make it, which may come by chunks of its columns."""

    def __init__(self, x: Batch, y: Batch | None, column_term: Tensor, row_term: Tensor | None) -> None:
        """``dx̂ = (products) + ŷ·column_term + row_term·x̂``; ``y`` is ``None`` where it is ``x``."""
        n, d = x.x.shape
        self.x, self.y, self.column_term, self.row_term = x, y, column_term, row_term
        self.config = PRODUCT[architecture(x.x), x.x.element_size(), n * d >= _second_moment_configs.LARGE]
        self.d_hat = x.x.new_empty((n, d), dtype=torch.float32)
        self.sums = x.x.new_empty((3, triton.cdiv(n, self.config.block_m), d), dtype=torch.float32)

    def product(self, scale: Tensor, left: Tensor, right: Tensor, first: int = 0) -> None:
        """Columns ``first`` … of dx̂ from ``scale·left·right``; ``right`` may have columns of zeros beyond D."""
        (n, d), config = self.d_hat.shape, self.config
        columns = min(right.shape[1], d - first)
        _second_moment_product_kernel[(triton.cdiv(n, config.block_m) * triton.cdiv(columns, config.block_n),)](
            left, right, scale, *self.x.columns(first), *(self.y.columns(first) if self.y else (None,) * 3),
            self.column_term[first:], self.row_term, self.d_hat[:, first:], self.sums[:, :, first:],
            n, d, columns, right.shape[0], left.stride(0) // 8, right.stride(0) // 8,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            PRECISION=dot_precision(left.dtype), UPCAST=upcast(self.x.x.dtype),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    def finish(self, other: Tensor | None, grad_distance: Tensor, center: bool, scale: int, eps: float) -> Tensor:
        """dx [N, D] in the dtype of x, through scaling and centring; plus ``2·grad_distance·(x − other)``."""
        n, d = self.d_hat.shape
        dx = torch.empty_like(self.x.x)
        _second_moment_input_gradient_kernel[(triton.cdiv(n, ROWS), triton.cdiv(d, COLS))](
            self.d_hat, self.sums.sum(1), *self.x, other, grad_distance, dx, n, d, eps,
            CENTER=center, SCALE=scale, ROWS=ROWS, COLS=COLS, UPCAST=upcast(self.x.x.dtype), num_warps=4,
        )  # fmt: skip
        return dx
