"""The row LSE and the softmax-weighted mean of k in one pass: see ``similarity_lse.py`` for the notation.

    attended_i = Σ_j 2^(x_ij − max_i) k_j / sum_i   [M, D],   so that d row_lse_i / d q_i = scale·attended_i

A program takes one block of rows and a part of the columns with a running maximum, as FlashAttention does (Dao et al.
2022); where there are few rows (a queue of negatives), many programs share the columns and a second kernel merges.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Config, launch_options
from ._owner import load_tile_rows, owner_grid, tiles_of_part
from ._tiles import EXACT, LOG2E, block_ranges, dot_products, finite_or_zero, load_rows, merge


@triton.jit(do_not_specialize=["M", "N"])
def _similarity_attend_kernel(
    Q,  # [M, D]
    K,  # [N, D]
    V,  # [N, D], or None where the mean is of k
    Scale,  # []
    Bias,  # [N] or None
    RowIds,  # [M] or None
    ColIds,  # [N], with RowIds
    ColRanges,  # [4, tiles], with RowIds
    RowPartial,  # [2, splits, M]: maxima, then sums
    Partial,  # [splits, M, D]: Σ_j 2^(x_ij − max_i) k_j, or v_j
    M,
    N,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (b, c, h): row block b, features [c·BLOCK_D, (c+1)·BLOCK_D) of the mean, the h-th part of the columns."""
    # Weights are at most 1; times 2^14 they fill float16's range and stay normal numbers down to 4e-9.
    SHIFT: tl.constexpr = 14.0 if K.dtype.element_ty == tl.float16 else 0.0
    scale = tl.load(Scale) * LOG2E
    row0 = tl.program_id(0) * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    chunk = tl.program_id(1) * BLOCK_D
    if RowIds is not None:
        row_ids = tl.load(RowIds + tl.minimum(rows, M - 1))
        low_id, high_id = tl.min(row_ids, 0), tl.max(row_ids, 0)
    qi = load_rows(Q, rows, 0, M, D, BLOCK_K, UPCAST)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    attended = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    tiles, begin, end = tiles_of_part(N, BLOCK_N)
    for tile in range(begin, end):
        col0, cols, vj = load_tile_rows(K if V is None else V, tile, chunk, N, D, BLOCK_N, BLOCK_D, UPCAST)
        kj = vj
        if V is not None and D <= BLOCK_K:
            kj = load_rows(K, cols, 0, N, D, BLOCK_K, UPCAST)
        x = dot_products(qi, kj, Q, K, rows, cols, M, N, D, BLOCK_K, PRECISION, UPCAST) * scale
        if Bias is not None:
            x += (tl.load(Bias + cols, mask=cols < N, other=0.0) * LOG2E)[None, :]
        masked = col0 + BLOCK_N > N
        if RowIds is not None:
            masked |= (low_id <= tl.load(ColRanges + tiles + tile)) & (high_id >= tl.load(ColRanges + tile))
        if masked:
            keep = cols[None, :] < N
            if RowIds is not None:
                col_ids = tl.load(ColIds + tl.minimum(cols, N - 1))
                keep = keep & (row_ids[:, None] != col_ids[None, :])
            x = tl.where(keep, x, float("-inf"))

        new = tl.maximum(top, tl.max(x, 1))
        safe = finite_or_zero(new)
        p = tl.exp2(x - (safe - SHIFT)[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(p, 1)
        attended = tl.dot(p.to(vj.dtype), vj, attended * shrink[:, None], input_precision=PRECISION)
        top = new

    part = tl.program_id(2).to(tl.int64)
    features = chunk + tl.arange(0, BLOCK_D)
    offsets = (part * M + rows)[:, None] * D + features[None, :]
    unit = tl.exp2(tl.full((), -SHIFT, tl.float32))
    tl.store(Partial + offsets, attended * unit, mask=(rows[:, None] < M) & (features[None, :] < D))
    at = RowPartial + part * M + rows
    first = (rows < M) & (tl.program_id(1) == 0)
    tl.store(at, top, mask=first)
    tl.store(at + tl.num_programs(2).to(tl.int64) * M, total * unit, mask=first)


@triton.jit(do_not_specialize=["M", "splits"])
def _similarity_attend_merge_kernel(
    RowPartial,  # [2, splits, M]
    Partial,  # [splits, M, D]
    Max,  # [M]
    Sum,  # [M]
    Attended,  # [M, D]
    M,
    splits,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (i, c): row i, the c-th BLOCK_D features."""
    row = tl.program_id(0).to(tl.int64)
    features = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    safe, total = finite_or_zero(tl.load(Max + row)), tl.load(Sum + row)
    attended = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, splits, PARTS):
        part = (first + tl.arange(0, PARTS)).to(tl.int64)
        weight = tl.exp2(tl.load(RowPartial + part * M + row, mask=part < splits, other=float("-inf")) - safe)
        inside = (part < splits)[:, None] & (features < D)[None, :]
        values = tl.load(Partial + ((part * M + row) * D)[:, None] + features[None, :], mask=inside, other=0.0)
        attended += tl.sum(values * weight[:, None], 0)
    attended = attended / tl.where(total == 0, 1.0, total)
    tl.store(Attended + row * D + features, attended, mask=features < D)


def streamed_attend(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    vectors: list[Tensor | None],
    config: Config,
    values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Row LSE [M] and attended mean [M, D] of padded q and k; vectors: bias, row_ids, col_ids of ``similarity_lse``.

    ``values`` [N, D]: the mean is of these rows instead of k's.
    """
    bias, row_ids, col_ids = vectors
    (m, d), n = q.shape, k.shape[0]
    grid = owner_grid(q, n, config)
    row_partial = q.new_empty((2, grid.parts, m), dtype=torch.float32)
    partial = q.new_empty((grid.parts, m, d), dtype=torch.float32)
    attended = q.new_empty((m, d), dtype=torch.float32)
    row_max, row_sum, row_lse = (q.new_empty(m, dtype=torch.float32) for _ in range(3))
    ranges = None if row_ids is None else block_ranges(col_ids, None, 0, config.block_n)
    _similarity_attend_kernel[grid](
        q, k, values, scale, bias, row_ids, col_ids, ranges, row_partial, partial, m, n,
        **launch_options(config, q), **EXACT,
    )  # fmt: skip
    merge(row_partial, row_max, row_sum, row_lse)
    block = min(128, triton.next_power_of_2(d))
    _similarity_attend_merge_kernel[(m, triton.cdiv(d, block))](
        row_partial, partial, row_max, row_sum, attended, m, grid.parts, D=d, PARTS=16, BLOCK_D=block,
        num_warps=4, **EXACT,
    )  # fmt: skip
    return row_lse, attended
