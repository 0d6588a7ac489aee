"""Row-wise L2-normalisation: ``y_i = x_i / max(‖x_i‖₂, eps)``, one pass over memory each way.

Backward, with ``r_i = 1 / max(‖x_i‖, eps)``:  ``dx_i = r_i · (dy_i − (dy_i·y_i) y_i)``, and ``dx_i = r_i · dy_i`` where
the norm was below ``eps`` (there the divisor is a constant).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import _backends, _library, reference
from .._checks import accumulator, check_matrix
from . import _devices

BACKENDS = ("cpu", "cuda", "reference")
why_not = functools.partial(_devices.why_not, "l2_normalize", "x")
EPS = 1e-12


def _forward_fake(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(x.shape[0], dtype=accumulator(x))


def _backward_fake(grad_y: Tensor, x: Tensor, inv_norm: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, eps = inputs
    ctx.save_for_backward(x, output[1])
    ctx.eps = eps
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None]:
    if grad_y is None:
        return None, None
    x, inv_norm = ctx.saved_tensors
    if torch.is_grad_enabled() and (x.requires_grad or grad_y.requires_grad):
        # Only under create_graph=True: the reference's own graph makes the second derivative right.
        (grad_x,) = torch.autograd.grad(by_reference(x, ctx.eps), x, grad_y, create_graph=True)
        return grad_x, None
    return torch.ops.sslfast.l2_normalize_backward(grad_y, x, inv_norm, ctx.eps), None


_library.define("l2_normalize(Tensor x, float eps) -> (Tensor y, Tensor inv_norm)", _forward_fake)
_library.define("l2_normalize_backward(Tensor grad_y, Tensor x, Tensor inv_norm, float eps) -> Tensor", _backward_fake)
_library.autograd("l2_normalize", _backward, _setup_context)


def by_reference(x: Tensor, eps: float = EPS) -> Tensor:
    """The reference with the kernels' precision: norms of 16-bit rows are float32 numbers, in which eps is not 0."""
    return reference.l2_normalize(x.to(accumulator(x)), eps).to(x.dtype)


def normalized(x: Tensor, eps: float, backend: str) -> Tensor:
    """Rows of an operation that ``backend`` serves, normalised: by the reference with it, else by the device's kernel.

    The operation's backend may be one that this one does not have.
    """
    if backend == "reference":
        return by_reference(x, eps)
    native = "cuda" if x.device.type == "cuda" else "cpu"
    reason = why_not(native, x)
    if reason is None:
        return _library.run("l2_normalize", x, eps)[0]
    _backends.tell_fallback("l2_normalize", native, reason)
    return by_reference(x, eps)


def l2_normalize(x: Tensor, eps: float = EPS) -> Tensor:
    """Divide each row by its Euclidean norm: ``y_i = x_i / max(‖x_i‖₂, eps)``, as ``F.normalize(x, dim=1)``.

    Args:
        x: [M, D], float32, float64, bfloat16 or float16; any strides.
        eps: lower bound of the divisor (default 1e-12); positive.

    Returns:
        [M, D], ``x``'s dtype. Sums are float32 (float64 for float64). Differentiable, twice through the reference.

    Raises:
        TypeError, ValueError: ``x`` is not a two-dimensional floating-point tensor, is empty, or ``eps`` is not
            positive.

    Example:
        >>> [round(x, 4) for x in sslfast.l2_normalize(torch.tensor([[3.0, 4.0]]))[0].tolist()]
        [0.6, 0.8]
    """
    check_matrix("x", x)
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    backend = _backends.serve("l2_normalize", x, "cuda", why_not)
    if backend == "reference":
        return by_reference(x, eps)
    return _library.run("l2_normalize", x, eps)[0]
