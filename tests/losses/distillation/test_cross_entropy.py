"""distillation_cross_entropy and assignment_cross_entropy: views in every form, weights, inputs that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast

B, K = 6, 40


def logits(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, B, K, dtype=torch.float64).to(dtype)


def plain(student: Tensor, teacher: Tensor, bias: Tensor, weights: Tensor, diagonal: bool) -> Tensor:
    p = torch.softmax(teacher / 0.2 + bias[:, None], -1)
    ce = -torch.einsum("tbk,sbk->tsb", p, F.log_softmax(student / 0.3, -1))
    kept = ~torch.eye(*ce.shape[:2], dtype=torch.bool) if diagonal else torch.ones(ce.shape[:2], dtype=torch.bool)
    return (ce[kept].mean(0) * weights).sum()


@pytest.mark.parametrize("diagonal", [False, True])
def test_views_in_every_form(diagonal: bool) -> None:
    student, teacher, bias = logits(4), logits(2), torch.randn(2, K, dtype=torch.float64)
    weights = torch.rand(B, dtype=torch.float64)
    how = {"student_temperature": 0.3, "teacher_temperature": 0.2, "teacher_bias": bias, "row_weights": weights}
    truth = plain(student, teacher, bias, weights, diagonal)
    for s in (student, list(student), tuple(student.unbind())):
        for t in (teacher, list(teacher)):
            loss = sslfast.distillation_cross_entropy(s, t, ignore_diagonal=diagonal, **how)
            torch.testing.assert_close(loss, truth)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):  # of several dtypes the widest
        mixed = sslfast.distillation_cross_entropy(
            student.to(dtype), teacher.float(), ignore_diagonal=diagonal, **how | {"teacher_bias": bias.float()}
        )
        assert mixed.dtype == torch.float32
        torch.testing.assert_close(mixed.double(), truth, rtol=2e-2, atol=1e-2)


def test_one_view_and_default_weights() -> None:
    student, teacher = logits(), logits()
    loss = sslfast.distillation_cross_entropy(student, teacher)
    p = torch.softmax(teacher / 0.04, -1)
    torch.testing.assert_close(loss, -(p * F.log_softmax(student / 0.1, -1)).sum(-1).mean())
    given = sslfast.assignment_cross_entropy(student, p)
    torch.testing.assert_close(given, loss)
    counted = sslfast.assignment_cross_entropy(student, p, rows=torch.tensor(4))
    torch.testing.assert_close(counted, sslfast.assignment_cross_entropy(student[:4], p[:4]))


def test_the_bias_of_sinkhorn_is_its_assignments() -> None:
    student, teacher = logits(), logits()
    by_bias = sslfast.distillation_cross_entropy(
        student, teacher, teacher_temperature=0.2, teacher_bias=sslfast.sinkhorn_bias(teacher, 0.2)
    )
    torch.testing.assert_close(by_bias, sslfast.assignment_cross_entropy(student, sslfast.sinkhorn(teacher, 0.2)))


def test_no_row() -> None:
    """The mean of nothing is NaN; a weighted sum of nothing 0, with a gradient."""
    student = logits()[:0].requires_grad_()
    assert sslfast.distillation_cross_entropy(student, logits()[:0]).isnan()
    loss = sslfast.distillation_cross_entropy(student, logits()[:0], row_weights=torch.zeros(0))
    (grad,) = torch.autograd.grad(loss, student)
    assert loss == 0 and grad.shape == (0, K)


def test_autocast_and_no_gradient_for_the_teacher() -> None:
    student, teacher = logits(dtype=torch.float32).requires_grad_(), logits(dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sslfast.distillation_cross_entropy(student, teacher)
    torch.testing.assert_close(loss, sslfast.distillation_cross_entropy(student, teacher))
    assert torch.autograd.grad(loss, (student, teacher), allow_unused=True)[1] is None


def test_bad_input_names_the_argument() -> None:
    x = torch.randn(3, 4)
    for wrong, error, message in (
        ({"student_logits": 1.0}, TypeError, r"student_logits must be a tensor \[B, K\] or .* got float"),
        ({"student_logits": []}, TypeError, "got an empty sequence"),
        ({"student_logits": [x.int()]}, TypeError, "student_logits must be float32, .* got torch.int32"),
        ({"student_logits": x[0]}, ValueError, r"must be matrices \[B, K\], .* got shape \(4,\)"),
        ({"student_logits": [x, x[:2]]}, ValueError, "the views of student_logits must have the same shape"),
        ({"teacher_logits": x[:, :3]}, ValueError, r"the same rows and prototypes, got \(3, 4\) and \(3, 3\)"),
        ({"student_temperature": 0.0}, ValueError, "student_temperature must be finite and not zero"),
        ({"teacher_temperature": None}, TypeError, "teacher_temperature must be a number, got NoneType"),
        ({"teacher_bias": torch.zeros(3)}, ValueError, r"teacher_bias must have shape \(4,\) or \(1, 4\), got \(3,\)"),
        ({"teacher_bias": torch.zeros(4).int()}, TypeError, "teacher_bias must be a floating-point tensor"),
        ({"row_weights": torch.zeros(4)}, ValueError, r"row_weights must have shape \(3,\), got \(4,\)"),
        ({"row_weights": 1.0}, TypeError, "row_weights must be a torch.Tensor, got float"),
        ({"rows": torch.zeros(2)}, ValueError, "rows must be a tensor of one whole number"),
        ({"ignore_diagonal": True}, ValueError, "ignore_diagonal=True leaves no pair of views: 1 of the teacher and 1"),
    ):
        with pytest.raises(error, match=message):
            sslfast.distillation_cross_entropy(**{"student_logits": x, "teacher_logits": x, **wrong})
