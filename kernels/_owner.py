"""Kernels whose programs own rows of a result, and stream over the other side: gradients, and the attended mean.

Program (b, c, h): row block b, the c-th BLOCK_D features of the result, the h-th part of the columns. Where there are
few rows, several programs share the columns, and their partial results are summed in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._common import Config, best_split, multiprocessors
from ._tiles import load_rows

# Columns are shared as long as WAVES waves hold all programs: the partial results take 4·parts·rows·D ≤
# 4·WAVES·slots·block_m·block_d bytes, 17 MB on an H200, for any shape.
WAVES = 2


class OwnerGrid(NamedTuple):
    """How many programs there are, by b, c and h."""

    blocks: int  # of rows
    chunks: int  # of features
    parts: int  # of the columns


def owner_grid(
    z: Tensor, columns: int, config: Config, *, owns_features: bool = True, most: int | None = None
) -> OwnerGrid:
    """For rows ``z`` [R, D] against so many columns, in ``most`` parts at the most."""
    rows, d = z.shape
    blocks, tiles = triton.cdiv(rows, config.block_m), triton.cdiv(columns, config.block_n)
    chunks = triton.cdiv(d, config.block_d) if owns_features else 1
    programs, slots = blocks * chunks, config.resident * multiprocessors(z)
    most = tiles if most is None else min(most, tiles)
    return OwnerGrid(blocks, chunks, best_split(programs, slots, min(most, WAVES * slots // programs)))


@triton.jit
def tiles_of_part(N, BLOCK_N: tl.constexpr):
    """How many tiles N columns make, and the first and the end of those of this program (·, ·, h): the h-th part."""
    tiles = tl.cdiv(N, BLOCK_N)
    share = tl.cdiv(tiles, tl.num_programs(2))
    begin = tl.program_id(2) * share
    return tiles, begin, tl.minimum(begin + share, tiles)


@triton.jit
def load_tile_rows(
    B, tile, first, N,
    D: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The first row of a tile of BLOCK_N rows of B [N, D], all of them, and their features from ``first``."""
    row0 = tile * BLOCK_N
    rows = row0 + tl.arange(0, BLOCK_N)
    return row0, rows, load_rows(B, rows, first, N, D, WIDTH, UPCAST)


@triton.jit
def store_gradient(
    DA, Dots, A, gradient, product, rows, chunk, R,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``gradient`` [rows, features from ``chunk``] in this program's part of DA [parts, R, D].

    Dots [parts, chunks, R]: A's rows times those of ``product`` over these features.
    """
    part = tl.program_id(2).to(tl.int64)
    features = chunk + tl.arange(0, BLOCK_D)
    offsets = (part * R + rows)[:, None] * D + features[None, :]
    tl.store(DA + offsets, gradient, mask=(rows[:, None] < R) & (features[None, :] < D))
    # Rows and features outside A are zero there, so they add nothing.
    a = load_rows(A, rows, chunk, R, D, BLOCK_D, UPCAST).to(tl.float32)
    at = (part * tl.num_programs(1) + tl.program_id(1)) * R + rows
    tl.store(Dots + at, tl.sum(a * product, 1), mask=rows < R)
