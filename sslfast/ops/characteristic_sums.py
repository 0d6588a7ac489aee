"""Sums of the empirical characteristic function of rows on slices, and their gradient: SIGReg's primitive.

With ``p_ia = z_i·a`` the projection of a row on a slice and ``t_k = k·step`` the knots, k = 1 … K:

    C_k = Σ_i cos(t_k p_ia),   S_k = Σ_i sin(t_k p_ia)                        [2, V, K, S] for V views and S slices
    d/dp_ia = Σ_k t_k (h_k cos(t_k p_ia) − g_k sin(t_k p_ia)),   dz = (d/dp) Aᵀ,   g, h = d/dC, d/dS

The knots are equally spaced, so one cosine and one sine serve all of them: angles are added. Nothing of size
rows × slices × knots is stored, and on a CPU nothing of size rows × slices either: projections are computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backends, _library, _native, reference
from .._checks import accumulator, without_autocast

BACKENDS = ("cpu", "triton", "reference")


def why_not(backend: str, z: Tensor) -> str | None:
    """The reason ``backend`` cannot serve inputs like ``z``, or ``None`` if it can."""
    if backend == "cpu":
        return _native.why_no_cpu(z.device, "z")
    if backend == "triton":
        if z.dtype == torch.float64:
            return "the Triton kernel takes float32, bfloat16 and float16, not float64"
        return _native.why_no_triton(z.device)
    return f"characteristic_sums has no {backend} implementation"


def by_reference(z: Tensor, slices: Tensor, knots: int, step: float) -> Tensor:
    """The reference with the kernels' precision: sums of 16-bit inputs are float32, also inside an autocast region."""
    with without_autocast(z):
        return reference.characteristic_sums(z.to(accumulator(z)), slices, knots, step)


def _fake(z: Tensor, slices: Tensor, knots: int, step: float) -> Tensor:
    return z.new_empty((2, z.shape[0], knots, slices.shape[1]), dtype=accumulator(z))


def _backward_fake(grad_sums: Tensor, z: Tensor, slices: Tensor, knots: int, step: float) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, slices, *ctx.options = inputs
    ctx.save_for_backward(z, slices)


def _backward_by(operator: str) -> Any:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, slices = ctx.saved_tensors
        if torch.is_grad_enabled() and (grad.requires_grad or z.requires_grad):

            def function(z: Tensor) -> Tensor:
                return by_reference(z, slices, *ctx.options)

            return _library.second_order(function, (z,), (True,), grad)[0], None, None, None
        return getattr(torch.ops.sslfast, operator)(grad, z, slices, *ctx.options), None, None, None

    return backward


for _name in ("characteristic_sums", "characteristic_sums_triton"):
    _library.define(f"{_name}(Tensor z, Tensor slices, int knots, float step) -> Tensor", _fake)
    _library.define(
        f"{_name}_backward(Tensor grad_sums, Tensor z, Tensor slices, int knots, float step) -> Tensor", _backward_fake
    )
    _library.autograd(_name, _backward_by(f"{_name}_backward"), _setup_context)


def _triton(z: Tensor, *rest: Any) -> Tensor:
    from ..kernels import characteristic_sums as kernel

    return kernel.characteristic_sums(z, *rest)


def _triton_backward(*arguments: Any) -> Tensor:
    from ..kernels import characteristic_sums as kernel

    return kernel.characteristic_sums_backward(*arguments)


_library.implement("characteristic_sums_triton", _triton, "CUDA", "CPU")
_library.implement("characteristic_sums_triton_backward", _triton_backward, "CUDA", "CPU")


def characteristic_sums(z: Tensor, slices: Tensor, knots: int, step: float) -> Tensor:
    """Sums over rows of ``cos(t_k z_i·a)`` and ``sin(t_k z_i·a)`` for every slice and knot ``t_k = k·step``, k ≥ 1.

    For losses in this package, which have checked the arguments.

    Args:
        z: [V, N, D], float32, float64, bfloat16 or float16, any strides.
        slices: [D, S] in the accumulator's dtype of ``z`` (float64 for float64, else float32); a constant.
        knots: K, at least 1.
        step: distance of the knots.

    Returns:
        [2, V, K, S], cosines then sines, float32 (float64 for float64 inputs). Differentiable in ``z``, twice through
        the reference.

    Raises:
        RuntimeError: a forced backend cannot serve the call.

    Source: Epps and Pulley 1983, "A Test for Normality Based on the Empirical Characteristic Function".

    Example:
        >>> from sslfast.ops.characteristic_sums import characteristic_sums
        >>> characteristic_sums(torch.zeros(1, 3, 2), torch.eye(2), 1, 0.5).flatten().tolist()
        [3.0, 3.0, 0.0, 0.0]
    """
    backend = _backends.serve("characteristic_sums", z, "triton", why_not)
    if backend == "reference":
        return by_reference(z, slices, knots, step)
    name = "characteristic_sums_triton" if backend == "triton" else "characteristic_sums"
    sums: Tensor = _library.run(name, z, slices, knots, step)
    return sums
