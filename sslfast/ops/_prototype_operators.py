"""The operators behind ``prototype_cross_entropy``: schemas, fake kernels and autograd."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import _library, reference
from .._checks import accumulator, without_autocast


class Inputs(NamedTuple):
    """What the operators take, in their order; vectors in the accumulator's dtype."""

    student: Tensor  # [V_s, B, D]
    teacher: Tensor  # [V_t, B, D]
    prototypes: Tensor  # [K, D]
    gain: Tensor | None  # [K]
    teacher_prototypes: Tensor  # [K, D]
    teacher_gain: Tensor | None  # [K]
    teacher_bias: Tensor | None  # [K]
    row_weights: Tensor | None  # [B]
    teacher_views: list[int]
    student_views: list[int]
    student_temperature: float
    teacher_temperature: float
    normalize: bool
    normalize_teacher: bool
    need_student: bool
    need_prototypes: bool


LEARNING = 4  # the first inputs, of which the second does not learn
TENSORS = 8  # the first inputs
PROTOTYPES = (2, 4)  # the student's and the teacher's among them


def by_reference(inputs: Inputs) -> Tensor:
    """The reference with the kernels' precision: sums of 16-bit inputs are float32, also inside an autocast region."""
    kind = accumulator(inputs.student)
    w, u = inputs.prototypes.to(kind), inputs.teacher_prototypes.to(kind)
    with without_autocast(inputs.student):
        return reference.prototype_cross_entropy(
            inputs.student.to(kind),
            inputs.teacher.to(kind),
            reference.normalized_prototypes(w, inputs.gain) if inputs.normalize else w,
            reference.normalized_prototypes(u, inputs.teacher_gain) if inputs.normalize_teacher else u,
            list(zip(inputs.teacher_views, inputs.student_views, strict=True)),
            inputs.student_temperature,
            inputs.teacher_temperature,
            inputs.teacher_bias,
            inputs.row_weights,
        )


class Gradients(NamedTuple):
    """Of the loss, with respect to what learns, for an incoming gradient of 1."""

    student: Tensor
    prototypes: Tensor
    gain: Tensor


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    given = Inputs(*arguments)
    (_, samples, d), k = given.student.shape, given.prototypes.shape[0]
    kind = accumulator(given.student)
    views = given.student.shape[0] if given.need_student else 0
    rows = k if given.need_prototypes else 0
    shapes = ((), (views, samples, d), (rows, d), (rows if given.normalize else 0,))
    return tuple(given.student.new_empty(shape, dtype=kind) for shape in shapes)


def _is_plain(x: Tensor) -> bool:
    """A tensor that no tracer and no transform has wrapped: it may be handed on and written to."""
    return (
        type(x) is Tensor and not isinstance(x, FakeTensor) and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = Inputs(*inputs)
    ctx.options = given[TENSORS:]
    kind = accumulator(given.student)
    ctx.kinds = given.student.dtype, given.prototypes.dtype, kind
    _loss, *gradients = output
    # The first backward hands the gradients on as they are: a copy of the prototypes' would be the largest tensor of
    # the step. A second one through the same graph computes them again.
    ctx.gradients = Gradients(*gradients) if all(map(_is_plain, gradients)) else None
    # The first derivative reads no prototypes, so that those which do not learn are not saved as something that must
    # stay: a queue may take in new keys before the backward. What computes again checks that they are what they were.
    saved: list[Any] = list(given[:TENSORS])
    ctx.fixed = {
        place: (saved[place], saved[place]._version) for place in PROTOTYPES if not ctx.needs_input_grad[place]
    }
    for place in ctx.fixed:
        saved[place] = None
    ctx.save_for_backward(*saved, *([] if ctx.gradients is not None else gradients))
    ctx.kept = ctx.gradients is None
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)


def _given(ctx: Any) -> Inputs:
    """The inputs again."""
    saved = list(ctx.saved_tensors[:TENSORS])
    for place, (prototypes, version) in ctx.fixed.items():
        if prototypes._version != version:
            raise RuntimeError(
                "the prototypes were overwritten after the loss was computed: create_graph=True, or a second backward, "
                "needs them unchanged"
            )
        saved[place] = prototypes
    return Inputs(*saved, *ctx.options)


def wants_graph(grad_loss: Tensor, *learning: Tensor | None) -> bool:
    """Under ``create_graph=True``: the gradient itself must be differentiable."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (grad_loss, *learning))


def _second_order(ctx: Any, grad_loss: Tensor, given: Inputs) -> tuple[Tensor | None, ...]:
    def function(student: Tensor, prototypes: Tensor, gain: Tensor | None) -> Tensor:
        teacher_prototypes = given.teacher_prototypes
        return by_reference(
            given._replace(student=student, prototypes=prototypes, gain=gain, teacher_prototypes=teacher_prototypes)
        )

    need_student, _, need_prototypes, need_gain, *_ = ctx.needs_input_grad
    learning = (given.student, given.prototypes, given.gain)
    return _library.second_order(function, learning, (need_student, need_prototypes, need_gain), grad_loss)


def _scaled(gradient: Tensor, grad_loss: Tensor, dtype: torch.dtype, own: bool) -> Tensor:
    if not own:
        return (grad_loss * gradient).to(dtype)
    if not grad_loss.is_cpu or grad_loss.item() != 1:  # on a CPU, looking at it waits for nothing
        gradient.mul_(grad_loss)
    return gradient.to(dtype)


def _backward(name: str, ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * len(Inputs._fields)
    if grad_loss is None:
        return nothing
    need_student, _, need_prototypes, need_gain, *_ = ctx.needs_input_grad
    if torch.is_grad_enabled():
        student, _, prototypes, gain, *_ = ctx.saved_tensors[:TENSORS]
        if wants_graph(grad_loss, student, prototypes, gain):
            dstudent, dprototypes, dgain = _second_order(ctx, grad_loss, _given(ctx))
            return (dstudent, None, dprototypes, dgain, *nothing[LEARNING:])
    own = not ctx.kept and _is_plain(grad_loss)
    if ctx.gradients is not None:
        found, ctx.gradients = ctx.gradients, None
    elif ctx.kept:
        found = Gradients(*ctx.saved_tensors[TENSORS:])
    else:
        found = Gradients(*getattr(torch.ops.sslfast, name)(*_given(ctx))[1:])
    kinds = ctx.kinds
    return (
        _scaled(found.student, grad_loss, kinds[0], own) if need_student else None,
        None,
        _scaled(found.prototypes, grad_loss, kinds[1], own) if need_prototypes else None,
        _scaled(found.gain, grad_loss, kinds[2], own) if need_gain else None,
        *nothing[LEARNING:],
    )


_SCHEMA = (
    "(Tensor student, Tensor teacher, Tensor prototypes, Tensor? gain, Tensor teacher_prototypes,"
    " Tensor? teacher_gain, Tensor? teacher_bias, Tensor? row_weights, int[] teacher_views, int[] student_views,"
    " float student_temperature, float teacher_temperature, bool normalize, bool normalize_teacher, bool need_student,"
    " bool need_prototypes) -> (Tensor loss, Tensor dstudent, Tensor dprototypes, Tensor dgain)"
)
for _name in ("prototype_cross_entropy", "prototype_cross_entropy_banded"):
    _library.define(f"{_name}{_SCHEMA}", _fake)
    _library.autograd(_name, functools.partial(_backward, _name), _setup_context)
