"""Tiles of row-major and column-major matrices: what the kernels of second_moment load and store."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(
    X, row0, col0, height, width, stride, ROWS: tl.constexpr, COLS: tl.constexpr, TRANSPOSED: tl.constexpr = False
):
    """Addresses of ``X[row0 : row0 + ROWS, col0 : col0 + COLS]``, and which of them are inside [height, width].

    ``stride`` is that of the rows, or of the columns if TRANSPOSED; the other one is 1. X may have more than 2^31
    elements, so the corner is a 64-bit number; within a tile 32 bits do, and half the registers.
    """
    rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    inside = (rows < height - row0) & (cols < width - col0)
    if TRANSPOSED:
        at = X + (tl.cast(col0, tl.int64) * stride + row0) + (cols * stride + rows)
    else:
        at = X + (tl.cast(row0, tl.int64) * stride + col0) + (rows * stride + cols)
    return at, inside


@triton.jit
def load_tile(
    X, row0, col0, height, width, stride, ROWS: tl.constexpr, COLS: tl.constexpr, TRANSPOSED: tl.constexpr = False
):
    """``X[row0 : row0 + ROWS, col0 : col0 + COLS]``, zero outside [height, width]."""
    at, inside = place(X, row0, col0, height, width, stride, ROWS, COLS, TRANSPOSED)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def load_float(
    X, row0, col0, height, width, stride,
    ROWS: tl.constexpr, COLS: tl.constexpr, TRANSPOSED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """:func:`load_tile` in float32, and which of it is inside."""
    at, inside = place(X, row0, col0, height, width, stride, ROWS, COLS, TRANSPOSED)
    x = tl.load(at, mask=inside, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x.to(tl.float32), inside


@triton.jit
def store_tile(X, tile, row0, col0, height, width, stride, TRANSPOSED: tl.constexpr = False):
    """The part of ``tile`` inside [height, width] at ``X[row0 : …, col0 : …]``."""
    at, inside = place(X, row0, col0, height, width, stride, tile.shape[0], tile.shape[1], TRANSPOSED)
    tl.store(at, tile, mask=inside)
