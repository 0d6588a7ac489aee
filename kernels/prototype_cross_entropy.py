"""The teacher's side of prototype_cross_entropy: the mean prototype that its assignments expect, and its gradient.

    x_mk = scale·g_m·u_k + β_k in base 2,   p_mk = 2^x_mk / Σ_k 2^x_mk,   attended_m = Σ_k p_mk w_k   [M, D]
    dw_k = Σ_m p_mk dattended_m                                                                         [K, D]

Since ``Σ_k p_mk·(h·w_k) = h·attended_m``, that is all of the teacher that the loss needs, and neither p nor a logit is
stored. The forward is FlashAttention's with the teacher's prototypes for keys and the student's for values; in the
backward a program owns rows of dw and streams over the teacher's rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import architecture, launch_options
from ._configs import SIMILARITY_OWNER, config_for
from ._owner import load_tile_rows, owner_grid, tiles_of_part
from ._tiles import EXACT, LOG2E, contiguous, dot_products, load_rows, padded
from .similarity_lse_attend import streamed_attend


@triton.jit(do_not_specialize=["K", "M"])
def _prototype_attend_backward_kernel(
    A,  # [K, D]: the teacher's prototypes
    B,  # [M, D]: the teacher's features
    Y,  # [M, D]: the incoming gradient in the features' type
    Scale,  # []
    Bias,  # [K] or None
    Lse,  # [M]
    DW,  # [splits, K, D]
    K,
    M,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (b, c, h): prototypes of block b, features [c·BLOCK_D, (c+1)·BLOCK_D), the h-th part of the rows."""
    # Probabilities are at most 1; times 2^14 they fill float16's range and stay normal numbers down to 4e-9.
    SHIFT: tl.constexpr = 14.0 if A.dtype.element_ty == tl.float16 else 0.0
    scale = tl.load(Scale) * LOG2E
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    chunk = tl.program_id(1) * BLOCK_D
    ui = load_rows(A, rows, 0, K, D, BLOCK_K, UPCAST)
    level = tl.zeros((BLOCK_M,), tl.float32)
    if Bias is not None:
        level = tl.load(Bias + rows, mask=rows < K, other=0.0) * LOG2E
    dw = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    _tiles, begin, end = tiles_of_part(M, BLOCK_N)
    for tile in range(begin, end):
        _col0, cols, yj = load_tile_rows(Y, tile, chunk, M, D, BLOCK_N, BLOCK_D, UPCAST)
        gj = yj
        if D <= BLOCK_K:
            gj = load_rows(B, cols, 0, M, D, BLOCK_K, UPCAST)
        x = dot_products(ui, gj, A, B, rows, cols, K, M, D, BLOCK_K, PRECISION, UPCAST) * scale
        # Rows past the end have no gradient, whatever their exponential is, but it must be finite.
        lse = tl.load(Lse + cols, mask=cols < M, other=float("inf")) * LOG2E
        p = tl.exp2(x + level[:, None] - (lse - SHIFT)[None, :])
        dw = tl.dot(p.to(yj.dtype), yj, dw, input_precision=PRECISION)

    part = tl.program_id(2).to(tl.int64)
    features = chunk + tl.arange(0, BLOCK_D)
    offsets = (part * K + rows)[:, None] * D + features[None, :]
    unit = tl.exp2(tl.full((), -SHIFT, tl.float32))
    tl.store(DW + offsets, dw * unit, mask=(rows[:, None] < K) & (features[None, :] < D))


def prototype_attend(
    teacher: Tensor, teacher_prototypes: Tensor, prototypes: Tensor, bias: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """``attended`` [M, D] and the log-sum-exp [M] of the teacher's logits, float32."""
    features = teacher.shape[1]
    q, k, values = padded(teacher), padded(teacher_prototypes), padded(prototypes)
    (bias,) = contiguous(bias)
    config = config_for(SIMILARITY_OWNER, architecture(q), q.element_size(), q.shape[1])
    with torch.cuda.device_of(q):
        row_lse, attended = streamed_attend(q, k, scale, [bias, None, None], config, values)
    return attended[:, :features].contiguous(), row_lse


def prototype_attend_backward(
    grad: Tensor, teacher: Tensor, teacher_prototypes: Tensor, bias: Tensor | None, scale: Tensor, row_lse: Tensor
) -> Tensor:
    """dw [K, D] float32 of ``grad`` [M, D] float32."""
    features = teacher.shape[1]
    # The product is made in the features' type: of what is left of 16 bits all are used.
    largest = grad.abs().amax()
    unit = torch.where(largest > 0, largest, torch.ones_like(largest))
    y = padded((grad / unit).to(teacher.dtype)).contiguous()
    a, b = padded(teacher_prototypes), padded(teacher)
    (bias,) = contiguous(bias)
    (k, d), m = a.shape, b.shape[0]
    config = config_for(SIMILARITY_OWNER, architecture(a), a.element_size(), d)
    grid = owner_grid(a, m, config)
    dw = a.new_empty((grid.parts, k, d), dtype=torch.float32)
    with torch.cuda.device_of(a):
        _prototype_attend_backward_kernel[grid](
            a, b, y, scale, bias, row_lse, dw, k, m, **launch_options(config, a), **EXACT
        )
    total = dw[0] if grid.parts == 1 else dw.sum(0)
    return (total[:, :features] * unit).contiguous()
