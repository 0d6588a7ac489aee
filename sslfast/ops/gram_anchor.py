"""Gram anchoring: the mean square of the differences of two Gram matrices, without either in memory.

    D_ij = f(x_i·x_j) − h(y_i·y_j),   loss = mean D²,   W_ij = D_ij f'(x_i·x_j),   dx = 4/(B P²) W x

for the rows x, y [P, D] of each of B images; f and h are the identity or max(·, 0). The gradient does not need the
loss: it is made in the same pass, scaled in the backward. The teacher has none. The mathematics is in
``docs/gram_anchor.md``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _backends, _library, _native, reference
from .._checks import accumulator, without_autocast
from .l2_normalize import EPS, normalized

BACKENDS = ("cpu", "triton", "reference")
NEGATIVES = ("keep", "clamp", "clamp_teacher")


def _fake(student: Tensor, teacher: Tensor, normalize: bool, negatives: int, gradient: bool) -> tuple[Tensor, Tensor]:
    kind, (images, rows, d) = accumulator(student), student.shape
    return student.new_empty((), dtype=kind), student.new_empty((images if gradient else 0, rows, d), dtype=kind)


def _triton_fake(x: Tensor, y: Tensor, negatives: int, gradient: bool) -> tuple[Tensor, Tensor]:
    return _fake(x, y, False, negatives, gradient)


def _triton(x: Tensor, y: Tensor, negatives: int, gradient: bool) -> tuple[Tensor, Tensor]:
    from ..kernels import gram_anchor as kernel

    return kernel.gram_anchor(x.contiguous(), y.contiguous(), negatives, gradient)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, *normalize, negatives, gradient = inputs
    if not gradient:
        raise ValueError("sslfast::gram_anchor: gradient=False, but student requires a gradient")
    ctx.save_for_backward(student, teacher, output[1])
    ctx.options = {"normalize": bool(normalize and normalize[0]), "negatives": NEGATIVES[negatives]}
    ctx.arguments = len(inputs)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    rest = (None,) * (ctx.arguments - 1)
    if grad is None:
        return None, *rest
    student, teacher, gradient = ctx.saved_tensors
    if torch.is_grad_enabled() and (grad.requires_grad or student.requires_grad):
        function = partial(by_reference, **ctx.options)
        return _library.second_order(function, (student, teacher), (True, False), grad)[0], *rest
    return (gradient * grad).to(student.dtype), *rest


_library.define(
    "gram_anchor(Tensor student, Tensor teacher, bool normalize, int negatives, bool gradient)"
    " -> (Tensor loss, Tensor dstudent)",
    _fake,
)
_library.define(
    "gram_anchor_triton(Tensor x, Tensor y, int negatives, bool gradient) -> (Tensor, Tensor)", _triton_fake
)
_library.implement("gram_anchor_triton", _triton, "CUDA", "CPU")
_library.autograd("gram_anchor", _backward, _setup_context)
_library.autograd("gram_anchor_triton", _backward, _setup_context)


def by_reference(student: Tensor, teacher: Tensor, normalize: bool = True, negatives: str = "clamp") -> Tensor:
    """The reference with the kernels' precision: sums of 16-bit inputs are float32, also inside an autocast region."""
    kind = accumulator(student)
    with without_autocast(student):
        return reference.gram_anchor(student.to(kind), teacher.detach().to(kind), normalize, negatives)


def why_not(backend: str, student: Tensor) -> str | None:
    """The reason ``backend`` cannot serve inputs like ``student``, or ``None`` if it can."""
    if backend == "cpu":
        return _native.why_no_cpu(student.device, "student")
    if backend == "triton":
        if student.dtype == torch.float64:
            return "the Triton kernel takes float32, bfloat16 and float16, not float64"
        return _native.why_no_triton(student.device)
    return f"gram_anchor has no {backend} implementation"


def gram_anchor(student: Tensor, teacher: Tensor, normalize: bool = True, negatives: str = "clamp") -> Tensor:
    """The loss [] of [B, P, D] student and teacher features of one dtype and device, which are checked already."""
    backend = _backends.serve("gram_anchor", student, "triton", why_not)
    teacher = teacher.detach()
    if backend == "reference":
        return by_reference(student, teacher, normalize, negatives)
    mode = NEGATIVES.index(negatives)
    learns = torch.is_grad_enabled() and student.requires_grad
    if backend == "cpu":
        return _library.run("gram_anchor", student, teacher, normalize, mode, learns)[0]
    x, y = (normalized(t.flatten(0, 1), EPS, backend).view(t.shape) if normalize else t for t in (student, teacher))
    if not normalize and student.dtype == torch.float16:  # whose range the differences of long rows leave
        x, y = x.float(), y.float()
    return _library.run("gram_anchor_triton", x, y, mode, learns)[0]
