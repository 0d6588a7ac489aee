"""The strong baseline, and the truth about large problems: library products of a band of rows at a time.

Plain PyTorch on the bands: no M × N matrix is stored, both products of a gradient are the library's, and exponentials
are relative to the largest logit there can be. Rows are unit vectors, so that is |scale|, and no running maximum is
needed while 2·|scale| stays far from the 87 at which float32 underflows (float64: 700). In float64 the same functions
are exact enough to compare with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BAND_NUMBERS = 2**26  # of a band of logits


def bands(rows: int, columns: int) -> list[slice]:
    """Rows a band at a time, at most ``BAND_NUMBERS`` logits (one row at least)."""
    step = max(1, BAND_NUMBERS // max(1, columns))
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are made in."""
    return torch.promote_types(dtype, torch.float32)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float32 or wider; on a GPU the library writes float32 from 16-bit factors itself."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).to(wide(a.dtype))


def _exponentials(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    """exp(scale·q_i·k_j − |scale|)."""
    s = product(q, k.T)
    return torch.addcmul(-scale.abs(), s, scale, out=s).exp_()


def _given(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


class _SelfLse(torch.autograd.Function):
    """log Σ_j exp(scale·z_i·z_j) over j − i not in ``shifts``: dz = scale·W z, W_ij = P_ij g_i + P_ji g_j."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, scale: float, shifts: Sequence[int]) -> Tensor:
        ctx.scale, ctx.shifts = torch.tensor(scale, dtype=wide(z.dtype), device=z.device), shifts
        sums = torch.empty(len(z), dtype=ctx.scale.dtype, device=z.device)
        for rows, e in _SelfLse.bands(z, ctx.scale, shifts):
            sums[rows] = e.sum(1)
        ctx.save_for_backward(z, sums)
        return sums.log() + ctx.scale.abs()

    @staticmethod
    def bands(z: Tensor, scale: Tensor, shifts: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
        for rows in bands(len(z), len(z)):
            e = _exponentials(z[rows], z, scale)
            for shift in shifts:
                e.diagonal(rows.start + shift).zero_()
            yield rows, e

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, sums = ctx.saved_tensors
        factor = grad / sums
        dz = torch.empty_like(z, dtype=sums.dtype)
        for rows, e in _SelfLse.bands(z, ctx.scale, ctx.shifts):
            e *= factor[rows, None] + factor
            dz[rows] = product(e.to(z.dtype), z)
        return (dz * ctx.scale).to(z.dtype), None, None


class _PairLse(torch.autograd.Function):
    """LSE of rows and of columns of scale·q kᵀ: dq = scale·W k, dk = scale·Wᵀq, dscale = Σ q·dq / scale."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        s = scale.detach().to(wide(q.dtype))
        rows_sum = torch.empty(len(q), dtype=s.dtype, device=q.device)
        cols_sum = torch.zeros(len(k), dtype=s.dtype, device=q.device)
        for rows in bands(len(q), len(k)):
            e = _exponentials(q[rows], k, s)
            rows_sum[rows] = e.sum(1)
            cols_sum += e.sum(0)
        ctx.save_for_backward(q, k, scale, rows_sum, cols_sum)
        return rows_sum.log() + s.abs(), cols_sum.log() + s.abs()

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor | None, grad_cols: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, scale, rows_sum, cols_sum = ctx.saved_tensors
        s = scale.to(rows_sum.dtype)
        g, h = _given(grad_rows, rows_sum) / rows_sum, _given(grad_cols, cols_sum) / cols_sum
        dq, dk = torch.empty_like(q, dtype=s.dtype), torch.zeros_like(k, dtype=s.dtype)
        for rows in bands(len(q), len(k)):
            e = _exponentials(q[rows], k, s)
            e *= g[rows, None] + h
            w = e.to(q.dtype)
            dq[rows] = product(w, k)
            dk += product(w.T, q[rows])
        dscale = (dq * q).sum().to(scale.dtype)
        return (dq * s).to(q.dtype), (dk * s).to(k.dtype), dscale


class _AttendedLse(torch.autograd.Function):
    """LSE of rows against keys that do not learn; the gradient, P k, comes in the forward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, scale: float) -> Tensor:
        s = torch.tensor(scale, dtype=wide(q.dtype), device=q.device)
        lse, attended = torch.empty(len(q), dtype=s.dtype, device=q.device), torch.empty_like(q, dtype=s.dtype)
        for rows in bands(len(q), len(k)):
            e = _exponentials(q[rows], k, s)
            sums = e.sum(1)
            lse[rows] = sums.log() + s.abs()
            attended[rows] = product(e.to(q.dtype), k) * (s / sums)[:, None]
        ctx.save_for_backward(attended)
        ctx.dtype = q.dtype
        return lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (attended,) = ctx.saved_tensors
        return (attended * grad[:, None]).to(ctx.dtype), None, None


class _PairLogSigmoid(torch.autograd.Function):
    """−Σ_ij log σ(±(scale·q_i·k_j + bias)), + where i = j; the gradients come in the forward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        s, b = (t.detach().to(wide(q.dtype)) for t in (scale, bias))
        loss, db = torch.zeros((), dtype=s.dtype, device=q.device), torch.zeros((), dtype=s.dtype, device=q.device)
        dq, dk = torch.empty_like(q, dtype=s.dtype), torch.zeros_like(k, dtype=s.dtype)
        for rows in bands(len(q), len(k)):
            t = product(q[rows], k.T)
            torch.addcmul(b, t, s, out=t)
            # log σ(t) = t − softplus(t), −log σ(−t) = softplus(t)
            loss += F.softplus(t, threshold=40).sum() - t.diagonal(rows.start).sum()
            t.sigmoid_().diagonal(rows.start).sub_(1)
            db += t.sum()
            w = t.to(q.dtype)
            dq[rows] = product(w, k)
            dk += product(w.T, q[rows])
        dscale = (dq * q).sum()
        ctx.dtypes = [x.dtype for x in (q, k, scale, bias)]
        ctx.save_for_backward(dq * s, dk * s, dscale, db)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple((x * grad).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))


def self_lse(z: Tensor, scale: float, shifts: Sequence[int] = (0,)) -> Tensor:
    """[M]: log-sum-exp over j of scale·z_i·z_j of unit rows z [M, D], where j − i is in ``shifts`` left out."""
    return _SelfLse.apply(z, scale, tuple(shifts))


def nt_xent(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """NT-Xent of two views, [N, D] each; |temperature| ≥ 0.05."""
    z = F.normalize(torch.cat([z0, z1]), dim=1)
    positive = (z * z.roll(len(z0), 0)).sum(1, dtype=wide(z.dtype)) / temperature
    return (self_lse(z, 1 / temperature) - positive).mean()


def dcl(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """DCL: the row itself and its other view leave the denominator."""
    z, n = F.normalize(torch.cat([z0, z1]), dim=1), len(z0)
    positive = (z * z.roll(n, 0)).sum(1, dtype=wide(z.dtype)) / temperature
    return (self_lse(z, 1 / temperature, (0, n, -n)) - positive).mean()


def sup_con(z: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """SupCon of unit rows: the mean positive is the row times the sum of its class without itself."""
    x = z.to(wide(z.dtype))
    sums = torch.zeros(classes, z.shape[1], dtype=x.dtype, device=z.device).index_add(0, labels, x)
    count = torch.bincount(labels, minlength=classes)[labels] - 1
    positive = (x * (sums[labels] - x)).sum(1) / count.clamp_min(1) / temperature
    return torch.where(count > 0, self_lse(z, 1 / temperature) - positive, 0).mean()


def moco(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """MoCo of unit rows: own keys k [N, D] and a queue [K, D], neither of which learns."""
    positive = (q * k).sum(1, dtype=wide(q.dtype)) / temperature
    return (torch.logaddexp(positive, _AttendedLse.apply(q, queue, 1 / temperature)) - positive).mean()


def clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """CLIP of unit rows with a learnable scale."""
    rows, columns = _PairLse.apply(image, text, scale)
    positive = scale * (image * text).sum(1, dtype=wide(image.dtype))
    return ((rows + columns) / 2 - positive).mean()


def sig_lip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP of unit rows with learnable scale and bias."""
    return _PairLogSigmoid.apply(image, text, scale, bias) / len(image)
