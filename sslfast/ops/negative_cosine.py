"""``offset + factor · Σ_i cos(p_i, z_i)``: one read of each row forward, one read and one write of each backward.

With ``r_x = 1 / max(‖x‖, eps)`` and ``c_i = r_p r_z p_i·z_i``:  ``dc_i/dp_i = r_p (r_z z_i − c_i r_p p_i)``, and the
last term is 0 where the norm was below ``eps``, for there the divisor is a constant; likewise for ``z_i``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import _backends, _library, reference
from .._checks import accumulator
from . import _devices

BACKENDS = ("cpu", "cuda", "reference")
why_not = functools.partial(_devices.why_not, "negative_cosine", "p")
EPS = 1e-8
SAVED = 3  # numbers of a row: both inverse norms, the cosine


def _forward_fake(p: Tensor, z: Tensor, eps: float, factor: float, offset: float) -> tuple[Tensor, Tensor]:
    kind = accumulator(p)
    return p.new_empty((), dtype=kind), p.new_empty((p.shape[0], SAVED), dtype=kind)


def _backward_fake(
    grad: Tensor, p: Tensor, z: Tensor, saved: Tensor, eps: float, factor: float, of_p: bool, of_z: bool
) -> tuple[Tensor, Tensor]:
    rows, d = p.shape
    return p.new_empty((rows if of_p else 0, d)), p.new_empty((rows if of_z else 0, d))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    p, z, ctx.eps, ctx.factor, _ = inputs
    ctx.save_for_backward(p, z, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    p, z, saved = ctx.saved_tensors
    needed = ctx.needs_input_grad[:2]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (grad, p, z)):
        function = functools.partial(by_reference, eps=ctx.eps, factor=ctx.factor)
        return (*_library.second_order(function, (p, z), needed, grad), None, None, None)
    dp, dz = torch.ops.sslfast.negative_cosine_backward(grad, p, z, saved, ctx.eps, ctx.factor, *needed)
    return dp if needed[0] else None, dz if needed[1] else None, None, None, None


_library.define(
    "negative_cosine(Tensor p, Tensor z, float eps, float factor, float offset) -> (Tensor loss, Tensor saved)",
    _forward_fake,
)
_library.define(
    "negative_cosine_backward(Tensor grad, Tensor p, Tensor z, Tensor saved, float eps, float factor, bool of_p,"
    " bool of_z) -> (Tensor, Tensor)",
    _backward_fake,
)
_library.autograd("negative_cosine", _backward, _setup_context)


def by_reference(p: Tensor, z: Tensor, eps: float = EPS, factor: float = -1.0, offset: float = 0.0) -> Tensor:
    """The reference with the kernels' precision: norms of 16-bit rows are float32 numbers, in which eps is not 0."""
    return reference.negative_cosine(p.to(accumulator(p)), z.to(accumulator(z)), eps, factor, offset)


def negative_cosine(p: Tensor, z: Tensor, eps: float = EPS, factor: float = -1.0, offset: float = 0.0) -> Tensor:
    """``offset + factor · Σ_i cos(p_i, z_i)``, [], of matrices [N, D] of one dtype and device, checked already."""
    if _backends.serve("negative_cosine", p, "cuda", why_not) == "reference":
        return by_reference(p, z, eps, factor, offset)
    loss: Tensor = _library.run("negative_cosine", p, z, eps, factor, offset)[0]
    return loss
