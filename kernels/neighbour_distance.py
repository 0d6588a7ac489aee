"""Distances of rows to given neighbours, and the gradients of distances and of similarities to both ends.

    u = q_i − k_n + eps,  n = index[i, c]      distance_ic = ‖u‖,  dq_i = Σ_c g_ic u/‖u‖,  dk_n = −Σ_{ic → n} g_ic u/‖u‖
    of similarities q_i·k_n                    dq_i = Σ_c g_ic k_n,  dk_n = Σ_{ic → n} g_ic q_i

A program owns one row of a gradient and some of its features: the pairs that point at a row are found by sorting them,
and it adds them up in their order. There are no atomics: the result is the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import EXACT

PAIRS = 4  # that a program takes the distances of


@triton.jit(do_not_specialize=["pairs", "count"])
def _neighbour_distance_kernel(
    Q,  # [M, D]
    K,  # [N, D]
    Index,  # [pairs]
    Distance,  # [pairs]
    pairs,
    count,
    eps,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    n = tl.load(Index + pair, mask=pair < pairs, other=-1)
    row, column = (pair // count).to(tl.int64) * D, tl.maximum(n, 0) * D
    square = tl.zeros((PAIRS,), tl.float32)
    for first in range(0, D, BLOCK_D):
        features = first + tl.arange(0, BLOCK_D)
        inside = (n >= 0)[:, None] & (features < D)[None, :]
        q = tl.load(Q + row[:, None] + features[None, :], mask=inside, other=0.0).to(tl.float32)
        k = tl.load(K + column[:, None] + features[None, :], mask=inside, other=0.0).to(tl.float32)
        u = tl.where(inside, q - k + eps, 0.0)
        square += tl.sum(u * u, 1)
    tl.store(Distance + pair, tl.where(n < 0, float("inf"), tl.sqrt_rn(square)), mask=pair < pairs)


@triton.jit
def _weight(Grad, Distance, pair):
    w = tl.load(Grad + pair)
    if Distance is not None:
        d = tl.load(Distance + pair)
        w = tl.where(d == 0, 0.0, w / tl.where(d == 0, 1.0, d))
    return w


@triton.jit(do_not_specialize=["count"])
def _neighbour_gradient_kernel(
    Grad,  # [pairs]
    Distance,  # [pairs], or None: gradients of similarities
    Index,  # [pairs], or None: the rows are only pointed at
    Order,  # [pairs]: by the rows they point at, or None: the rows only point
    Starts,  # [rows + 1], with Order
    Own,  # [rows, D]
    Q,  # [M, D]
    K,  # [N, D]
    Out,  # [rows, D]
    count,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (i, c): row i of a gradient, the c-th BLOCK_D features."""
    i = tl.program_id(0).to(tl.int64)
    features = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = features < D
    total = tl.zeros((BLOCK_D,), tl.float32)
    own = tl.zeros((BLOCK_D,), tl.float32)
    if Distance is not None:
        own = tl.load(Own + i * D + features, mask=inside, other=0.0).to(tl.float32)
    if Index is not None:
        for c in range(0, count):
            n = tl.load(Index + i * count + c)
            other = tl.load(K + tl.maximum(n, 0) * D + features, mask=inside & (n >= 0), other=0.0).to(tl.float32)
            w = tl.where(n >= 0, _weight(Grad, Distance, i * count + c), 0.0)
            if Distance is not None:
                other = own - other + eps
            total += w * other
    if Order is not None:
        for at in range(tl.load(Starts + i), tl.load(Starts + i + 1)):
            pair = tl.load(Order + at)
            other = tl.load(Q + pair // count * D + features, mask=inside, other=0.0).to(tl.float32)
            w = _weight(Grad, Distance, pair)
            if Distance is not None:
                other = own - other - eps
            total += w * other
    tl.store(Out + i * D + features, total.to(Out.dtype.element_ty), mask=inside)


def _block(d: int) -> int:
    return min(512, triton.next_power_of_2(d))


def neighbour_distance(q: Tensor, k: Tensor | None, index: Tensor, eps: float) -> Tensor:
    """[M, count] float32; q [M, D], k [N, D] or ``None`` for q, index [M, count] int64."""
    q = q.contiguous()
    k = q if k is None else k.contiguous()
    distance = q.new_empty(index.shape, dtype=torch.float32)
    pairs, count = index.numel(), index.shape[1]
    with torch.cuda.device_of(q):
        _neighbour_distance_kernel[(triton.cdiv(pairs, PAIRS),)](
            q, k, index.contiguous(), distance, pairs, count, eps,
            D=q.shape[1], PAIRS=PAIRS, BLOCK_D=_block(q.shape[1]), num_warps=4, **EXACT,
        )  # fmt: skip
    return distance


def neighbour_gradient(
    grad: Tensor,
    distance: Tensor | None,
    index: Tensor,
    q: Tensor,
    k: Tensor | None,
    eps: float,
    need_q: bool,
    need_k: bool,
) -> tuple[Tensor, Tensor]:
    """(dq, dk) in the rows' dtype, empty where not needed; without k dq is the gradient of the rows in both roles."""
    q, index, grad = q.contiguous(), index.contiguous(), grad.contiguous()
    distance = None if distance is None else distance.contiguous()
    itself = k is None
    k = q if k is None else k.contiguous()
    dq, dk = torch.empty_like(q if need_q else q[:0, 0]), torch.empty_like(k if need_k and not itself else k[:0, 0])
    order = starts = None
    if itself or need_k:
        column = index.flatten()
        column, order = torch.where(column < 0, k.shape[0], column).sort(stable=True)
        starts = torch.searchsorted(column, torch.arange(k.shape[0] + 1, device=q.device))
    d, count = q.shape[1], index.shape[1]

    def launch(own: Tensor, out: Tensor, points: bool, pointed_at: bool) -> None:
        _neighbour_gradient_kernel[(len(own), triton.cdiv(d, _block(d)))](
            grad, distance, index if points else None, order if pointed_at else None, starts if pointed_at else None,
            own, q, k, out, count, eps, D=d, BLOCK_D=_block(d), num_warps=4, **EXACT,
        )  # fmt: skip

    with torch.cuda.device_of(q):
        if need_q:
            launch(q, dq, True, itself)
        if need_k and not itself:
            launch(k, dk, False, True)
    return dq, dk
