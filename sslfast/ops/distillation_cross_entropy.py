"""Cross entropy of students' stored logits against teachers': each is read once each way, and a gradient written.

With ``y_s = student/τs``, ``p_t = softmax_k(teacher/τt + bias)`` (or the target itself) and a row's pairs (t, s):

    CE = Σ_ts lse(y_s) − Σ_k p_tk y_sk              (log-sum-exp times Σ_k p_tk, where that is not 1)
    dstudent_s = g/τs · (n_s softmax(y_s) − Σ_t p_t)    n_s: the teachers paired with s, or the sum of their Σ_k p_tk

Saved: two numbers for each row of each view. The teacher and the bias get no gradient. A row of the student may meet
another row of the teacher than its own, and several the same one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _backends, _library, reference
from .._checks import accumulator, without_autocast
from . import _devices

BACKENDS = ("cpu", "cuda", "reference")
why_not = functools.partial(_devices.why_not, "distillation_cross_entropy", "student_logits")


def _forward_fake(student: Sequence[Tensor], teacher: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    like, kind = student[0], accumulator(student[0])
    counts = (sum(x.shape[0] for x in views) for views in (student, teacher))
    stats = [like.new_empty((count, like.shape[1], 2), dtype=kind) for count in counts]
    return like.new_empty(like.shape[1], dtype=kind), stats[0], stats[1]


def _backward_fake(grad: Tensor, student: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in student]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, bias, *ctx.options, rows, teacher_rows = inputs
    ctx.counts = len(student), len(teacher)
    ctx.save_for_backward(*student, *teacher, bias, *output[1:], rows, teacher_rows)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    students, teachers = ctx.counts
    nothing = ([None] * teachers, *(None,) * 7)
    if grad is None:
        return [None] * students, *nothing
    saved = ctx.saved_tensors
    student, teacher = list(saved[:students]), list(saved[students : students + teachers])
    bias, student_stats, teacher_stats, *which = saved[students + teachers :]
    options: tuple[Any, ...] = (*ctx.options, *which)
    if torch.is_grad_enabled() and (grad.requires_grad or any(x.requires_grad for x in student)):

        def function(*views: Tensor) -> Tensor:
            return by_reference(views, teacher, bias, *options)

        needed = [x.requires_grad for x in student]
        return list(_library.second_order(function, student, needed, grad)), *nothing
    found = torch.ops.sslfast.distillation_cross_entropy_backward(
        grad, student, teacher, bias, student_stats, teacher_stats, *options
    )
    return found, *nothing


_OPTIONS = (
    "float student_temperature, float teacher_temperature, bool ignore_diagonal, bool assigned, Tensor? rows,"
    " Tensor? teacher_rows"
)
_library.define(
    f"distillation_cross_entropy(Tensor[] student, Tensor[] teacher, Tensor? bias, {_OPTIONS})"
    " -> (Tensor of_row, Tensor student_stats, Tensor teacher_stats)",
    _forward_fake,
)
_library.define(
    "distillation_cross_entropy_backward(Tensor grad, Tensor[] student, Tensor[] teacher, Tensor? bias,"
    f" Tensor student_stats, Tensor teacher_stats, {_OPTIONS}) -> Tensor[]",
    _backward_fake,
)
_library.autograd("distillation_cross_entropy", _backward, _setup_context)


def by_reference(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    bias: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    ignore_diagonal: bool,
    assigned: bool,
    rows: Tensor | None,
    teacher_rows: Tensor | None,
) -> Tensor:
    """The reference with the kernels' precision, also inside an autocast region."""
    wide = accumulator(student[0])
    with without_autocast(student[0]):
        return reference.distillation_cross_entropy(
            [x.to(wide) for x in student],
            [x.to(wide) for x in teacher],
            bias,
            student_temperature,
            teacher_temperature,
            ignore_diagonal,
            assigned,
            rows,
            teacher_rows,
        )


def distillation_cross_entropy(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    bias: Tensor | None,
    temperatures: tuple[float, float],
    *,
    ignore_diagonal: bool = False,
    assigned: bool = False,
    rows: Tensor | None = None,
    teacher_rows: Tensor | None = None,
) -> Tensor:
    """The cross entropy of each row, summed over its pairs of views, [B]; float32 (float64 for float64 logits).

    Args:
        student, teacher: checked tensors [views, B, K] of one dtype and device, one after another.
        bias: [teachers or 1, P, K] in the accumulator's dtype; row r of the teacher takes r mod P.
        temperatures: (τs, τt).
        ignore_diagonal: leave out the pairs of view t with view t.
        assigned: the teacher's numbers are targets, not logits.
        rows: [] int64, how many of the first rows count; the others give 0.
        teacher_rows: [B] int64, the teacher's row that each row of the student meets; the teacher's views are then
            [views, R, K]. Default: b meets b. Where there is no such row the result is NaN, or on the CPU an error.
    """
    backend = _backends.serve("distillation_cross_entropy", student[0], "cuda", why_not)
    if backend == "reference":
        return by_reference(student, teacher, bias, *temperatures, ignore_diagonal, assigned, rows, teacher_rows)
    views = list(student), list(teacher)
    of_row: Tensor = _library.run(
        "distillation_cross_entropy", *views, bias, *temperatures, ignore_diagonal, assigned, rows, teacher_rows
    )[0]
    return of_row
