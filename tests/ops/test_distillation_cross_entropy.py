"""The cross entropy of stored logits against its formula in float64, on every instruction-set level."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import sslfast
from helpers import roundings, within_budget
from sslfast import reference
from sslfast.ops.distillation_cross_entropy import distillation_cross_entropy as cross_entropy_of_rows

pytestmark = pytest.mark.sanitize

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TEMPERATURES = (0.3, 0.2)
# Views of the student and of the teacher, rows, prototypes: multi-crop, two views, one of all, ragged, long.
VIEWS = [(8, 2, 6, 64), (2, 2, 17, 257), (1, 1, 1, 1), (3, 1, 5, 1301), (2, 4, 3, 100), (1, 1, 2, 5003)]


def name_of(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def drawn(views: tuple[int, ...], dtype: torch.dtype, assigned: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Student [S, B, K], teacher [T, B, K] and a bias for every teacher and two positions."""
    students, teachers, batch, prototypes = views
    student, teacher = (torch.randn(n, batch, prototypes, dtype=torch.float64) for n in (students, teachers))
    if assigned:
        return student.to(dtype), (1.3 * teacher.softmax(-1)).to(dtype), None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return student.to(dtype), teacher.to(dtype), torch.randn(teachers, 2, prototypes).to(wide)


def plain(student: Tensor, teacher: Tensor, bias: Tensor | None, grad: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    of_row = reference.distillation_cross_entropy([leaf], [teacher], bias, *TEMPERATURES, **how)
    return of_row.detach(), torch.autograd.grad(of_row, leaf, grad.to(of_row.dtype))[0]


def kernel(student: Sequence[Tensor], teacher: Sequence[Tensor], bias: Tensor | None, grad: Tensor, **how: Any):
    leaves = [x.detach().clone().requires_grad_() for x in student]
    of_row = cross_entropy_of_rows(leaves, teacher, bias, TEMPERATURES, **how)
    return of_row.detach(), torch.cat(torch.autograd.grad(of_row, leaves, grad.to(of_row.dtype)))


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("assigned", [False, True], ids=["logits", "assigned"])
@pytest.mark.parametrize("views", VIEWS, ids=str)
def test_value_and_gradient(views: tuple[int, ...], assigned: bool, dtype: torch.dtype, device: str) -> None:
    student, teacher, bias = (None if x is None else x.to(device) for x in drawn(views, dtype, assigned))
    assert student is not None and teacher is not None
    grad = torch.randn(views[2], device=device, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for diagonal in (False, True)[: views[0] * views[1]]:  # one view of each: no pair without it
        how = {"ignore_diagonal": diagonal, "assigned": assigned}
        with sslfast.use_backend(device):  # half of the views in one tensor, the others each in its own
            parts = [student[: len(student) // 2], *student[len(student) // 2 :].unsqueeze(1)]
            found = kernel([x for x in parts if len(x)], list(teacher.unsqueeze(1)), bias, grad, **how)
        formula = partial(plain, **how)
        single = roundings(formula, student.to(wide), teacher.to(wide), bias, grad)
        truth = formula(student.double(), teacher.double(), None if bias is None else bias.double(), grad)
        assert found[0].dtype == wide and found[1].dtype == dtype
        pairs = views[0] * views[1]
        within_budget("value", found[0], single[0], truth[0], wide, floor=float(pairs))
        size = grad.abs().max().item() / TEMPERATURES[0] * views[1]
        within_budget("gradient", found[1], single[1].to(dtype), truth[1], dtype, floor=size)


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
def test_a_common_shift_costs_no_digit(device: str) -> None:
    """Logits of 4.0 at τ = 0.04 and far beyond."""
    student, teacher, _ = drawn((3, 2, 4, 700), torch.float32)
    grad = torch.ones(4, device=device)
    with sslfast.use_backend(device):
        found = kernel([(student + 64).to(device)], [(teacher + 4).to(device)], None, grad)
    truth = plain((student + 64).double().to(device), (teacher + 4).double().to(device), None, grad)
    torch.testing.assert_close(found[0].double(), truth[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(found[1].double(), truth[1], rtol=2e-5, atol=2e-6)


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_nonfinite_logits_are_as_in_pytorch(dtype: torch.dtype, device: str) -> None:
    student, teacher, bias = (x.to(device) for x in drawn((3, 2, 7, 600), dtype) if x is not None)
    teacher[0, 0, :550] = float("-inf")  # the first chunk has none
    teacher[1, 1, 599], student[1, 2, 0], student[0, 3, 580] = float("nan"), float("nan"), float("inf")
    student[2, 4, 0:520] = float("-inf")
    teacher[:, 4, 0:520] = float("-inf")
    student[0, 5], teacher[1, 6] = float("-inf"), float("-inf")
    grad = torch.ones(7, device=device)
    with sslfast.use_backend(device):
        found = kernel([student], [teacher], bias, grad)
    expected = plain(student.float(), teacher.float(), bias, grad)
    assert torch.equal(found[0].isnan(), expected[0].isnan())
    finite = ~expected[0].isnan()
    assert finite[0]
    torch.testing.assert_close(found[0][finite], expected[0][finite], rtol=1e-5, atol=1e-4)
    kept = found[1][:, finite].float()
    torch.testing.assert_close(kept, expected[1][:, finite], rtol=1e-2, atol=2e-2 if dtype != torch.float32 else 1e-4)


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_rows_that_count(count: int, device: str) -> None:
    student, teacher, bias = (x.to(device) for x in drawn((2, 2, 6, 90), torch.float32) if x is not None)
    student[:, count:], teacher[:, count:] = float("nan"), float("nan")
    grad, rows = torch.ones(6, device=device), torch.tensor(count, device=device)
    for backend in (device, "reference"):
        with sslfast.use_backend(backend):
            leaf = student.clone().requires_grad_()
            of_row = cross_entropy_of_rows([leaf], [teacher], bias, TEMPERATURES, rows=rows)
        counted = min(count, 6)
        assert (of_row[counted:] == 0).all()
        expected = plain(student[:, :counted], teacher[:, :counted], bias, grad[:counted])
        torch.testing.assert_close(of_row[:counted].detach(), expected[0], rtol=1e-5, atol=1e-5)
        if backend == device:
            (dstudent,) = torch.autograd.grad(of_row, leaf, grad)
            assert (dstudent[:, counted:] == 0).all()
            torch.testing.assert_close(dstudent[:, :counted], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("assigned", [False, True], ids=["logits", "assigned"])
def test_rows_of_another_teacher(assigned: bool, dtype: torch.dtype, device: str) -> None:
    """Students that meet chosen rows of a teacher which has more of them, some twice, with the bias of those rows."""
    student, _, _ = drawn((3, 2, 7, 301), dtype)
    _, teacher, bias = (None if x is None else x.to(device) for x in drawn((1, 2, 12, 301), dtype, assigned))
    assert teacher is not None
    meets = torch.tensor([11, 0, 3, 3, 8, 5, 2], device=device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    student, grad = student.to(device), torch.randn(7, device=device, dtype=torch.float64)
    with sslfast.use_backend(device):
        found = kernel([student], [teacher], bias, grad, assigned=assigned, teacher_rows=meets)
        chosen = None if bias is None else bias[:, meets % 2]  # the same rows, gathered, with their bias
        expected = kernel([student], [teacher[:, meets]], chosen, grad, assigned=assigned)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    formula = partial(plain, assigned=assigned, teacher_rows=meets)
    single = roundings(formula, student.to(wide), teacher.to(wide), bias, grad)
    truth = formula(student.double(), teacher.double(), None if bias is None else bias.double(), grad)
    within_budget("value", found[0], single[0], truth[0], wide, floor=6.0)
    size = 2 * grad.abs().max().item() / TEMPERATURES[0]
    within_budget("gradient", found[1], single[1].to(dtype), truth[1], dtype, floor=size)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_the_teacher_has_not(device: str) -> None:
    student, teacher, bias = (x.to(device) for x in drawn((2, 2, 4, 90), torch.float32) if x is not None)
    meets, count = torch.tensor([1, 4, -1, 9], device=device), torch.tensor(1, device=device)
    counted = kernel([student], [teacher], bias, torch.ones(4, device=device), teacher_rows=meets, rows=count)
    assert counted[0].isfinite().all() and counted[1].isfinite().all()  # what does not count is not looked at
    for assigned in (False, True):
        leaf, given = student.clone().requires_grad_(), None if assigned else bias
        call = partial(cross_entropy_of_rows, [leaf], [teacher], given, TEMPERATURES, assigned=assigned)
        if device == "cpu":
            with pytest.raises(RuntimeError, match="teacher_rows must be from 0 to 3, got 4"):
                call(teacher_rows=meets)
            continue
        of_row = call(teacher_rows=meets)
        (dstudent,) = torch.autograd.grad(of_row.sum(), leaf)
        for x in (of_row, dstudent.sum((0, 2))):
            assert x.isnan().tolist() == [False, True, True, True]


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck_and_double_backward(device: str) -> None:
    student, teacher, bias = (x.to(device) for x in drawn((3, 2, 3, 5), torch.float64) if x is not None)

    def function(a: Tensor, b: Tensor) -> Tensor:
        return cross_entropy_of_rows([a, b], [teacher], bias, TEMPERATURES, ignore_diagonal=True)

    leaves = (student[:2].clone().requires_grad_(), student[2:].clone().requires_grad_())
    with sslfast.use_backend(device):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("device", DEVICES)
def test_subsets_of_requires_grad_and_strides(device: str) -> None:
    student, teacher, bias = (x.to(device) for x in drawn((2, 2, 6, 40), torch.float32) if x is not None)
    whole = kernel([student], [teacher], bias, torch.ones(6, device=device))
    first = student[:1].clone().requires_grad_()
    of_row = cross_entropy_of_rows([first, student[1:]], [teacher], bias, TEMPERATURES)
    (grad,) = torch.autograd.grad(of_row, first, torch.ones(6, device=device).expand(6))
    assert torch.equal(grad, whole[1][:1])
    strided = student.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(kernel([strided], [teacher], bias, torch.ones(6, device=device))[1], whole[1])
    again = kernel([student], [teacher], bias, torch.ones(6, device=device))
    assert torch.equal(again[0], whole[0]) and torch.equal(again[1], whole[1])


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_and_compile(device: str) -> None:
    student, teacher, bias = (x.to(device) for x in drawn((2, 2, 6, 40), torch.float32) if x is not None)
    rows, operator = torch.tensor(4, device=device), torch.ops.sslfast.distillation_cross_entropy
    leaf = student.clone().requires_grad_()
    torch.library.opcheck(operator.default, ([leaf], [teacher], bias, 0.3, 0.2, True, False, None, None))
    torch.library.opcheck(operator.default, ([student], [teacher], None, 0.3, 0.2, False, True, rows, None))
    meets = torch.tensor([3, 0, 3, 3, 1, 2], device=device)
    torch.library.opcheck(operator.default, ([leaf], [teacher[:, :4]], bias, 0.3, 0.2, False, False, None, meets))
    found = operator([student], [teacher], bias, 0.3, 0.2, True, False, rows, None)
    arguments = (found[0], [student], [teacher], bias, *found[1:], 0.3, 0.2, True, False, rows, None)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.sslfast.distillation_cross_entropy_backward.default, arguments, test_utils=tests)

    def loss(x: Tensor) -> Tensor:
        return sslfast.distillation_cross_entropy(x, teacher, ignore_diagonal=True)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    results = []
    for function in (loss, compiled):
        leaf = student.clone().requires_grad_()
        value = function(leaf)
        results.append((value, *torch.autograd.grad(value, leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_operators_check_what_they_are_given() -> None:
    student, teacher, bias = drawn((2, 2, 6, 40), torch.float32)
    call = torch.ops.sslfast.distillation_cross_entropy
    how = (0.3, 0.2, True, False, None, None)
    for arguments, message in (
        (([], [teacher], bias), "student and teacher must have at least one view"),
        (([student[0]], [teacher], bias), "student must have three dimensions, got 2"),
        (([student], [teacher[:, :5]], bias), "teacher has an unexpected shape"),
        (([student], [teacher.double()], bias), "teacher must be Float, got Double"),
        (([student], [teacher], bias[:, :, 1:]), "bias has an unexpected shape"),
        (([student], [teacher[:1]], bias), r"bias must be \[teachers or 1, positions, prototypes\]"),
        (([student], [teacher[0]], bias), "teacher must have three dimensions, got 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*arguments, *how)
    with pytest.raises(RuntimeError, match="temperatures must be finite and not zero, got 0"):
        call([student], [teacher], bias, 0.0, 0.2, True, False, None, None)
    for meets, message in (
        (torch.arange(5), "has an unexpected shape"),
        (torch.arange(6.0), "must be Long, got Float"),
    ):
        with pytest.raises(RuntimeError, match=f"teacher_rows {message}"):
            call([student], [teacher], bias, *how[:-1], meets)
    found = call([student], [teacher], bias, *how)
    backward = torch.ops.sslfast.distillation_cross_entropy_backward
    with pytest.raises(RuntimeError, match="grad has an unexpected shape"):
        backward(found[0][:3], [student], [teacher], bias, *found[1:], *how)
    with pytest.raises(RuntimeError, match="teacher_stats has an unexpected shape"):
        backward(found[0], [student], [teacher], bias, found[1], found[2][:1], *how)
