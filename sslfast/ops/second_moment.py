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

from typing import Any

import torch
from torch import Tensor

from .. import _backends, _library, _native, reference
from .._checks import accumulator, check_matrix, check_same, without_autocast
from ..reference.second_moment import SecondMoment

BACKENDS = ("cpu", "triton", "reference")
SCALES = ("none", "variance", "norm")
FORMS = ("auto", "primal", "dual")
# Primal form: at most so many numbers of M stay in memory from forward to backward (44 MiB in float32); beyond them
# its tiles are computed again.
KEPT = 11 << 20


def _moments_shape(a: Tensor, b: Tensor | None, cross: bool, dual: bool, keep: bool) -> tuple[int, ...]:
    if not keep:
        return (0,)
    views = 1 if b is None else 2
    n, d = a.shape
    return (views, n, n) if dual else (1 if cross else views, d, d)


def _fake(
    a: Tensor, b: Tensor | None, cross: bool, center: bool, scale: int, eps: float, dual: bool, keep: bool
) -> tuple[Tensor, ...]:
    kind, d = accumulator(a), a.shape[1]
    views = 1 if b is None else 2
    matrices = 1 if cross else views
    return (
        a.new_empty((matrices,), dtype=kind),
        a.new_empty((matrices, d), dtype=kind),
        a.new_empty((), dtype=kind),
        a.new_empty((views, d), dtype=kind),
        a.new_empty((views, d), dtype=kind),
        a.new_empty(_moments_shape(a, b, cross, dual, keep), dtype=kind),
    )


def _backward_fake(
    grad_off: Tensor,
    grad_diagonal: Tensor,
    grad_distance: Tensor,
    a: Tensor,
    b: Tensor | None,
    diagonal: Tensor,
    mean: Tensor,
    factor: Tensor,
    moments: Tensor,
    cross: bool,
    center: bool,
    scale: int,
    eps: float,
    dual: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor]:
    return (
        a.new_empty(a.shape if need_a else (0,)),
        a.new_empty(a.shape if need_b else (0,)),
    )


def by_reference(a: Tensor, b: Tensor | None, cross: bool, center: bool, scale: str, eps: float) -> SecondMoment:
    """The reference with the kernels' precision: sums of 16-bit inputs are float32, also inside an autocast region."""
    kind = accumulator(a)
    with without_autocast(a):
        wide = None if b is None else b.to(kind)
        return reference.second_moment(a.to(kind), wide, cross=cross, center=center, scale=scale, eps=eps)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, b, *ctx.options, _ = inputs
    _, diagonal, _, mean, factor, moments = output
    ctx.save_for_backward(a, b, diagonal, mean, factor, moments)
    ctx.mark_non_differentiable(mean, factor, moments)
    ctx.set_materialize_grads(False)  # else a backward fills zeros of the size of `moments`


def _backward_by(name: str) -> Any:
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        a, b, diagonal, mean, factor, moments = ctx.saved_tensors
        likes = (diagonal.new_zeros(diagonal.shape[0]), diagonal, diagonal.new_zeros(()))
        grads = [like.new_zeros(like.shape) if g is None else g for g, like in zip(given[:3], likes, strict=True)]
        cross, center, scale, eps, dual = ctx.options
        needed = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*grads, a, b)):

            def function(a: Tensor, b: Tensor | None) -> SecondMoment:
                return by_reference(a, b, cross, center, SCALES[scale], eps)

            return (*_library.second_order(function, (a, b), needed, grads), *(None,) * 6)
        da, db = getattr(torch.ops.sslfast, f"{name}_backward")(
            *grads, a, b, diagonal, mean, factor, moments, *ctx.options, *needed
        )
        return (da if needed[0] else None, db if needed[1] else None, *(None,) * 6)

    return backward


for _name in ("second_moment", "second_moment_triton"):
    _library.define(
        f"{_name}(Tensor a, Tensor? b, bool cross, bool center, int scale, float eps, bool dual, bool keep) ->"
        " (Tensor off_diagonal, Tensor diagonal, Tensor distance, Tensor mean, Tensor factor, Tensor moments)",
        _fake,
    )
    _library.define(
        f"{_name}_backward(Tensor grad_off, Tensor grad_diagonal, Tensor grad_distance, Tensor a, Tensor? b,"
        " Tensor diagonal, Tensor mean, Tensor factor, Tensor moments, bool cross, bool center, int scale, float eps,"
        " bool dual, bool need_a, bool need_b) -> (Tensor da, Tensor db)",
        _backward_fake,
    )
    _library.autograd(_name, _backward_by(_name), _setup_context)


def _triton(a: Tensor, b: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    from ..kernels import second_moment as kernel

    return kernel.second_moment(a.contiguous(), None if b is None else b.contiguous(), *rest)


def _triton_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import second_moment as kernel

    grads, (a, b), rest = arguments[:3], arguments[3:5], arguments[5:]
    return kernel.second_moment_backward(*grads, a.contiguous(), None if b is None else b.contiguous(), *rest)


_library.implement("second_moment_triton", _triton, "CUDA", "CPU")
_library.implement("second_moment_triton_backward", _triton_backward, "CUDA", "CPU")


def why_not(backend: str, a: Tensor) -> str | None:
    """The reason ``backend`` cannot serve inputs like ``a``, or ``None`` if it can."""
    if backend == "cpu":
        return _native.why_missing.get("_C") if a.device.type == "cpu" else f"the inputs are on {a.device}"
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
    """Squares off the diagonal, and the diagonal, of second-moment matrices of columns, without the matrices.

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
    if not isinstance(eps, (int, float)) or not eps > 0:
        raise ValueError(f"eps must be a positive number, got {eps!r}")
    preferred = "triton" if a.device.type == "cuda" else "cpu"
    backend = _backends.select("second_moment", preferred, lambda name: why_not(name, a))
    if backend == "reference":
        return by_reference(a, b, cross, center, scale, eps)
    n, d = a.shape
    dual = dual_is_cheaper(n, d) if form == "auto" else form == "dual"
    learns = torch.is_grad_enabled() and (a.requires_grad or (b is not None and b.requires_grad))
    matrices = 1 if b is None or cross else 2
    keep = learns and (dual or matrices * d * d <= KEPT)
    operator = torch.ops.sslfast.second_moment_triton if backend == "triton" else torch.ops.sslfast.second_moment
    return SecondMoment(*operator(a, b, cross, center, SCALES.index(scale), eps, dual, keep)[:3])
