"""Gradients of similarity_lse: see ``similarity_lse.py`` for the notation and the formulas."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Config, architecture, launch_options
from ._configs import SIMILARITY_OWNER, config_for
from ._gradient_forms import gradient_form
from ._owner import load_tile_rows, owner_grid, store_gradient, tiles_of_part
from ._tiles import EXACT, LOG2E, block_ranges, contiguous, dot_products, load_positives, load_rows, padded
from .similarity_bands import Terms, band_gradients, finish, weights_of


@triton.jit(do_not_specialize=["R", "C"])
def _similarity_backward_kernel(
    A,  # [R, D]: q, and B is k; or the other way round
    B,  # [C, D]
    Scale,  # []
    Factor,  # [] or None: a power of two on every weight, taken out at the end
    AWeights,  # [3, R] or None, see similarity_bands.py; the last row is not read here
    BWeights,  # [3, C] or None
    ABias,  # [R] or None
    BBias,  # [C] or None
    AIds,  # [R] or None
    BIds,  # [C], with AIds
    APositives,  # [R] or None
    BPositives,  # [C] or None
    GradPositive,  # [R] or [C], with the positives
    BRanges,  # [4, tiles], with ids or BPositives
    DA,  # [splits, R, D]
    Dots,  # [splits, chunks, R]: a_i·(W b)_i over this program's features and rows of B
    Sums,  # [splits, R] or None: Σ_j W_ij
    R,
    C,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (b, c, h): row block b, features [c·BLOCK_D, (c+1)·BLOCK_D) of dA, the h-th part of the rows of B."""
    scale, factor = tl.load(Scale), 1.0
    if Factor is not None:
        factor = tl.load(Factor)
    row0 = tl.program_id(0) * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    last = tl.minimum(rows, R - 1)
    chunk = tl.program_id(1) * BLOCK_D
    if AWeights is not None:
        weight_i, top_i = tl.load(AWeights + last), tl.load(AWeights + R + last)
    if ABias is not None:
        bias_i = tl.load(ABias + last) * LOG2E
    if AIds is not None:
        row_ids = tl.load(AIds + last)
        low_id, high_id = tl.min(row_ids, 0), tl.max(row_ids, 0)
    if APositives is not None:
        positives = load_positives(APositives, last, C)
        low, high = tl.min(tl.where(positives < 0, C, positives), 0), tl.max(positives, 0)
        grad_i = tl.load(GradPositive + last) * factor
    ai = load_rows(A, rows, 0, R, D, BLOCK_K, UPCAST)
    da = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)

    tiles, begin, end = tiles_of_part(C, BLOCK_N)
    for tile in range(begin, end):
        col0, cols, bj = load_tile_rows(B, tile, chunk, C, D, BLOCK_N, BLOCK_D, UPCAST)
        x = dot_products(ai, bj, A, B, rows, cols, R, C, D, BLOCK_K, PRECISION, UPCAST) * (scale * LOG2E)
        if ABias is not None:
            x += bias_i[:, None]
        if BBias is not None:
            x += (tl.load(BBias + cols, mask=cols < C, other=0.0) * LOG2E)[None, :]
        w = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if AWeights is not None:
            w += tl.exp2(x - top_i[:, None]) * weight_i[:, None]
        if BWeights is not None:
            weight_j = tl.load(BWeights + cols, mask=cols < C, other=0.0)
            top_j = tl.load(BWeights + C + cols, mask=cols < C, other=0.0)
            w += tl.exp2(x - top_j[None, :]) * weight_j[None, :]

        masked = (col0 + BLOCK_N > C) | (row0 + BLOCK_M > R)
        if AIds is not None:
            masked |= (low_id <= tl.load(BRanges + tiles + tile)) & (high_id >= tl.load(BRanges + tile))
        if masked:
            keep = (rows[:, None] < R) & (cols[None, :] < C)
            if AIds is not None:
                col_ids = tl.load(BIds + tl.minimum(cols, C - 1))
                keep = keep & (row_ids[:, None] != col_ids[None, :])
            w = tl.where(keep, w, 0.0)
        # Here and not after the product: where P_ip is nearly 1 it cancels, in float32.
        if APositives is not None:
            has_positives = (low < col0 + BLOCK_N) & (high >= col0)
            if has_positives:
                w += tl.where(cols[None, :] == positives[:, None], grad_i[:, None], 0.0)
        if BPositives is not None:
            low_j, high_j = tl.load(BRanges + 2 * tiles + tile), tl.load(BRanges + 3 * tiles + tile)
            if (low_j < row0 + BLOCK_M) & (high_j >= row0):
                at = tl.minimum(cols, C - 1)
                mates = tl.where(cols < C, load_positives(BPositives, at, R), -1)
                grad_j = tl.load(GradPositive + at) * factor
                w += tl.where(mates[None, :] == rows[:, None], grad_j[None, :], 0.0)
        if Sums is not None:
            sums += tl.sum(w, 1)
        da = tl.dot(w.to(bj.dtype), bj, da, input_precision=PRECISION)

    da = da * (1.0 / factor)
    store_gradient(DA, Dots, A, da * scale, da, rows, chunk, R, D, BLOCK_D, UPCAST)
    if Sums is not None:
        at = tl.program_id(2).to(tl.int64) * R + rows
        tl.store(Sums + at, sums / factor, mask=(rows < R) & (tl.program_id(1) == 0))


class Side(NamedTuple):
    """The rows (or columns) of x and what belongs to each: the vectors are [L], or ``None``."""

    z: Tensor  # [L, D]
    weights: Tensor | None = None  # [3, L], see similarity_bands.py
    bias: Tensor | None = None
    ids: Tensor | None = None
    positives: Tensor | None = None


def _gradient(
    a: Side,
    b: Side,
    scale: Tensor,
    factor: Tensor | None,
    grad_positive: Tensor | None,
    config: Config,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """scale·(W b) [R, D], its dots a·(W b) summed [], and the row sums of W [R] if asked."""
    (r, d), c = a.z.shape, b.z.shape[0]
    grid = owner_grid(a.z, c, config)
    da = a.z.new_empty((grid.parts, r, d), dtype=torch.float32)
    dots = a.z.new_empty((grid.parts, grid.chunks, r), dtype=torch.float32)
    row_sums = a.z.new_empty((grid.parts, r), dtype=torch.float32) if sums else None
    _similarity_backward_kernel[grid](
        a.z, b.z, scale, factor, a.weights, b.weights, a.bias, b.bias, a.ids, b.ids, a.positives, b.positives,
        grad_positive, block_ranges(b.ids, b.positives, r, config.block_n), da, dots, row_sums, r, c,
        **launch_options(config, a.z), **EXACT,
    )  # fmt: skip
    return da[0] if grid.parts == 1 else da.sum(0), dots.sum(), None if row_sums is None else row_sums.sum(0)


def _float16_factor(grads: list[Tensor]) -> Tensor:
    """[]: the power of two that brings the largest gradient to 2^13 … 2^14: three of them stay below float16's 65504.

    The probabilities they multiply then stay normal numbers down to 8e-9.
    """
    largest = torch.stack([g.abs().nan_to_num(0.0, 0.0).amax() for g in grads]).amax()
    return torch.ldexp(torch.ones_like(largest), 14 - torch.frexp(largest).exponent.clamp(min=-100))


def similarity_backward(
    grad_row: Tensor | None,
    grad_col: Tensor | None,
    grad_positive: Tensor | None,
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    positives: Tensor | None,
    row_max: Tensor,
    row_sum: Tensor,
    col_max: Tensor,
    col_sum: Tensor,
    need_q: bool,
    need_k: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients, from those of row_lse [M], col_lse [N] and positive [M] (``None``: zero).

    The other arguments are those of ``similarity_forward`` and what it returned. For rows against themselves (q = k,
    equal ids), ``grad_col`` = ``grad_row`` with the rows' statistics in place of the columns' makes dq the whole
    gradient of the row LSE, and dscale twice its own; of the positives, dq has the part through q even then.

    Returns:
        dq [M, D], dk [N, D], dscale [] (needs dq or dk, else 0), dbias [N]; float32; [0] for what was not asked for.
    """
    features = q.shape[1]
    q, k = padded(q), padded(k)
    vectors = contiguous(grad_row, grad_col, grad_positive, bias, row_ids, col_ids, positives)
    grad_row, grad_col, grad_positive, bias, row_ids, col_ids, positives = vectors
    if grad_positive is None:
        positives = None
    given = [g for g in (grad_row, grad_col, grad_positive) if g is not None]
    factor = _float16_factor(given) if q.dtype == torch.float16 and given else None
    terms = Terms(
        grad_row, row_max, row_sum, grad_col, col_max, col_sum, bias, row_ids, col_ids, positives, grad_positive, factor
    )
    needs = need_q, need_k, need_bias
    config = config_for(SIMILARITY_OWNER, architecture(q), q.element_size(), q.shape[1])
    sides = need_q + (need_k or need_bias)
    found = None
    with torch.cuda.device_of(q):
        if sides and gradient_form(q, sides, config) == "banded":
            found = _banded(q, k, scale, terms, *needs)
        if found is None:
            found = _streamed(q, k, scale, terms, config, *needs)
    dq, dk, dscale, dbias = found
    empty = q.new_empty(0, dtype=torch.float32)
    return (
        empty if dq is None else dq[:, :features].contiguous(),
        empty if dk is None else dk[:, :features].contiguous(),
        q.new_zeros((), dtype=torch.float32) if dscale is None else dscale,
        empty if dbias is None else dbias,
    )


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # dq, dk, dscale, dbias


def _streamed(
    q: Tensor, k: Tensor, scale: Tensor, terms: Terms, config: Config, need_q: bool, need_k: bool, need_bias: bool
) -> Gradients:
    factor, grad_positive = terms.factor, terms.grad_positive
    row_weights = column_weights = None
    if terms.row_grad is not None:
        row_weights = weights_of(terms.row_grad, terms.row_max, terms.row_sum, factor, terms.row_max).values
    if terms.col_grad is not None:
        column_weights = weights_of(terms.col_grad, terms.col_max, terms.col_sum, factor, terms.col_max).values
    rows = Side(q, row_weights, None, terms.row_ids, terms.positives)
    columns = Side(k, column_weights, terms.bias, terms.col_ids)
    dq = dk = dscale = dbias = None
    if need_k or need_bias:
        dk, dscale, dbias = _gradient(columns, rows, scale, factor, grad_positive, config, need_bias)
        dk = dk if need_k else None
    if need_q:
        dq, dscale, _ = _gradient(rows, columns, scale, factor, grad_positive, config, False)
    return dq, dk, dscale, dbias


def _banded(
    q: Tensor, k: Tensor, scale: Tensor, terms: Terms, need_q: bool, need_k: bool, need_bias: bool
) -> Gradients | None:
    """``None`` where memory has no room for a band."""
    found = band_gradients(q, k, scale, terms, need_q, need_k, need_bias)
    if found is None:
        return None
    dq, dk, dbias = found
    dscale, factor = None, terms.factor
    multiplier = scale if factor is None else scale / factor
    for z, gradient in ((k, dk), (q, dq)):
        if gradient is not None:
            dscale = finish(z, gradient, multiplier)
    if factor is not None:
        dscale = None if dscale is None else dscale / factor
        dbias = None if dbias is None else dbias / factor
    return dq, dk, dscale, dbias
