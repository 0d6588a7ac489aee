"""The operators behind ``prototype_cross_entropy``: schemas, fake kernels and autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import _library, reference
from .._checks import accumulator, without_autocast
from .similarity_lse import similarity_lse


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


def _wants_graph(grad_loss: Tensor, *learning: Tensor | None) -> bool:
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


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * len(Inputs._fields)
    if grad_loss is None:
        return nothing
    need_student, _, need_prototypes, need_gain, *_ = ctx.needs_input_grad
    if torch.is_grad_enabled():
        student, _, prototypes, gain, *_ = ctx.saved_tensors[:TENSORS]
        if _wants_graph(grad_loss, student, prototypes, gain):
            dstudent, dprototypes, dgain = _second_order(ctx, grad_loss, _given(ctx))
            return (dstudent, None, dprototypes, dgain, *nothing[LEARNING:])
    own = not ctx.kept and _is_plain(grad_loss)
    if ctx.gradients is not None:
        found, ctx.gradients = ctx.gradients, None
    elif ctx.kept:
        found = Gradients(*ctx.saved_tensors[TENSORS:])
    else:
        found = Gradients(*torch.ops.sslfast.prototype_cross_entropy(*_given(ctx))[1:])
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
_library.define(f"prototype_cross_entropy{_SCHEMA}", _fake)
_library.autograd("prototype_cross_entropy", _backward, _setup_context)


# ------------------------------------------------------------------- triton: the teacher's side, beside similarity_lse


def _attended(
    teacher: Tensor, teacher_prototypes: Tensor, prototypes: Tensor, bias: Tensor | None, scale: Tensor
) -> Tensor:
    """What the kernel computes, in plain PyTorch."""
    kind = torch.float32
    with without_autocast(teacher):
        logits = scale * (teacher.to(kind) @ teacher_prototypes.to(kind).T)
        p = torch.softmax(logits if bias is None else logits + bias, -1)
        return p @ prototypes.to(kind)


def _attend_fake(teacher: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return teacher.new_empty(teacher.shape, dtype=torch.float32), teacher.new_empty(
        teacher.shape[0], dtype=torch.float32
    )


def _attend_backward_fake(grad: Tensor, teacher: Tensor, teacher_prototypes: Tensor, *_: Any) -> Tensor:
    return teacher.new_empty(teacher_prototypes.shape, dtype=torch.float32)


def _attend_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _attend_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None or not ctx.needs_input_grad[2]:
        return (None,) * 5
    teacher, teacher_prototypes, prototypes, bias, scale, row_lse = ctx.saved_tensors
    if _wants_graph(grad, prototypes):

        def function(prototypes: Tensor) -> Tensor:
            return _attended(teacher, teacher_prototypes, prototypes, bias, scale)

        (dprototypes,) = _library.second_order(function, (prototypes,), (True,), grad)
    else:
        dprototypes = torch.ops.sslfast.prototype_attend_triton_backward(
            grad, teacher, teacher_prototypes, bias, scale, row_lse
        ).to(prototypes.dtype)
    return None, None, dprototypes, None, None


def _triton_attend(teacher: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import prototype_cross_entropy as kernel

    teacher_prototypes, prototypes, bias, scale = rest
    return kernel.prototype_attend(
        teacher.contiguous(), teacher_prototypes.contiguous(), prototypes.contiguous(), bias, scale
    )


def _triton_attend_backward(grad: Tensor, teacher: Tensor, teacher_prototypes: Tensor, *rest: Any) -> Tensor:
    from ..kernels import prototype_cross_entropy as kernel

    return kernel.prototype_attend_backward(grad, teacher.contiguous(), teacher_prototypes.contiguous(), *rest)


_library.define(
    "prototype_attend_triton(Tensor teacher, Tensor teacher_prototypes, Tensor prototypes, Tensor? bias, Tensor scale)"
    " -> (Tensor attended, Tensor row_lse)",
    _attend_fake,
)
_library.define(
    "prototype_attend_triton_backward(Tensor grad, Tensor teacher, Tensor teacher_prototypes, Tensor? bias,"
    " Tensor scale, Tensor row_lse) -> Tensor",
    _attend_backward_fake,
)
_library.implement("prototype_attend_triton", _triton_attend, "CUDA", "CPU")
_library.implement("prototype_attend_triton_backward", _triton_attend_backward, "CUDA", "CPU")
_library.autograd("prototype_attend_triton", _attend_backward, _attend_setup_context)


def by_triton(given: Inputs) -> Tensor:
    """Streamed, from the student's log-sum-exp and the teacher's attended prototypes, ``a_m = Σ_k p_mk w_k``:

    Σ_k p_mk s_nk = h_n·a_m/τ_s,   H_n = log Σ_k exp s_nk − h_n·a_m/τ_s
    """
    student, teacher = given.student, given.teacher
    if given.row_weights is not None:
        taken = (given.row_weights != 0)[:, None]
        student, teacher = torch.where(taken, student, 0), torch.where(taken, teacher, 0)
    (views, samples, d), dtype = student.shape, student.dtype
    w = _matrix(given.prototypes, given.gain, given.normalize).to(dtype)
    u = _matrix(given.teacher_prototypes, given.teacher_gain, given.normalize_teacher).to(dtype)
    with without_autocast(student):
        row_lse = similarity_lse(student.reshape(-1, d), w, 1 / given.student_temperature).view(views, samples)
        scale = torch.full((), 1 / given.teacher_temperature, dtype=torch.float32, device=student.device)
        attended, _ = torch.ops.sslfast.prototype_attend_triton(
            teacher.to(dtype).reshape(-1, d), u, w, given.teacher_bias, scale
        )
        attended = attended.view(-1, samples, d)
        pairs = list(zip(given.teacher_views, given.student_views, strict=True))
        total = row_lse.new_zeros(samples)
        for v in range(views):
            targets = [attended[t] for t, met in pairs if met == v]
            if targets:
                expected = (torch.stack(targets).sum(0) * student[v].float()).sum(-1) / given.student_temperature
                total = total + (len(targets) * row_lse[v] - expected)
        total = total / len(pairs)
        return total.mean() if given.row_weights is None else torch.dot(total, given.row_weights)


def _matrix(prototypes: Tensor, gain: Tensor | None, normalize: bool) -> Tensor:
    if not normalize:
        return prototypes
    with without_autocast(prototypes):
        return reference.normalized_prototypes(prototypes.to(accumulator(prototypes)), gain)
