"""Gradients of similarity_lse (and of NT-Xent) by bands of rows: see ``similarity_lse.py`` for the notation.

One kernel forms the weights W of a band of rows, tile by tile, each logit once; of them the library's products make dq
and dk (``_gradient_forms.py``).

    W_ij = g_i 2^(x_ij − max_i)/sum_i + h_j 2^(x_ij − cmax_j)/csum_j + p_i [j = positive_i]

Where the maxima of a tile's rows and columns are all within PLAIN_LIMIT of one level c, one exponential serves both
terms: ``2^(x − c)·(u_i + v_j)``, ``u_i = g_i 2^(c − max_i)/sum_i``. x is at most either maximum, so nothing overflows,
and where 2^(x − c) underflows both probabilities are below 2^−66. The maximum of the first row serves as c. Tiles with
positives take the exact form, where 1 − P does not cancel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import architecture, launch_options
from ._configs import SIMILARITY_FORWARD, SIMILARITY_WEIGHTS, config_for
from ._gradient_forms import band_buffer, multiply_band
from ._tiles import EXACT, LOG2E, PLAIN_LIMIT, block_ranges, finite_or_zero, load_positives, overlap, wide_products

# Tiles of a band are taken GROUP row blocks at a time, so that the programs of a wave share rows and columns in L2.
GROUP = tl.constexpr(8)


@triton.jit(do_not_specialize=["L"])
def _similarity_weights_kernel(
    Grad,  # [L]: of the LSE, or None: 1 each
    Max,  # [L]
    Sum,  # [L]
    Factor,  # [] or None
    Level,  # []: c, if finite; else 0
    Weights,  # [3, L]: g/sum, 0 where there is no pair; the maximum, 0 in place of −inf; g·2^(c − max)/sum
    InRange,  # [blocks]: 1 where |max − c| ≤ PLAIN_LIMIT in the whole block
    L,
    BLOCK: tl.constexpr,
):
    """What the gradient needs of each row or column, once instead of once a tile."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.full((BLOCK,), 1.0, tl.float32)
    if Grad is not None:
        grad = tl.load(Grad + rows, mask=rows < L, other=0.0)
    if Factor is not None:
        grad *= tl.load(Factor)
    total = tl.load(Sum + rows, mask=rows < L, other=1.0)
    top = tl.load(Max + rows, mask=rows < L, other=0.0)
    weight = tl.where(total == 0, 0.0, grad / tl.where(total == 0, 1.0, total))
    top = tl.where(top == float("-inf"), 0.0, top)
    tl.store(Weights + rows, weight, mask=rows < L)
    tl.store(Weights + L + rows, top, mask=rows < L)
    above = top - finite_or_zero(tl.load(Level))
    within = tl.minimum(tl.maximum(above, -PLAIN_LIMIT), PLAIN_LIMIT)  # beyond it, which InRange tells, it is not used
    tl.store(Weights + 2 * L + rows, tl.exp2(-within) * weight, mask=rows < L)
    inside = (tl.abs(above) <= PLAIN_LIMIT) | (rows >= L)
    tl.store(InRange + tl.program_id(0), tl.min(inside.to(tl.int32), 0))


class Weights(NamedTuple):
    """Of the rows or the columns, see :func:`_similarity_weights_kernel`."""

    values: Tensor  # [3, L] float32
    in_range: Tensor  # [blocks] int32


def weights_of(
    grad: Tensor | None, top: Tensor, total: Tensor, factor: Tensor | None, level: Tensor, block: int = 256
) -> Weights:
    """Weights of rows in blocks of ``block``; ``grad`` ``None`` is 1 for each; the first number of ``level`` counts."""
    length = len(top)
    blocks = triton.cdiv(length, block)
    weights = Weights(top.new_empty((3, length)), top.new_empty(blocks, dtype=torch.int32))
    _similarity_weights_kernel[(blocks,)](
        grad, top, total, factor, level, *weights, length, BLOCK=block, num_warps=2, **EXACT
    )
    return weights


@triton.jit
def _exact_weights(x, rows, cols, masked, weights, pairs, shape, PAIRS: tl.constexpr):
    """W of logits ``x`` [rows, cols], base 2; the arguments are those of :func:`_finish`."""
    RowWeights, ColWeights, factor, _ = weights
    RowIds, ColIds, Positives, GradPositive, _ = pairs
    M, N = shape
    last, last_col = tl.minimum(rows, M - 1), tl.minimum(cols, N - 1)
    w = tl.zeros_like(x)
    if RowWeights is not None:
        weight_i, top_i = tl.load(RowWeights + last), tl.load(RowWeights + M + last)
        w += tl.exp2(x - top_i[:, None]) * weight_i[:, None]
    if ColWeights is not None:
        weight_j, top_j = tl.load(ColWeights + last_col), tl.load(ColWeights + N + last_col)
        w += tl.exp2(x - top_j[None, :]) * weight_j[None, :]
    if PAIRS:
        partner = tl.where(rows < M // 2, rows + M // 2, rows - M // 2)
        rest = tl.load(GradPositive + last)[:, None] + tl.load(GradPositive + last_col)[None, :]
        w = tl.where(cols[None, :] == partner[:, None], rest * -factor, w)
    if masked:
        keep = (rows[:, None] < M) & (cols[None, :] < N)
        if PAIRS:
            keep = keep & (rows[:, None] != cols[None, :])
        if RowIds is not None:
            row_ids, col_ids = tl.load(RowIds + last), tl.load(ColIds + last_col)
            keep = keep & (row_ids[:, None] != col_ids[None, :])
        w = tl.where(keep, w, 0.0)
    # Here and not after the product: where P_ip is nearly 1 it cancels, in float32; excluded pairs count too.
    if Positives is not None:
        positives = load_positives(Positives, last, N)
        grad = tl.load(GradPositive + last) * factor
        here = (cols[None, :] == positives[:, None]) & (rows[:, None] < M)
        w += tl.where(here, grad[:, None], 0.0)
    return w


@triton.jit
def _finish(
    x, local, rows, col0, masked, plain, weights, pairs, output, shape, PAIRS: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Weights of logits ``x`` [rows, columns from col0] without bias, base 2, written out.

    weights: (RowWeights, ColWeights, factor, level); pairs: (RowIds, ColIds, Positives, GradPositive, Bias);
    output: (W, stride, ColSums); shape: (M, N).
    """
    M, N = shape
    W, stride, ColSums = output
    RowWeights, ColWeights, _, level = weights
    _, _, _, _, Bias = pairs
    cols = col0 + tl.arange(0, x.shape[1])
    if Bias is not None:
        x += (tl.load(Bias + cols, mask=cols < N, other=0.0) * LOG2E)[None, :]
    if RowWeights is not None and ColWeights is not None:
        if plain:
            u = tl.load(RowWeights + 2 * M + tl.minimum(rows, M - 1))
            v = tl.load(ColWeights + 2 * N + tl.minimum(cols, N - 1))
            w = tl.exp2(x - level) * (u[:, None] + v[None, :])
        else:
            w = _exact_weights(x, rows, cols, masked, weights, pairs, shape, PAIRS)
    else:
        w = _exact_weights(x, rows, cols, masked, weights, pairs, shape, PAIRS)
    if ColSums is not None:
        tl.store(ColSums + local.to(tl.int64) * N + cols, tl.sum(w, 0), mask=cols < N)
    # Rows past the end are inside the band's buffer; nothing reads them.
    at = W + (local * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(at, w.to(W.dtype.element_ty), mask=cols[None, :] < N)


@triton.jit
def _finish_halves(
    x, local, rows, col0, masked, plain, weights, pairs, output, shape, PAIRS: tl.constexpr, BLOCK_M: tl.constexpr
):
    """:func:`_finish` in parts of at most 64 columns: what a thread needs of more, beside its logits, would spill."""
    WIDTH: tl.constexpr = x.shape[1]
    if WIDTH <= 64:
        _finish(x, local, rows, col0, masked, plain, weights, pairs, output, shape, PAIRS, BLOCK_M)
    else:
        left, right = x.reshape(BLOCK_M, 2, WIDTH // 2).permute(0, 2, 1).split()
        _finish(left, local, rows, col0, masked, plain, weights, pairs, output, shape, PAIRS, BLOCK_M)
        _finish(right, local, rows, col0 + WIDTH // 2, masked, plain, weights, pairs, output, shape, PAIRS, BLOCK_M)


@triton.jit(do_not_specialize=["M", "N", "first_block", "stride"])
def _similarity_band_kernel(
    Q,  # [M, D]
    K,  # [N, D]
    Scale,  # []: the scale, or with PAIRS the temperature
    Factor,  # [] or None: a power of two on the positives' gradients (the weights have it already)
    RowWeights,  # [3, M] or None
    RowInRange,  # [row blocks], with RowWeights
    Level,  # []: as given to _similarity_weights_kernel
    ColWeights,  # [3, N] or None
    ColInRange,  # [tiles], with ColWeights
    Bias,  # [N] or None
    RowIds,  # [M] or None
    ColIds,  # [N], with RowIds
    Positives,  # [M] or None
    GradPositive,  # [M], with Positives; with PAIRS: 1 − P_ip
    ColRanges,  # [4, tiles], with RowIds
    W,  # [band, N], rows of ``stride`` elements
    ColSums,  # [row blocks of the band, N] or None: Σ_i W_ij over the rows of each block
    M,
    N,
    first_block,
    stride,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PAIRS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program t: the t-th tile of the band that starts with row block ``first_block``.

    PAIRS: the rows are NT-Xent's, with themselves: row i leaves itself out, and its positive is (i + M/2) mod M, whose
    weight P_ij + P_ji − 2 is that of the others' shares.
    """
    stride = tl.multiple_of(stride, 8)  # see band_buffer
    tiles = tl.cdiv(N, BLOCK_N)
    program, blocks = tl.program_id(0), tl.num_programs(0) // tiles
    local, tile = tl.swizzle2d(program // tiles, program % tiles, blocks, tiles, GROUP)
    block = first_block + local
    row0, col0 = block * BLOCK_M, tile * BLOCK_N
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
    scale = tl.full((), LOG2E, tl.float32) / tl.load(Scale) if PAIRS else tl.load(Scale) * LOG2E
    x = wide_products(Q, K, rows, cols, M, N, D, BLOCK_K, PRECISION, UPCAST) * scale
    factor = 1.0
    if Factor is not None:
        factor = tl.load(Factor)

    last = tl.minimum(rows, M - 1)
    masked = (col0 + BLOCK_N > N) | (row0 + BLOCK_M > M)
    positive = False
    if PAIRS:
        half = M // 2
        masked |= overlap(row0, BLOCK_M, col0, BLOCK_N)
        positive = overlap(row0 + half, BLOCK_M, col0, BLOCK_N) | overlap(row0 - half, BLOCK_M, col0, BLOCK_N)
    if RowIds is not None:
        row_ids = tl.load(RowIds + last)
        low_id, high_id = tl.load(ColRanges + tile), tl.load(ColRanges + tiles + tile)
        masked |= (tl.min(row_ids, 0) <= high_id) & (tl.max(row_ids, 0) >= low_id)
    if Positives is not None:
        positives = load_positives(Positives, last, N)
        low = tl.min(tl.where(positives < 0, N, positives), 0)
        positive |= (low < col0 + BLOCK_N) & (tl.max(positives, 0) >= col0)
    plain, level = False, 0.0
    if RowWeights is not None and ColWeights is not None:
        plain = (tl.load(RowInRange + block) != 0) & (tl.load(ColInRange + tile) != 0)
        plain = plain & (masked == 0) & (positive == 0)
        level = finite_or_zero(tl.load(Level))

    weights, pairs = (RowWeights, ColWeights, factor, level), (RowIds, ColIds, Positives, GradPositive, Bias)
    output, shape = (W, stride, ColSums), (M, N)
    if BLOCK_N > 128:
        left, right = x.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        _finish_halves(left, local, rows, col0, masked, plain, weights, pairs, output, shape, PAIRS, BLOCK_M)
        _finish_halves(
            right, local, rows, col0 + BLOCK_N // 2, masked, plain, weights, pairs, output, shape, PAIRS, BLOCK_M
        )
    else:
        _finish_halves(x, local, rows, col0, masked, plain, weights, pairs, output, shape, PAIRS, BLOCK_M)


@triton.jit(do_not_specialize=["L"])
def _similarity_finish_kernel(
    Z,  # [L, D]
    Gradient,  # [L, D]: W times the other side; on return times Multiplier
    Multiplier,  # []
    Dots,  # [blocks]: Σ z·Gradient of a block's rows, without the multiplier
    L,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    multiplier = tl.load(Multiplier)
    dots = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, D, WIDTH):
        features = first + tl.arange(0, WIDTH)
        at = rows.to(tl.int64)[:, None] * D + features[None, :]
        inside = (rows[:, None] < L) & (features[None, :] < D)
        gradient = tl.load(Gradient + at, mask=inside, other=0.0)
        dots += tl.load(Z + at, mask=inside, other=0.0).to(tl.float32) * gradient
        tl.store(Gradient + at, gradient * multiplier, mask=inside)
    tl.store(Dots + tl.program_id(0), tl.sum(tl.sum(dots, 1), 0))


def finish(z: Tensor, gradient: Tensor, multiplier: Tensor) -> Tensor:
    """Multiply ``gradient`` [L, D] in place; returns Σ z·gradient as it was before."""
    length, d = z.shape
    rows, width = 16, min(128, triton.next_power_of_2(d))
    dots = gradient.new_empty(triton.cdiv(length, rows))
    _similarity_finish_kernel[(len(dots),)](
        z, gradient, multiplier, dots, length, D=d, ROWS=rows, WIDTH=width, num_warps=4, **EXACT
    )
    return dots.sum()


class Terms(NamedTuple):
    """What the weights are made of besides q, k and scale; ``None`` where it is absent."""

    row_grad: Tensor | None  # [M]: of the row LSE
    row_max: Tensor
    row_sum: Tensor
    col_grad: Tensor | None  # [N]
    col_max: Tensor
    col_sum: Tensor
    bias: Tensor | None = None
    row_ids: Tensor | None = None
    col_ids: Tensor | None = None
    positives: Tensor | None = None
    grad_positive: Tensor | None = None
    factor: Tensor | None = None
    pairs: bool = False  # NT-Xent: the gradients of row and column LSE are 1, grad_positive is 1 − P_ip, scale is τ


def band_gradients(
    q: Tensor, k: Tensor, scale: Tensor, terms: Terms, need_q: bool, need_k: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:
    """W k [M, D], Wᵀ q [N, D] and Σ_i W_ij [N], float32, times the factor; ``None`` for what was not asked for.

    ``None`` in place of all where memory has no room for the weights of one block of rows.
    """
    (m, d), n = q.shape, k.shape[0]
    # Ids and biases take registers that the larger tiles do not leave.
    table = SIMILARITY_WEIGHTS if terms.row_ids is None and terms.bias is None else SIMILARITY_FORWARD
    config = config_for(table, architecture(q), q.element_size(), d)
    band = band_buffer(q, m, n, config.block_m)
    if band is None:
        return None
    rows = columns = Weights(None, None)  # type: ignore[arg-type]
    if terms.row_grad is not None or terms.pairs:
        rows = weights_of(terms.row_grad, terms.row_max, terms.row_sum, terms.factor, terms.row_max, config.block_m)
    if terms.col_grad is not None or terms.pairs:
        columns = weights_of(terms.col_grad, terms.col_max, terms.col_sum, terms.factor, terms.row_max, config.block_n)
    ranges = None if terms.row_ids is None else block_ranges(terms.col_ids, None, 0, config.block_n)
    dq = q.new_empty((m, d), dtype=torch.float32) if need_q else None
    dk = q.new_empty((n, d), dtype=torch.float32) if need_k else None
    dbias = q.new_zeros(n, dtype=torch.float32) if need_bias else None
    tiles = triton.cdiv(n, config.block_n)
    for first in range(0, m, len(band)):
        present = min(len(band), m - first)
        blocks = triton.cdiv(present, config.block_m)
        sums = q.new_empty((blocks, n), dtype=torch.float32) if need_bias else None
        _similarity_band_kernel[(blocks * tiles,)](
            q, k, scale, terms.factor, *rows, terms.row_max, *columns, terms.bias, terms.row_ids, terms.col_ids,
            terms.positives, terms.grad_positive, ranges, band, sums, m, n, first // config.block_m, band.stride(0),
            PAIRS=terms.pairs, **launch_options(config, q), **EXACT,
        )  # fmt: skip
        multiply_band(band[:present], q, k, first, dq, dk)
        if dbias is not None and sums is not None:
            dbias += sums.sum(0)
    return dq, dk, dbias
