"""The pairwise sigmoid loss of q [M, D] and k [N, D], value and gradients, without the M × N matrix.

    t_ij = −y_ij·(scale·q_i·k_j + bias),   y_ij = +1 where row_id_i = col_id_j, else −1
    loss = Σ_ij softplus(t_ij),   W_ij = −y_ij σ(t_ij)
    dq = scale·W k,   dk = scale·Wᵀ q,   dscale = Σ_i q_i·(W k)_i,   dbias = Σ_ij W_ij

A program owns rows of dq, or, with the roles of q and k exchanged, rows of dk, and streams over the other side. One
launch also gives loss and dbias. There are no atomics: partial results are summed in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import architecture, launch_options
from ._configs import SIMILARITY_OWNER, config_for
from ._gradient_forms import gradient_form
from ._owner import load_tile_rows, owner_grid, store_gradient, tiles_of_part
from ._tiles import block_ranges, contiguous, dot_products, load_rows, padded
from .similarity_logsigmoid_bands import logsigmoid_bands, softplus_and_sigmoid


@triton.jit(do_not_specialize=["R", "C"])
def _similarity_logsigmoid_kernel(
    A,  # [R, D]: q, and B is k; or the other way round
    B,  # [C, D]
    Scale,  # []
    Bias,  # []
    AIds,  # [R]
    BIds,  # [C]
    BRanges,  # [4, tiles]
    Loss,  # [splits, R] or None
    Sums,  # [splits, R], with Loss: Σ_j W_ij
    DA,  # [splits, R, D] or None
    Dots,  # [splits, chunks, R], with DA: a_i·(W b)_i over this program's features and rows of B
    R,
    C,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (b, c, h): row block b, features [c·BLOCK_D, (c+1)·BLOCK_D) of dA, the h-th part of the rows of B."""
    # |W| ≤ 1; times 2^14 it fills float16's range and stays a normal number down to 4e-9.
    W_SCALE: tl.constexpr = 16384.0 if A.dtype.element_ty == tl.float16 else 1.0
    scale, bias = tl.load(Scale), tl.load(Bias)
    row0 = tl.program_id(0) * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    row_ids = tl.load(AIds + tl.minimum(rows, R - 1))
    low_id, high_id = tl.min(row_ids, 0), tl.max(row_ids, 0)
    chunk = tl.program_id(1) * BLOCK_D
    ai = load_rows(A, rows, 0, R, D, BLOCK_K, UPCAST)
    da = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    loss = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)

    tiles, begin, end = tiles_of_part(C, BLOCK_N)
    for tile in range(begin, end):
        col0, cols, bj = load_tile_rows(B, tile, chunk, C, D, BLOCK_N, BLOCK_D, UPCAST)
        t = dot_products(ai, bj, A, B, rows, cols, R, C, D, BLOCK_K, PRECISION, UPCAST) * scale + bias
        special = (low_id <= tl.load(BRanges + tiles + tile)) & (high_id >= tl.load(BRanges + tile))
        special |= col0 + BLOCK_N > C
        sign = tl.full((BLOCK_M, BLOCK_N), W_SCALE, tl.float32)  # −y·W_SCALE
        if special:
            col_ids = tl.load(BIds + tl.minimum(cols, C - 1))
            equal = row_ids[:, None] == col_ids[None, :]
            sign = tl.where(equal, -W_SCALE, W_SCALE)
            # Past the end: softplus(−inf) = 0 = σ(−inf).
            t = tl.where(cols[None, :] < C, tl.where(equal, -t, t), float("-inf"))

        of_rows, sigmoid = softplus_and_sigmoid(t)
        w = sign * sigmoid
        if Loss is not None:
            loss += of_rows
            sums += tl.sum(w, 1)
        if DA is not None:
            da = tl.dot(w.to(bj.dtype), bj, da, input_precision=PRECISION)

    if Loss is not None:
        first = (rows < R) & (tl.program_id(1) == 0)
        at = tl.program_id(2).to(tl.int64) * R + rows
        tl.store(Loss + at, loss, mask=first)
        tl.store(Sums + at, sums * (1.0 / W_SCALE), mask=first)
    if DA is not None:
        da = da * (1.0 / W_SCALE)
        store_gradient(DA, Dots, A, da * scale, da, rows, chunk, R, D, BLOCK_D, UPCAST)


def _launch(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, a_ids: Tensor, b_ids: Tensor, loss: bool, gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss [], ΣW [], scale·(W b) [R, D], Σ a·(W b) []; zeros, or an empty gradient, where not asked for."""
    (r, d), c = a.shape, b.shape[0]
    config = config_for(SIMILARITY_OWNER, architecture(a), a.element_size(), d)
    grid = owner_grid(a, c, config, owns_features=gradient)

    def empty(*shape: int) -> Tensor:
        return a.new_empty(shape, dtype=torch.float32)

    losses, sums = (empty(grid.parts, r), empty(grid.parts, r)) if loss else (None, None)
    da, dots = (empty(grid.parts, r, d), empty(grid.parts, grid.chunks, r)) if gradient else (None, None)
    with torch.cuda.device_of(a):
        _similarity_logsigmoid_kernel[grid](
            a, b, scale, bias, a_ids, b_ids, block_ranges(b_ids, None, 0, config.block_n), losses, sums, da, dots,
            r, c, **launch_options(config, a),
        )  # fmt: skip
    zero = a.new_zeros((), dtype=torch.float32)
    return (
        zero if losses is None else losses.sum(),
        zero if sums is None else sums.sum(),
        empty(0) if da is None else da[0] if grid.parts == 1 else da.sum(0),
        zero if dots is None else dots.sum(),
    )


def similarity_logsigmoid(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_ids: Tensor,
    col_ids: Tensor,
    need_q: bool,
    need_k: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss and the gradients of the loss.

    Args:
        q: [M, D], k: [N, D], contiguous; float32, bfloat16 or float16.
        scale, bias: [] float32 on their device, read there; row_ids, col_ids: [M], [N] int64.

    Returns:
        loss [], dq [M, D], dk [N, D], dscale [] (needs dq or dk, else 0), dbias []; float32; [0] for a gradient that
        was not asked for.
    """
    features = q.shape[1]
    q, k = padded(q), padded(k)
    row_ids, col_ids = contiguous(row_ids, col_ids)
    dk = q.new_empty(0, dtype=torch.float32)
    config = config_for(SIMILARITY_OWNER, architecture(q), q.element_size(), q.shape[1])
    sides = need_q + need_k
    if sides and gradient_form(q, sides, config) == "banded":
        found = logsigmoid_bands(q, k, scale, bias, (row_ids, col_ids), (need_q, need_k))
        if found is not None:
            loss, *gradients, dscale, dbias = found
            dq, dk = (dk if g is None else g[:, :features].contiguous() for g in gradients)
            return loss, dq, dk, dscale, dbias
    # The first launch gives the loss and dbias too.
    loss, dbias, dq, dscale = _launch(q, k, scale, bias, row_ids, col_ids, True, need_q)
    if need_k:
        _, _, dk, dots = _launch(k, q, scale, bias, col_ids, row_ids, False, True)
        dk, dscale = dk[:, :features].contiguous(), dscale if need_q else dots
    return loss, dq[:, :features].contiguous() if need_q else dq, dk, dscale, dbias
