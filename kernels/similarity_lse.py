"""Log-sum-exp of scaled similarities of q [M, D] and k [N, D] without the M × N matrix.

    x_ij = (scale·q_i·k_j + bias_j)·log2 e   over the pairs with row_id_i ≠ col_id_j
    row_lse_i = ln 2·(max_i + log2 sum_i),   max_i = max_j x_ij,   sum_i = Σ_j 2^(x_ij − max_i),   the same for columns
    W_ij = g_i 2^(x_ij − max_i)/sum_i + h_j 2^(x_ij − cmax_j)/csum_j + p_i [j = positive_i]
    dq = scale·W k,   dk = scale·Wᵀ q,   dbias_j = Σ_i W_ij,   dscale = Σ_i q_i·(W k)_i

with g, h, p the gradients of row_lse, col_lse and the positives' logits.

Forward: a program takes one block of rows and a run of tiles, and writes the (max, sum) of its rows; where the columns'
results are wanted, also those of every tile's columns, for which the row blocks are taken a band at a time. A second
kernel merges both in a fixed order. There are no atomics: the result is the same in every run.

Backward: a program owns rows of dq, or, with the roles of q and k exchanged, rows of dk, and streams over the other
side, recomputing x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import architecture, dot_precision, upcast
from ._nt_xent_configs import config_for
from ._similarity_lse_configs import FORWARD
from ._tiles import (
    EXACT,
    LN2,
    LOG2E,
    accumulate,
    block_ranges,
    contiguous,
    dot_products,
    finite_or_zero,
    load_positives,
    load_rows,
    merge,
    padded,
)
from .similarity_lse_attend import similarity_attend
from .similarity_lse_backward import similarity_backward

__all__ = ["similarity_attend", "similarity_backward", "similarity_forward"]

# Row blocks of one band: column partials take 8·BAND bytes a column. Row partials take 8 bytes a row and run (12 with
# the hardest), and there are about FORWARD_PROGRAMS runs in a band: O(M + N) in all.
BAND = 64
# Programs wanted in a launch, several for each multiprocessor, so that the last wave is a small part of the time.
FORWARD_PROGRAMS = 1024


@triton.jit(do_not_specialize=["M", "N", "first_block", "run_length"])
def _similarity_forward_kernel(
    Q,  # [M, D]
    K,  # [N, D]
    Scale,  # []
    Bias,  # [N] or None
    RowIds,  # [M] or None
    ColIds,  # [N], with RowIds
    ColRanges,  # [4, tiles], with RowIds
    Positives,  # [M] or None
    RowPartial,  # [2, runs, M]: maxima, then sums, of each run of tiles
    ColPartial,  # [2, band, N] or None: maxima, then sums, over the rows of each row block of the band
    Positive,  # [M], with Positives
    Hardest,  # [runs, M] or None
    M,
    N,
    first_block,
    run_length,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program (b, r): rows of block ``first_block + b`` against the r-th run of ``run_length`` tiles of columns."""
    run, runs = tl.program_id(1), tl.num_programs(1)
    scale = tl.load(Scale) * LOG2E
    row0 = (first_block + tl.program_id(0)) * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    last = tl.minimum(rows, M - 1)  # where a row past the end may be the last one again
    if RowIds is not None:
        row_ids = tl.load(RowIds + last)
        low_id, high_id = tl.min(row_ids, 0), tl.max(row_ids, 0)
    if Positives is not None:
        positives = load_positives(Positives, last, N)
        low, high = tl.min(tl.where(positives < 0, N, positives), 0), tl.max(positives, 0)
    qi = load_rows(Q, rows, 0, M, D, BLOCK_K, UPCAST)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    hardest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    tiles = tl.cdiv(N, BLOCK_N)
    for tile in range(run * run_length, tl.minimum((run + 1) * run_length, tiles)):
        col0 = tile * BLOCK_N
        cols = col0 + tl.arange(0, BLOCK_N)
        kj = load_rows(K, cols, 0, N, D, BLOCK_K, UPCAST)
        x = dot_products(qi, kj, Q, K, rows, cols, M, N, D, BLOCK_K, PRECISION, UPCAST) * scale
        if Bias is not None:
            x += (tl.load(Bias + cols, mask=cols < N, other=0.0) * LOG2E)[None, :]

        has_positives = False
        if Positives is not None:
            has_positives = (low < col0 + BLOCK_N) & (high >= col0)
            if has_positives:  # read before exclusion
                chosen = tl.sum(tl.where(cols[None, :] == positives[:, None], x, 0.0), 1)
                here = (positives >= col0) & (positives < col0 + BLOCK_N) & (rows < M)
                tl.store(Positive + rows, chosen * LN2, mask=here)

        # Only tiles at the ragged edges or with ids in common need masks.
        masked = (col0 + BLOCK_N > N) | (row0 + BLOCK_M > M)
        if RowIds is not None:
            masked |= (low_id <= tl.load(ColRanges + tiles + tile)) & (high_id >= tl.load(ColRanges + tile))
        if masked:
            keep = (rows[:, None] < M) & (cols[None, :] < N)
            if RowIds is not None:
                col_ids = tl.load(ColIds + tl.minimum(cols, N - 1))
                keep = keep & (row_ids[:, None] != col_ids[None, :])
            x = tl.where(keep, x, float("-inf"))

        top, total = accumulate(top, total, x)
        if ColPartial is not None:
            col_top = tl.max(x, 0)
            col_total = tl.sum(tl.exp2(x - finite_or_zero(col_top)[None, :]), 0)
            at = ColPartial + tl.program_id(0).to(tl.int64) * N + cols
            tl.store(at, col_top, mask=cols < N)
            tl.store(at + tl.num_programs(0).to(tl.int64) * N, col_total, mask=cols < N)
        if Hardest is not None:
            if has_positives:
                x = tl.where(cols[None, :] == positives[:, None], float("-inf"), x)
            # A maximum along an axis drops NaN, one of two numbers can keep it.
            bad = tl.max((x != x).to(tl.int32), 1) != 0
            rival = tl.where(bad, float("nan"), tl.max(x, 1))
            hardest = tl.maximum(hardest, rival, propagate_nan=tl.PropagateNan.ALL)
    at = run.to(tl.int64) * M + rows
    tl.store(RowPartial + at, top, mask=rows < M)
    tl.store(RowPartial + runs.to(tl.int64) * M + at, total, mask=rows < M)
    if Hardest is not None:
        tl.store(Hardest + at, hardest, mask=rows < M)


def similarity_forward(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    positives: Tensor | None,
    columns: bool,
    hardest: bool,
) -> tuple[Tensor, ...]:
    """LSE of rows (and columns), logits of the positives and of the hardest negatives.

    Args:
        q: [M, D], k: [N, D], contiguous; float32, bfloat16 or float16.
        scale: [] float32 on their device, read there; bias: [N] float32.
        row_ids, col_ids, positives: [M], [N], [M] int64; a positive outside [0, N) is none.

    Returns:
        row_lse [M], col_lse [N], positive [M], hardest [M], row_max [M], row_sum [M], col_max [N], col_sum [N]:
        float32, max and sum in base 2; [0] for what was not asked for.
    """
    q, k = padded(q), padded(k)
    bias, row_ids, col_ids, positives = contiguous(bias, row_ids, col_ids, positives)
    (m, d), n = q.shape, k.shape[0]
    config = config_for(FORWARD, architecture(q), q.element_size(), d)
    blocks, tiles = triton.cdiv(m, config.block_m), triton.cdiv(n, config.block_n)
    band = min(BAND, blocks) if columns else blocks
    run_length = min(max(1, band * tiles // FORWARD_PROGRAMS), tiles)
    runs = triton.cdiv(tiles, run_length)

    def empty(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=torch.float32)

    row_lse, row_max, row_sum = empty(m), empty(m), empty(m)
    col_lse, col_max, col_sum = (empty(n if columns else 0) for _ in range(3))
    positive = q.new_zeros(0 if positives is None else m, dtype=torch.float32)
    row_partial, rivals = empty(2, runs, m), empty(runs, m) if hardest else None
    with torch.cuda.device_of(q):
        ranges = None if row_ids is None else block_ranges(col_ids, None, 0, config.block_n)
        for first in range(0, blocks, band):
            present = min(band, blocks - first)
            col_partial = empty(2, present, n) if columns else None
            _similarity_forward_kernel[(present, runs)](
                q, k, scale, bias, row_ids, col_ids, ranges, positives, row_partial, col_partial, positive, rivals,
                m, n, first, run_length,
                D=d, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
                PRECISION=dot_precision(q.dtype), UPCAST=upcast(q.dtype),
                num_warps=config.num_warps, num_stages=config.num_stages, **EXACT,
            )  # fmt: skip
            if col_partial is not None:
                merge(col_partial, col_max, col_sum, col_lse, resume=first > 0)
        merge(row_partial, row_max, row_sum, row_lse)
    largest = empty(0) if rivals is None else rivals.amax(0) * LN2.value
    return row_lse, col_lse, positive, largest, row_max, row_sum, col_max, col_sum
