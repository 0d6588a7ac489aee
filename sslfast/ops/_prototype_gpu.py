"""prototype_cross_entropy on a GPU: streamed by Triton kernels, or by bands of the library's products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _library, _native, reference
from .._checks import accumulator, without_autocast
from ._prototype_operators import Inputs, wants_graph
from .similarity_lse import similarity_lse


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
    if wants_graph(grad, prototypes):

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
    """The loss by the form that costs less, or is forced."""
    from ..kernels import prototype_bands as bands

    if _whole_pairing(given) is not None and _epilogue(given.student) and bands.form(*given[:2]) == "banded":
        loss: Tensor = _library.run("prototype_cross_entropy_banded", *given)[0]
        return loss
    return _streamed(given)


def _epilogue(student: Tensor) -> bool:
    """Whether there is a kernel for stored logits, which bands need."""
    why_not = _native.why_no_cuda if student.is_cuda else _native.why_no_cpu
    return why_not(student.device, "student") is None


def _whole_pairing(given: Inputs) -> bool | None:
    """``False`` where every view of the student meets every view of the teacher, ``True`` where it meets all but that
    of its own number; else ``None``."""
    pairs = sorted(zip(given.teacher_views, given.student_views, strict=True))
    every = [(t, v) for t in range(len(given.teacher)) for v in range(len(given.student))]
    if pairs == every:
        return False
    return True if pairs == [(t, v) for t, v in every if t != v] else None


def _features(given: Inputs) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's, 0 for samples that take no part, whatever they hold."""
    if given.row_weights is None:
        return given.student, given.teacher
    taken = (given.row_weights != 0)[:, None]
    return torch.where(taken, given.student, 0), torch.where(taken, given.teacher, 0)


def _banded(*arguments: Any) -> tuple[Tensor, ...]:
    from ..kernels import prototype_bands as bands

    given = Inputs(*arguments)
    student, teacher = _features(given)
    samples, dtype = student.shape[1], student.dtype
    kind = torch.float32
    weights = given.row_weights
    if weights is None:
        weights = torch.full((samples,), 1 / samples, dtype=kind, device=student.device)
    w, u = (
        _matrix(*of).to(dtype).contiguous()
        for of in (
            (given.prototypes, given.gain, given.normalize),
            (given.teacher_prototypes, given.teacher_gain, given.normalize_teacher),
        )
    )
    loss, dh, dw = bands.prototype_bands(
        student,
        teacher.to(dtype),
        w,
        u,
        given.teacher_bias,
        weights / len(given.student_views),
        (given.student_temperature, given.teacher_temperature),
        bool(_whole_pairing(given)),
        given.need_student,
        given.need_prototypes,
    )
    empty = student.new_empty(0, dtype=kind)
    dgain = empty
    if dw is not None and given.normalize:
        dw, dgain = _through_normalization(given.prototypes.to(kind), given.gain, dw)
    return (
        loss,
        student.new_empty((0, *student.shape[1:]), dtype=kind) if dh is None else dh,
        student.new_empty((0, student.shape[2]), dtype=kind) if dw is None else dw,
        dgain,
    )


def _through_normalization(v: Tensor, gain: Tensor | None, dw: Tensor, eps: float = 1e-12) -> tuple[Tensor, Tensor]:
    """From d/dw to d/dv and d/dgain of ``w = gain·v/max(‖v‖, eps)``."""
    norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    divisor = norm.clamp(min=eps)
    unit = v / divisor
    along = (unit * dw).sum(1, keepdim=True)
    dv = (dw - torch.where(norm < eps, 0.0, along) * unit) / divisor
    return (dv if gain is None else gain[:, None] * dv), along[:, 0].contiguous()


_library.implement("prototype_cross_entropy_banded", _banded, "CUDA", "CPU")


def _streamed(given: Inputs) -> Tensor:
    """From the student's log-sum-exp and the teacher's attended prototypes, ``a_m = Σ_k p_mk w_k``:

    Σ_k p_mk s_nk = h_n·a_m/τ_s,   H_n = log Σ_k exp s_nk − h_n·a_m/τ_s
    """
    student, teacher = _features(given)
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
