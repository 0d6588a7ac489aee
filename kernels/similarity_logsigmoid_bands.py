"""The pairwise sigmoid loss by bands of rows: see ``similarity_logsigmoid.py`` for the notation.

One kernel computes each logit once and gives the loss, Σ W and the weights W of a band of rows; of these the library's
products make dq and dk (``_gradient_forms.py``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import architecture, launch_options
from ._configs import SIMILARITY_WEIGHTS, config_for
from ._gradient_forms import band_buffer, multiply_band
from ._tiles import LOG2E, block_ranges, log1p, wide_products
from .similarity_bands import GROUP, finish


@triton.jit
def times_plus_one(a, b):
    """(1 + a)(1 + b) − 1, without losing a small a or b beside the 1."""
    return tl.fma(a, b, a + b)


@triton.jit
def softplus_and_sigmoid(t):
    """Σ softplus(t) of each row of at most 64 logits, and σ(t).

    softplus(t) = max(t, 0) + log(1 + e), e = exp(−|t|), and one logarithm for a whole row of factors 1 + e: their
    product stays below 2^64.
    """
    tl.static_assert(t.shape[1] <= 64)
    e = tl.exp2(tl.abs(t) * -LOG2E)
    loss = tl.sum(tl.maximum(t, 0.0), 1) + log1p(tl.reduce(e, 1, times_plus_one))
    return loss, tl.where(t >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _finish(t, local, rows, col0, special, RowIds, ColIds, W, stride, shape, BLOCK_M: tl.constexpr):
    """Writes the weights of logits ``t`` [rows, columns from col0], and gives their loss and sum."""
    M, N = shape
    # |W| ≤ 1; times 2^14 it fills float16's range and stays a normal number down to 4e-9.
    W_SCALE: tl.constexpr = 16384.0 if W.dtype.element_ty == tl.float16 else 1.0
    cols = col0 + tl.arange(0, t.shape[1])
    sign = tl.full(t.shape, 1.0, tl.float32)  # −y
    if special:
        row_ids, col_ids = tl.load(RowIds + tl.minimum(rows, M - 1)), tl.load(ColIds + tl.minimum(cols, N - 1))
        equal = row_ids[:, None] == col_ids[None, :]
        sign = tl.where(equal, -1.0, 1.0)
        # Past the end: softplus(−inf) = 0 = σ(−inf).
        inside = (rows[:, None] < M) & (cols[None, :] < N)
        t = tl.where(inside, tl.where(equal, -t, t), float("-inf"))
    loss, sigmoid = softplus_and_sigmoid(t)
    w = sign * sigmoid
    # Rows past the end are inside the band's buffer; nothing reads them.
    at = W + (local * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(at, (w * W_SCALE).to(W.dtype.element_ty), mask=cols[None, :] < N)
    return tl.sum(loss, 0), tl.sum(tl.sum(w, 1), 0)


@triton.jit
def _finish_halves(t, local, rows, col0, special, RowIds, ColIds, W, stride, shape, BLOCK_M: tl.constexpr):
    """:func:`_finish` in parts of at most 64 columns."""
    WIDTH: tl.constexpr = t.shape[1]
    if WIDTH <= 64:
        loss, total = _finish(t, local, rows, col0, special, RowIds, ColIds, W, stride, shape, BLOCK_M)
    else:
        left, right = t.reshape(BLOCK_M, 2, WIDTH // 2).permute(0, 2, 1).split()
        loss, total = _finish(left, local, rows, col0, special, RowIds, ColIds, W, stride, shape, BLOCK_M)
        col1 = col0 + WIDTH // 2
        more, rest = _finish(right, local, rows, col1, special, RowIds, ColIds, W, stride, shape, BLOCK_M)
        loss, total = loss + more, total + rest
    return loss, total


@triton.jit(do_not_specialize=["M", "N", "first_block", "stride"])
def _similarity_logsigmoid_band_kernel(
    Q,  # [M, D]
    K,  # [N, D]
    Scale,  # []
    Bias,  # []
    RowIds,  # [M]
    ColIds,  # [N]
    ColRanges,  # [4, tiles]
    W,  # [band, N], rows of ``stride`` elements
    Loss,  # [row blocks, tiles]: of each tile
    Sums,  # [row blocks, tiles]: Σ W of each tile
    M,
    N,
    first_block,
    stride,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program t: the t-th tile of the band that starts with row block ``first_block``."""
    stride = tl.multiple_of(stride, 8)  # see band_buffer
    tiles = tl.cdiv(N, BLOCK_N)
    program, blocks = tl.program_id(0), tl.num_programs(0) // tiles
    local, tile = tl.swizzle2d(program // tiles, program % tiles, blocks, tiles, GROUP)
    row0, col0 = (first_block + local) * BLOCK_M, tile * BLOCK_N
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
    t = wide_products(Q, K, rows, cols, M, N, D, BLOCK_K, PRECISION, UPCAST) * tl.load(Scale) + tl.load(Bias)
    row_ids = tl.load(RowIds + tl.minimum(rows, M - 1))
    low_id, high_id = tl.load(ColRanges + tile), tl.load(ColRanges + tiles + tile)
    special = (tl.min(row_ids, 0) <= high_id) & (tl.max(row_ids, 0) >= low_id)
    special |= (col0 + BLOCK_N > N) | (row0 + BLOCK_M > M)
    shape = (M, N)
    if BLOCK_N > 128:
        left, right = t.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        loss, total = _finish_halves(left, local, rows, col0, special, RowIds, ColIds, W, stride, shape, BLOCK_M)
        col1 = col0 + BLOCK_N // 2
        more, rest = _finish_halves(right, local, rows, col1, special, RowIds, ColIds, W, stride, shape, BLOCK_M)
        loss, total = loss + more, total + rest
    else:
        loss, total = _finish_halves(t, local, rows, col0, special, RowIds, ColIds, W, stride, shape, BLOCK_M)
    at = (first_block + local).to(tl.int64) * tiles + tile
    tl.store(Loss + at, loss)
    tl.store(Sums + at, total)


def logsigmoid_bands(
    q: Tensor, k: Tensor, scale: Tensor, bias: Tensor, ids: tuple[Tensor, Tensor], needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor] | None:
    """Loss [], dq [M, D], dk [N, D], dscale [], dbias []; ``None`` where memory has no room for a band.

    q and k are padded; ids: of rows [M] and columns [N]; needs: whether dq and dk are wanted, at least one of them.
    """
    (m, d), n = q.shape, k.shape[0]
    (row_ids, col_ids), (need_q, need_k) = ids, needs
    config = config_for(SIMILARITY_WEIGHTS, architecture(q), q.element_size(), d)
    band = band_buffer(q, m, n, config.block_m)
    if band is None:
        return None
    tiles = triton.cdiv(n, config.block_n)
    losses, sums = q.new_empty((2, triton.cdiv(m, config.block_m) * tiles), dtype=torch.float32)
    dq = q.new_empty((m, d), dtype=torch.float32) if need_q else None
    dk = q.new_empty((n, d), dtype=torch.float32) if need_k else None
    with torch.cuda.device_of(q):
        ranges = block_ranges(col_ids, None, 0, config.block_n)
        for first in range(0, m, len(band)):
            present = min(len(band), m - first)
            _similarity_logsigmoid_band_kernel[(triton.cdiv(present, config.block_m) * tiles,)](
                q, k, scale, bias, row_ids, col_ids, ranges, band, losses, sums, m, n,
                first // config.block_m, band.stride(0),
                **launch_options(config, q),
            )  # fmt: skip
            multiply_band(band[:present], q, k, first, dq, dk)
        w_scale = 16384.0 if q.dtype == torch.float16 else 1.0  # as in the kernel
        dots = scale
        for z, gradient in ((k, dk), (q, dq)):
            if gradient is not None:
                dots = finish(z, gradient, scale / w_scale)
    return losses.sum(), dq, dk, dots / w_scale, sums.sum()
