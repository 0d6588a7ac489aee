"""Sums over second-moment matrices of columns, M = ÂᵀB̂ [D, D], from tiles of M or from N × N Gram matrices.

Â and B̂ are a and b [N, D] with their columns centred and scaled as asked. Wanted are the squares off the diagonal,
the diagonal, and their gradients; nobody needs M itself:

    primal   off = Σ_{i≠j} M_ij²            dÂ = 2·B̂ offdiag(M)ᵀ,  dB̂ = 2·Â offdiag(M)        O(N·D²)
    dual     off = ⟨ÂÂᵀ, B̂B̂ᵀ⟩ − Σ_i M_ii²   dÂ = 2·((B̂B̂ᵀ)Â − B̂ diag(M_ii)), dB̂ alike           O(N²·D)

A matrix with itself (``cross=False``) is the case B̂ = Â. Then every Gram or moment matrix is symmetric and half of it
is computed: 3·N·D·min(N, D) operations a batch, forward and backward together, and 6·N·D² for cross-moments in primal
form. Centring and scaling happen before the products and on the way out of the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backends, _library, _native
from ._second_moment_operators import by_reference
from .moment_losses import PENALTIES, Loss
from .types import SCALES, MomentOptions, SecondMoment

BACKENDS = ("cpu", "triton", "reference")
# Primal form: at most so many numbers of M stay in memory from forward to backward (44 MiB in float32); beyond them
# its tiles are computed again.
KEPT = 11 << 20
_NO_LOSS = Loss()


def why_not(backend: str, a: Tensor) -> str | None:
    """The reason ``backend`` cannot serve inputs like ``a``, or ``None`` if it can."""
    if backend == "cpu":
        return _native.why_no_cpu(a.device, "a")
    if backend == "triton":
        if a.dtype == torch.float64:
            return "the Triton kernel takes float32, bfloat16 and float16, not float64"
        return _native.why_no_triton(a.device)
    return f"second_moment has no {backend} implementation"


def second_moment(
    a: Tensor,
    b: Tensor | None = None,
    *,
    cross: bool = False,
    center: bool = True,
    scale: str = "none",
    eps: float = 1e-5,
    form: str = "auto",
) -> SecondMoment:
    """Diagonal and summed off-diagonal squares of the columns' second-moment matrices, without the matrices.

        M = ÂᵀB̂ if ``cross``, else ÂᵀÂ and, with ``b``, B̂ᵀB̂          (sums over the N rows, not means)

    This is what Barlow Twins (``cross=True, scale="variance"``), VICReg (a pair without ``cross``), and their relatives
    are made of. ``x̂`` is the column ``x``, centred if asked, then divided by ``sqrt(mean(x²) + eps)`` ("variance",
    as batch normalisation) or ``max(‖x‖₂, eps)`` ("norm").

    Args:
        a: [N, D], float32, float64, bfloat16 or float16; any strides.
        b: like ``a``, or ``None``.
        cross: the moments between ``a`` and ``b`` instead of those of each.
        center: subtract each column's mean first (default).
        scale: "none" (default), "variance" or "norm".
        eps: see above (default 1e-5); positive. Without effect for "none".
        form: "primal" computes M by tiles, O(N·D²); "dual" Gram matrices of the rows, O(N²·D); "auto" (default)
            takes the cheaper, :func:`dual_is_cheaper`.

    Returns:
        ``SecondMoment(off_diagonal [R], diagonal [R, D], distance [])`` in float32 (float64 for float64 inputs), R = 2
        for a pair without ``cross``, else 1: Σ_{i≠j} M_ij² and M_ii of each matrix; ``distance`` is ‖a − b‖²_F of a
        pair without ``cross`` (from the same pass), else 0. Differentiable in a and b, twice through the reference.

    Raises:
        TypeError: dtypes are not floating point, or differ.
        ValueError: not matrices of one shape with a row and a column, on one device; ``cross`` without ``b``; ``scale``
            or ``form`` is none of the above; ``eps`` is not positive.

    Example:
        >>> moment = sslfast.second_moment(torch.ones(3, 2), center=False)
        >>> moment.off_diagonal.tolist(), moment.diagonal.tolist()
        ([18.0], [[3.0, 3.0]])
    """
    options = MomentOptions(cross, center, scale, eps, form)
    options.check(a, b)
    return moment_of(a, b, options)


def moment_of(a: Tensor, b: Tensor | None, options: MomentOptions) -> SecondMoment:
    """:func:`second_moment` of arguments that have been checked."""
    backend = _backends.serve("second_moment", a, "triton", why_not)
    if backend == "reference":
        return by_reference(a, b, options)
    if backend == "triton":
        return SecondMoment(*_triton(a, b, options, _NO_LOSS)[1:4])
    dual = options.is_dual(*a.shape)
    keep = _learns(a, b) and (dual or _fits(a, b, options.cross))
    return SecondMoment(*_library.run("second_moment", a, b, *_numbers(options), dual, keep)[:3])


def _numbers(options: MomentOptions) -> tuple[bool, bool, int, float]:
    """As the operators take them."""
    return options.cross, options.center, SCALES.index(options.scale), options.eps


def _learns(a: Tensor, b: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (a.requires_grad or (b is not None and b.requires_grad))


def _fits(a: Tensor, b: Tensor | None, cross: bool) -> bool:
    """Whether all of M may be in memory."""
    return (1 if b is None or cross else 2) * a.shape[1] ** 2 <= KEPT


def _triton(a: Tensor, b: Tensor | None, options: MomentOptions, loss: Loss) -> tuple[Tensor, ...]:
    dual = options.is_dual(*a.shape)
    penalty = PENALTIES.index(loss.penalty), loss.floor, [loss.off, loss.distance, loss.columns]
    whole = dual or _fits(a, b, options.cross)
    outputs: tuple[Tensor, ...] = _library.run(
        "second_moment_triton", a, b, *_numbers(options), dual, *penalty, whole, _learns(a, b)
    )
    return outputs


def moment_loss(a: Tensor, b: Tensor | None, loss: Loss, options: MomentOptions) -> Tensor | None:
    """A weighted sum of :func:`second_moment`'s sums and of a penalty, in the launches of the sums alone.

    The arguments are not checked again. ``None`` where no such kernel serves them: then it is for the caller to add up
    :func:`second_moment`'s sums.
    """
    backend = _backends.serve("second_moment", a, "triton", why_not)
    return _triton(a, b, options, loss)[0] if backend == "triton" else None
