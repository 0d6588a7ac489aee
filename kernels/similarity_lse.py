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

from ._common import architecture, launch_options, multiprocessors
from ._configs import SIMILARITY_FORWARD, SIMILARITY_OWNER, config_for
from ._gradient_forms import gradient_form
from ._owner import load_tile_rows
from ._tiles import (
    BOUND_FROM,
    EXACT,
    LN2,
    LOG2E,
    PLAIN_LIMIT,
    accumulate,
    accumulate_bounded,
    block_ranges,
    contiguous,
    dot_products,
    finite_or_zero,
    largest_norm,
    load_positives,
    load_rows,
    merge,
    padded,
    zero_or_nothing,
)
from .similarity_bands import Terms, band_gradients
from .similarity_lse_attend import streamed_attend
from .similarity_lse_backward import similarity_backward

__all__ = ["similarity_attend", "similarity_backward", "similarity_forward"]

# Row blocks of one band: column partials take 8·BAND bytes a column. Row partials take 8 bytes a row and run (12 with
# the hardest), and there are about FORWARD_PROGRAMS runs a multiprocessor in a band: O(M + N) in all.
BAND = 64
# Programs wanted in a launch for each multiprocessor, so that the last wave is a small part of the time.
FORWARD_PROGRAMS = 8


@triton.jit
def _absorb(x, state, rows, row0, col0, ids, positives, output, shape, BOUNDED: tl.constexpr):
    """Logits ``x`` [rows, columns from col0], base 2, into ``state`` = (top, total, hardest) of the rows.

    ids: (RowIds, ColIds, low, high) with the range of the columns' ids, or with None; positives: (columns of the rows'
    positives or None, Positive); output: (ColPartial of this row block or None, its stride, whether the hardest is
    wanted); shape: (M, N).
    """
    top, total, hardest = state
    RowIds, ColIds, low_id, high_id = ids
    mates, Positive = positives
    ColPartial, plane, HARDEST = output
    M, N = shape
    WIDTH: tl.constexpr = x.shape[1]
    cols = col0 + tl.arange(0, WIDTH)
    if mates is not None:
        has_positives = (tl.min(tl.where(mates < 0, N, mates), 0) < col0 + WIDTH) & (tl.max(mates, 0) >= col0)
        if has_positives:  # read before exclusion
            chosen = tl.sum(tl.where(cols[None, :] == mates[:, None], x, 0.0), 1)
            here = (mates >= col0) & (mates < col0 + WIDTH) & (rows < M)
            tl.store(Positive + rows, chosen * LN2, mask=here)

    # Only tiles at the ragged edges or with ids in common need masks.
    masked = (col0 + WIDTH > N) | (row0 + x.shape[0] > M)
    if RowIds is not None:
        row_ids = tl.load(RowIds + tl.minimum(rows, M - 1))
        masked |= (tl.min(row_ids, 0) <= high_id) & (tl.max(row_ids, 0) >= low_id)
    if masked:
        keep = (rows[:, None] < M) & (cols[None, :] < N)
        if RowIds is not None:
            col_ids = tl.load(ColIds + tl.minimum(cols, N - 1))
            keep = keep & (row_ids[:, None] != col_ids[None, :])
        x = tl.where(keep, x, float("-inf"))

    if BOUNDED:
        total, col_total = accumulate_bounded(total, x)
        col_top = zero_or_nothing(col_total)
    else:
        top, total = accumulate(top, total, x)
        col_top = tl.zeros((WIDTH,), tl.float32)
        col_total = col_top
        if ColPartial is not None:
            col_top = tl.max(x, 0)
            col_total = tl.sum(tl.exp2(x - finite_or_zero(col_top)[None, :]), 0)
    if ColPartial is not None:
        tl.store(ColPartial + cols, col_top, mask=cols < N)
        tl.store(ColPartial + plane + cols, col_total, mask=cols < N)
    if HARDEST:
        if mates is not None and has_positives:
            x = tl.where(cols[None, :] == mates[:, None], float("-inf"), x)
        # A maximum along an axis drops NaN, one of two numbers can keep it.
        bad = tl.max((x != x).to(tl.int32), 1) != 0
        rival = tl.where(bad, float("nan"), tl.max(x, 1))
        hardest = tl.maximum(hardest, rival, propagate_nan=tl.PropagateNan.ALL)
    return top, total, hardest


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
    QNorm,  # []: the largest norm of a row of q, or None: the maxima are taken in any case
    KNorm,  # []: the same of k, with QNorm
    RowPartial,  # [2, runs, M]: maxima, then sums, of each run of tiles
    ColPartial,  # [2, band, N] or None: maxima, then sums, over the rows of each row block of the band
    Positive,  # [M], with Positives
    Hardest,  # [runs, M] or None
    M,
    N,
    first_block,
    run_length,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BOUNDED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (b, r): rows of block ``first_block + b`` against the r-th run of ``run_length`` tiles of columns.

    With QNorm, only one of the kernels BOUNDED and not BOUNDED does anything: which one is known on the device alone,
    and the former takes half of the latter's registers.
    """
    run, runs = tl.program_id(1), tl.num_programs(1)
    scale = tl.load(Scale) * LOG2E
    row0 = (first_block + tl.program_id(0)) * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    if QNorm is not None:  # by Cauchy–Schwarz, with room for rounding; NaN is not bounded
        bounded = tl.load(QNorm) * tl.load(KNorm) * tl.abs(scale) < 0.99 * PLAIN_LIMIT
        if (bounded == 0) if BOUNDED else bounded:
            return
    mates, columns = None, None
    if Positives is not None:
        mates = load_positives(Positives, tl.minimum(rows, M - 1), N)  # a row past the end may be the last one again
    if ColPartial is not None:
        columns = ColPartial + tl.program_id(0).to(tl.int64) * N
    positives = (mates, Positive)
    output = (columns, tl.num_programs(0).to(tl.int64) * N, Hardest is not None)
    shape = (M, N)
    qi = load_rows(Q, rows, 0, M, D, BLOCK_K, UPCAST)
    nothing = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    top, total, hardest = nothing, tl.zeros((BLOCK_M,), tl.float32), nothing
    tiles = tl.cdiv(N, BLOCK_N)
    for tile in range(run * run_length, tl.minimum((run + 1) * run_length, tiles)):
        col0, cols, kj = load_tile_rows(K, tile, 0, N, D, BLOCK_N, BLOCK_K, UPCAST)
        x = dot_products(qi, kj, Q, K, rows, cols, M, N, D, BLOCK_K, PRECISION, UPCAST) * scale
        if Bias is not None:
            x += (tl.load(Bias + cols, mask=cols < N, other=0.0) * LOG2E)[None, :]
        low_id, high_id = 0, 0
        if RowIds is not None:
            low_id, high_id = tl.load(ColRanges + tile), tl.load(ColRanges + tiles + tile)
        ids = (RowIds, ColIds, low_id, high_id)
        state = (top, total, hardest)
        top, total, hardest = _absorb(x, state, rows, row0, col0, ids, positives, output, shape, BOUNDED)
    if BOUNDED:
        top = zero_or_nothing(total)
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
        float32, max and sum in base 2; [0] for what was not asked for. Sums are relative to the max, which may be 0 in
        place of a maximum where the logits are known to need none.
    """
    q, k = padded(q), padded(k)
    bias, row_ids, col_ids, positives = contiguous(bias, row_ids, col_ids, positives)
    (m, d), n = q.shape, k.shape[0]
    config = config_for(SIMILARITY_FORWARD, architecture(q), q.element_size(), d)
    blocks, tiles = triton.cdiv(m, config.block_m), triton.cdiv(n, config.block_n)
    band = min(BAND, blocks) if columns else blocks
    run_length = min(max(1, band * tiles // (FORWARD_PROGRAMS * multiprocessors(q))), tiles)
    runs = triton.cdiv(tiles, run_length)

    def empty(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=torch.float32)

    row_lse, row_max, row_sum = empty(m), empty(m), empty(m)
    col_lse, col_max, col_sum = (empty(n if columns else 0) for _ in range(3))
    positive = q.new_zeros(0 if positives is None else m, dtype=torch.float32)
    row_partial, rivals = empty(2, runs, m), empty(runs, m) if hardest else None
    q_norm = k_norm = None
    with torch.cuda.device_of(q):
        # A bias is no part of the bound, and the hardest needs a maximum itself.
        if m * n >= BOUND_FROM and bias is None and not hardest:
            q_norm = largest_norm(q)
            k_norm = q_norm if k is q else largest_norm(k)
        ranges = None if row_ids is None else block_ranges(col_ids, None, 0, config.block_n)
        for first in range(0, blocks, band):
            present = min(band, blocks - first)
            col_partial = empty(2, present, n) if columns else None
            for bounded in (True, False) if q_norm is not None else (False,):
                _similarity_forward_kernel[(present, runs)](
                    q, k, scale, bias, row_ids, col_ids, ranges, positives, q_norm, k_norm,
                    row_partial, col_partial, positive, rivals, m, n, first, run_length,
                    BOUNDED=bounded, **launch_options(config, q), **EXACT,
                )  # fmt: skip
            if col_partial is not None:
                merge(col_partial, col_max, col_sum, col_lse, resume=first > 0)
        merge(row_partial, row_max, row_sum, row_lse)
    largest = empty(0) if rivals is None else rivals.amax(0) * LN2.value
    return row_lse, col_lse, positive, largest, row_max, row_sum, col_max, col_sum


def similarity_attend(
    q: Tensor, k: Tensor, scale: Tensor, bias: Tensor | None, row_ids: Tensor | None, col_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Row LSE and attended mean; the arguments are those of :func:`similarity_forward`.

    Returns:
        row_lse [M], attended [M, D], float32; −inf and 0 for a row whose every pair is excluded.
    """
    features = q.shape[1]
    q, k = padded(q), padded(k)
    vectors = contiguous(bias, row_ids, col_ids)
    config = config_for(SIMILARITY_OWNER, architecture(q), q.element_size(), q.shape[1])
    found = None
    with torch.cuda.device_of(q):
        if gradient_form(q, 1, config, after_forward=False) == "banded":
            found = _banded_attend(q, k, scale, *vectors)
        if found is None:
            found = streamed_attend(q, k, scale, vectors, config)
    row_lse, attended = found
    return row_lse, attended[:, :features].contiguous()


def _banded_attend(
    q: Tensor, k: Tensor, scale: Tensor, bias: Tensor | None, row_ids: Tensor | None, col_ids: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """The attended mean is W k where each row LSE has gradient 1; ``None`` where memory has no room for a band."""
    row_lse, _, _, _, row_max, row_sum, *_ = similarity_forward(q, k, scale, bias, row_ids, col_ids, None, False, False)
    ones = torch.ones_like(row_sum)
    # Probabilities are at most 1; times 2^14 they fill float16's range.
    factor = q.new_full((), 16384.0, dtype=torch.float32) if q.dtype == torch.float16 else None
    terms = Terms(ones, row_max, row_sum, None, row_max, row_sum, bias, row_ids, col_ids, factor=factor)
    found = band_gradients(q, k, scale, terms, True, False, False)
    if found is None or found[0] is None:
        return None
    return row_lse, found[0] if factor is None else found[0] / factor
