"""Second moments of the rows of all ranks: M is summed over the ranks, or the rows are gathered.

With x̂ [N, D] the standardised rows of all ranks and x̂_r [n, D] those of rank r:

    primal   M = Σ_r Â_rᵀB̂_r is all-reduced            dÂ_r = 2·B̂_r offdiag(M)ᵀ                     n·D² a rank
    dual     rows are gathered, G_r = X̂_r X̂ᵀ [n, N]     dÂ_r = 2·(G_r(B)·Â − B̂_r diag(M_ii))        n·N·D a rank

No matrix travels in the backward, and no product is computed on more than one rank. Gradients are summed over ranks, as
those of ``total``: every rank's loss is a function of the same numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import accumulator, is_real, without_autocast
from ..ops.types import MomentOptions, SecondMoment
from .agreement import named, sizes_of
from .collectives import Ranks, recorded, total


def second_moment(ranks: Ranks, a: Tensor, b: Tensor | None, options: MomentOptions) -> SecondMoment:
    """``GatherScope.second_moment``; a collective. Twice differentiable, then with M [D, D] on every rank.

    Raises:
        TypeError, ValueError: as :func:`sslfast.second_moment`; ``statistics`` is neither of the two; the ranks
            disagree on an option, the width or the dtype; ``statistics="local"`` where a rank has one row to centre.
        RuntimeError: the inputs of another rank were refused there.
    """
    sizes = _agreed(ranks, a, b, options)
    with without_autocast(a):
        rows = torch.stack([a] if b is None else [a, b])  # [V, n, D]
        x = rows.to(accumulator(a))
        z, columns = _standardised(x, sizes, ranks, options)
        diagonal = (z[:1] * z[1:] if options.cross else z.square()).sum(1)
        pair = b is not None and not options.cross
        distance = (x[0] - x[1]).square().sum() if pair else x.new_zeros(())
        sums = total(torch.cat([diagonal.flatten(), distance.reshape(1)]), ranks)
        diagonal, distance = sums[:-1].view_as(diagonal), sums[-1]
        dual = options.is_dual(sum(sizes), a.shape[1])
        if not dual:
            off = recorded(_Primal, z, ranks, options.cross)
        elif options.statistics == "global":  # rows travel in the inputs' dtype, and are standardised where they arrive
            off = recorded(_Dual, z, diagonal.detach(), rows.detach(), columns, sizes, ranks, options.cross)
        else:
            off = recorded(_Dual, z, diagonal.detach(), z.detach(), _Columns(), sizes, ranks, options.cross)
    return SecondMoment(off, diagonal, distance)


class _Columns(NamedTuple):
    """What is done to every column: [V, 1, D] each, or nothing."""

    mean: Tensor | None = None
    deviation: Tensor | None = None

    def standardised(self, x: Tensor) -> Tensor:
        if self.mean is not None:
            x = x - self.mean
        return x if self.deviation is None else x / self.deviation


def _standardised(x: Tensor, sizes: tuple[int, ...], ranks: Ranks, options: MomentOptions) -> tuple[Tensor, _Columns]:
    """The columns of ``x`` [V, n, D] centred and scaled, by sums over all ranks' rows or over this rank's."""
    everywhere = options.statistics == "global"
    rows = sum(sizes) if everywhere else x.shape[1]

    def over_rows(t: Tensor) -> Tensor:  # [V, n, D] -> [V, 1, D]
        sums = t.sum(1, keepdim=True)
        return total(sums, ranks) if everywhere else sums

    mean = over_rows(x) / rows if options.center else None
    x = _Columns(mean).standardised(x)
    if options.scale == "none":
        return x, _Columns(mean)
    squares = over_rows(x.square())
    if options.scale == "variance":
        deviation = (squares / rows + options.eps).sqrt()
    else:
        zero = squares == 0  # the root's gradient there is not finite
        deviation = squares.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0).clamp_min(options.eps)
    return x / deviation, _Columns(mean, deviation)


# ---------------------------------------------------------------------------------------------- what the ranks agree on


def _agreed(ranks: Ranks, a: Tensor, b: Tensor | None, options: MomentOptions) -> tuple[int, ...]:
    """The ranks' numbers of rows, once all options are known to be the same."""
    traits = {
        "the batches": "one" if b is None else "cross" if options.cross else "pair",
        "center": options.center,
        "scale": options.scale,
        "statistics": options.statistics,
        "form": options.form,
        "eps": float(options.eps) if is_real(options.eps) else 0.0,
        "whether a or b needs a gradient": torch.is_grad_enabled()
        and (a.requires_grad or (b is not None and b.requires_grad)),
    }
    sizes = sizes_of(ranks, "second_moment", a, traits, lambda: options.check(a, b))
    single = [rank for rank, rows in enumerate(sizes) if rows == 1]
    if options.statistics == "local" and options.center and single:
        raise ValueError(
            f"statistics='local' with center=True needs at least two rows on every rank, got one on {named(single)}"
        )
    return sizes


# --------------------------------------------------------------------------------------- squares off the diagonal of M


def _without_diagonal(m: Tensor) -> Tensor:
    return m - torch.diag_embed(m.diagonal(dim1=-2, dim2=-1))


def _differentiable_gradient(grad: Tensor, z: Tensor, ranks: Ranks, cross: bool) -> Tensor:
    """The gradient of the squares off the diagonal in operations that can be differentiated: M on every rank."""
    grad = total(grad, ranks)
    if cross:
        m = _without_diagonal(total(z[0].T @ z[1], ranks))
        return 2 * grad * torch.stack([z[1] @ m.T, z[0] @ m])
    return 4 * grad.view(-1, 1, 1) * (z @ _without_diagonal(total(z.mT @ z, ranks)))


def _halves(z: Tensor) -> tuple[Tensor, Tensor]:
    """The columns [V, n, h] each; a column of zeros makes an odd number of them even."""
    z = torch.nn.functional.pad(z, (0, z.shape[2] % 2))
    left, right = z.split(z.shape[2] // 2, 2)
    return left, right


class _Primal(torch.autograd.Function):
    """Σ_{i≠j} M_ij² [R] from M summed over the ranks.

    Of a symmetric M = [[P, Q], [Qᵀ, S]] the halves above and below the diagonal are the same, so D²/2 numbers travel:
    Q, and in another matrix of its size P above the diagonal and S below it.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, ranks: Ranks, cross: bool) -> Tensor:
        if cross:
            moments = z[0].T @ z[1]  # [D, D]
            moments.diagonal().zero_()
        else:
            left, right = _halves(z)
            triangles = (left.mT @ left).triu_(1).add_((right.mT @ right).tril_(-1))
            moments = torch.stack([triangles, left.mT @ right], 1)  # [V, 2, h, h]
        moments = ranks.all_reduce(moments)
        ctx.save_for_backward(z, moments)
        ctx.ranks, ctx.cross = ranks, cross
        if cross:
            return moments.square().sum(dtype=torch.float64).to(z.dtype).reshape(1)
        return 2 * moments.square().sum((1, 2, 3), dtype=torch.float64).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        z, moments = ctx.saved_tensors
        with without_autocast(z):
            if torch.is_grad_enabled():
                return _differentiable_gradient(grad, z, ctx.ranks, ctx.cross), None, None
            grad = ctx.ranks.all_reduce(grad)
            if ctx.cross:
                return torch.stack([z[1] @ moments.T, z[0] @ moments]).mul_(2 * grad), None, None
            left, right = _halves(z)
            triangles, q = moments.unbind(1)
            p, s = triangles.triu(1), triangles.tril(-1)
            dz = torch.cat([left @ (p + p.mT) + right @ q.mT, left @ q + right @ (s + s.mT)], 2)
            return dz[..., : z.shape[2]] * (4 * grad.view(-1, 1, 1)), None, None


class _Dual(torch.autograd.Function):
    """Σ_{i≠j} M_ij² [R] from this rank's rows of the Gram matrices of all rows, and M_ii ``diagonal`` [R, D].

    What travels is ``rows`` [V, n, D], which ``columns`` make into rows like those of ``z``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        diagonal: Tensor,
        rows: Tensor,
        columns: _Columns,
        sizes: tuple[int, ...],
        ranks: Ranks,
        cross: bool,
    ) -> Tensor:
        every = ranks.all_gather(rows.transpose(0, 1), sizes).transpose(0, 1)  # [V, N, D]
        every = columns.standardised(every.to(z.dtype))
        grams = z @ every.mT  # [V, n, N]
        squares = (grams[:1] * grams[1:] if cross else grams.square()).sum((1, 2), dtype=torch.float64)
        squares = ranks.all_reduce(squares)
        ctx.save_for_backward(z, every, grams, diagonal)
        ctx.ranks, ctx.cross = ranks, cross
        return (squares - diagonal.double().square().sum(1)).clamp_min(0).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, every, grams, diagonal = ctx.saved_tensors
        with without_autocast(z):
            if torch.is_grad_enabled():
                return (_differentiable_gradient(grad, z, ctx.ranks, ctx.cross), *(None,) * 6)
            grad = ctx.ranks.all_reduce(grad).view(-1, 1, 1)
            diagonal = diagonal.unsqueeze(1)
            if ctx.cross:
                dz = (grams.flip(0) @ every - z.flip(0) * diagonal).mul_(2 * grad)
            else:
                dz = (grams @ every - z * diagonal).mul_(4 * grad)
            return (dz, *(None,) * 6)
