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

from .. import _backends, _native
from .._checks import check_matrix, check_same, is_real
from ._second_moment_operators import by_reference
from .moment_losses import PENALTIES, SCALES, Loss
from .types import SecondMoment

BACKENDS = ("cpu", "triton", "reference")
FORMS = ("auto", "primal", "dual")
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


def dual_is_cheaper(n: int, d: int) -> bool:
    """The cost model of ``form="auto"``: N × N Gram matrices where the batch is clearly smaller than the width.

    Both forms do 3·N·D·min(N, D) operations a batch, so the border is at N = D. It is drawn a little before, because
    the dual form subtracts Σ M_ii² from ‖M‖²: M has rank at most N, so of a matrix whose diagonal is even at least
    1 − N/D of ‖M‖² is left.
    """
    return 10 * n <= 9 * d


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
    check_matrix("a", a)
    if b is not None:
        check_matrix("b", b)
        check_same("a", a, "b", b)
    elif cross:
        raise ValueError("cross=True needs b: the moments between two batches")
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(map(repr, SCALES))}, got {scale!r}")
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(map(repr, FORMS))}, got {form!r}")
    if not is_real(eps) or not eps > 0:
        raise ValueError(f"eps must be a positive number, got {eps!r}")
    backend = _backends.serve("second_moment", a, "triton", why_not)
    if backend == "reference":
        return by_reference(a, b, cross, center, scale, eps)
    if backend == "triton":
        return SecondMoment(*_triton(a, b, cross, center, scale, eps, form, _NO_LOSS)[1:4])
    dual = _is_dual(a, form)
    keep = _learns(a, b) and (dual or _fits(a, b, cross))
    operator = torch.ops.sslfast.second_moment
    return SecondMoment(*operator(a, b, cross, center, SCALES.index(scale), eps, dual, keep)[:3])


def _is_dual(a: Tensor, form: str) -> bool:
    return dual_is_cheaper(*a.shape) if form == "auto" else form == "dual"


def _learns(a: Tensor, b: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (a.requires_grad or (b is not None and b.requires_grad))


def _fits(a: Tensor, b: Tensor | None, cross: bool) -> bool:
    """Whether all of M may be in memory."""
    return (1 if b is None or cross else 2) * a.shape[1] ** 2 <= KEPT


def _triton(
    a: Tensor, b: Tensor | None, cross: bool, center: bool, scale: str, eps: float, form: str, loss: Loss
) -> tuple[Tensor, ...]:
    dual = _is_dual(a, form)
    weights = [loss.off, loss.distance, loss.columns]
    options = cross, center, SCALES.index(scale), eps, dual, PENALTIES.index(loss.penalty), loss.floor, weights
    outputs: tuple[Tensor, ...] = torch.ops.sslfast.second_moment_triton(
        a, b, *options, dual or _fits(a, b, cross), _learns(a, b)
    )
    return outputs


def moment_loss(
    a: Tensor,
    b: Tensor | None,
    loss: Loss,
    *,
    cross: bool = False,
    center: bool = True,
    scale: str = "none",
    eps: float = 1e-5,
    form: str = "auto",
) -> Tensor | None:
    """A weighted sum of :func:`second_moment`'s sums and of a penalty, in the launches of the sums alone.

    The arguments, which are not checked again, are those of :func:`second_moment`; ``None`` where no such kernel
    serves them: then it is for the caller to add up :func:`second_moment`'s sums.
    """
    backend = _backends.serve("second_moment", a, "triton", why_not)
    return _triton(a, b, cross, center, scale, eps, form, loss)[0] if backend == "triton" else None
