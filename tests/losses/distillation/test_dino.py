"""DINO's, iBOT's and iBOT++'s losses: values by formula, the centre and its state, Sinkhorn's targets, masks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from helpers import DTYPES, check_loss

K = 24


def views(count: int, rows: int = 10, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, rows, K, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("centering", ["center", "sinkhorn"])
def test_dino(centering: str, dtype: torch.dtype) -> None:
    teacher, student = views(2, dtype=dtype), views(4, dtype=dtype)

    def loss(students: Tensor) -> Tensor:
        return sslfast.DINOLoss(K, teacher_temp=0.2, centering=centering)(teacher, list(students))

    def formula(students: Tensor) -> Tensor:
        t = teacher.to(students)
        p = torch.softmax(t / 0.2, -1)
        if centering == "sinkhorn":
            p = sslfast.sinkhorn(t.flatten(0, 1), 0.2).view_as(t).to(students)
        terms = [
            -(p[i] * F.log_softmax(s / 0.1, -1)).sum(-1).mean()
            for i in range(2)
            for j, s in enumerate(students)
            if i != j
        ]
        return sum(terms) / len(terms)

    check_loss(loss, formula, (student,), floor=10.0, terms=10)


def test_the_centre_moves_after_the_loss() -> None:
    teacher, student = views(2), views(3)
    criterion = sslfast.DINOLoss(K, teacher_temp=0.2, center_momentum=0.7).double()
    assert torch.equal(criterion(teacher, student), sslfast.DINOLoss(K, teacher_temp=0.2).double()(teacher, student))
    torch.testing.assert_close(criterion.center, 0.3 * teacher.mean((0, 1), keepdim=True))
    centred = sslfast.DINOLoss(K, teacher_temp=0.2).double()(teacher - criterion.center, student)
    torch.testing.assert_close(criterion(teacher, student), centred)


def test_micro_batches_move_the_centre_as_one_batch() -> None:
    teacher, student = views(2, 8), views(2, 8)
    whole, parts = sslfast.DINOLoss(K).double(), sslfast.DINOLoss(K).double()
    whole(teacher, student)
    for i in (0, 2, 4, 6):
        parts(teacher[:, i : i + 2], student[:, i : i + 2], update_center=False)
        assert (parts.center == 0).all()
    parts.update_center()
    torch.testing.assert_close(parts.center, whole.center)
    parts.update_center()  # nothing has come since
    torch.testing.assert_close(parts.center, whole.center)
    parts.update_center(teacher)  # as lightly's method
    whole(teacher, student)
    torch.testing.assert_close(parts.center, whole.center)


@pytest.mark.parametrize("make", [sslfast.DINOLoss, sslfast.IBOTPatchLoss])
def test_a_state_does_not_change_the_next_loss(make: type) -> None:
    teacher, student = views(2), views(2)
    mask = torch.arange(40).view(2, 20) % 4 == 0
    arguments = (teacher, student) if make is sslfast.DINOLoss else (teacher[0], student[0], mask)
    criterion = make(K).double()
    criterion(*arguments)
    other = make(K).double()
    other.load_state_dict(copy.deepcopy(criterion.state_dict()))
    assert list(criterion.state_dict()) == ["center"]
    assert torch.equal(other(*arguments), criterion(*arguments))
    for key, shape in (("center", (1, K)), ("center", (1, 1, K)), ("center.center", (1, K))):
        other.load_state_dict({key: torch.ones(shape)})
        assert (other.center == 1).all()
    with pytest.raises(RuntimeError, match="size mismatch for center"):
        other.load_state_dict({"center": torch.ones(1, K + 1)})


def test_half_logits_whose_sum_overflows() -> None:
    """2,048 rows of 40: a float16 sum is infinite, the centre is not."""
    teacher = torch.full((2, 1024, K), 40.0, dtype=torch.float16)
    criterion = sslfast.DINOLoss(K)
    assert criterion(teacher, teacher).isfinite()
    torch.testing.assert_close(criterion.center, torch.full((1, 1, K), 4.0))


def test_temperatures() -> None:
    criterion = sslfast.DINOLoss(K, 0.04, 0.07, 4)
    wanted = torch.linspace(0.04, 0.07, 4).tolist()
    assert [criterion.temperature_at(e) for e in range(6)] == pytest.approx([*wanted, 0.07, 0.07])
    assert sslfast.DINOLoss(K, 0.04, 0.07, 0).temperature_at(0) == 0.07
    teacher, student = views(2), views(2)
    by_epoch = sslfast.DINOLoss(K, 0.3, 0.6, 4).double()(teacher, student, epoch=1)
    torch.testing.assert_close(by_epoch, sslfast.DINOLoss(K).double()(teacher, student, teacher_temp=0.4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ibot(dtype: torch.dtype) -> None:
    mask = torch.zeros(4, 3, 3, dtype=torch.bool)
    mask[0, :2], mask[1, 0, 0], mask[3] = True, True, True  # 6, 1, none and 9 tokens
    rows = int(mask.sum())
    teacher, student = views(2, rows, dtype)

    def formula(student: Tensor) -> Tensor:
        p = torch.softmax(teacher.to(student) / 0.2, -1)
        ce = -(p * F.log_softmax(student / 0.1, -1)).sum(-1)
        return (ce * torch.tensor([1 / 6] * 6 + [1.0] + [1 / 9] * 9, dtype=torch.float64).to(ce)).sum() / 4

    def loss(student: Tensor) -> Tensor:
        return sslfast.IBOTPatchLoss(K, teacher_temp=0.2)(teacher, student, mask)

    check_loss(loss, formula, (student,), floor=10.0, terms=4)


@pytest.mark.parametrize("centering", ["center", "sinkhorn"])
def test_ibot_in_a_buffer_of_a_fixed_size(centering: str) -> None:
    mask = torch.rand(5, 16) < 0.3
    rows = int(mask.sum())
    teacher, student = views(2, rows)
    padded = torch.cat([torch.stack([teacher, student]), torch.full((2, 7, K), float("nan"), dtype=torch.float64)], 1)
    leaf = padded[1].clone().requires_grad_()
    exact, fixed = (sslfast.IBOTPatchLoss(K, centering=centering, diagnostics=True).double() for _ in range(2))
    loss, found = fixed(padded[0], leaf, mask)
    expected, diagnostics = exact(teacher, student, mask)
    torch.testing.assert_close((loss, found, fixed.center), (expected, diagnostics, exact.center))
    (grad,) = torch.autograd.grad(loss, leaf)
    assert (grad[rows:] == 0).all() and grad[:rows].isfinite().all()


def test_ibot_without_a_masked_token() -> None:
    criterion = sslfast.IBOTPatchLoss(K).double()
    criterion.center += 1
    student = views(1, 3)[0].requires_grad_()
    for rows in (0, 3):
        loss = criterion(student[:rows].detach(), student[:rows], torch.zeros(2, 4, 4, dtype=torch.bool))
        assert loss == 0 and (criterion.center == 1).all()
        assert (torch.autograd.grad(loss, student)[0] == 0).all()


def all_tokens(student: Tensor, teacher: Tensor, mask: Tensor, visible: float) -> Tensor:
    """iBOT++ of logits [B, N, K], image by image."""
    p = torch.softmax(teacher.to(student) / 0.2, -1)
    ce = -(p * F.log_softmax(student / 0.1, -1)).sum(-1)
    terms = [x[m].sum() / max(int(m.sum()), 1) for x, m in zip(ce, mask.flatten(1), strict=True)]
    terms += [visible * x[~m].sum() / max(int((~m).sum()), 1) for x, m in zip(ce, mask.flatten(1), strict=True)]
    return sum(terms) / len(student)


def masks() -> Tensor:
    """Of four images: 4, 1, no and all 6 tokens."""
    mask = torch.zeros(4, 2, 3, dtype=torch.bool)
    mask[0, :, 1:], mask[1, 0, 0], mask[3] = True, True, True
    return mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("visible", [1.0, 0.3, 0.0])
def test_ibot_plus_plus(visible: float, dtype: torch.dtype) -> None:
    mask, (teacher, student) = masks(), views(2, 24, dtype).view(2, 4, 6, K)

    def loss(student: Tensor) -> Tensor:
        criterion = sslfast.IBOTPlusPlusPatchLoss(K, teacher_temp=0.2)
        return criterion(teacher, student, mask, visible_loss_weight=visible)

    check_loss(loss, lambda s: all_tokens(s, teacher, mask, visible), (student,), floor=10.0, terms=4)
    criterion = sslfast.IBOTPlusPlusPatchLoss(K, teacher_temp=0.2)
    rows = criterion(teacher.flatten(0, 1), student.flatten(0, 1), mask.flatten(1), visible_loss_weight=visible)
    assert torch.equal(rows, loss(student))


@pytest.mark.parametrize("centering", ["center", "sinkhorn"])
def test_ibot_plus_plus_without_visible_tokens_is_ibot(centering: str) -> None:
    """Of the same centre; its own is that of all tokens."""
    mask, (teacher, student) = masks(), views(2, 24).view(2, 4, 6, K)
    plus, plain = (
        make(K, centering=centering).double() for make in (sslfast.IBOTPlusPlusPatchLoss, sslfast.IBOTPatchLoss)
    )
    for _ in range(2):
        found = plus(teacher, student, mask, visible_loss_weight=0.0, update_center=False)
        chosen = mask.flatten(1)
        if centering == "center":
            torch.testing.assert_close(found, plain(teacher[chosen], student[chosen], mask, update_center=False))
        plus.update_center()
        if centering == "center":
            torch.testing.assert_close(plus.center, plus.center_momentum * plain.center + 0.1 * teacher.mean((0, 1)))
        plain.load_state_dict(plus.state_dict())


def test_ibot_plus_plus_without_a_mask_is_the_mean_over_all_tokens() -> None:
    teacher, student = views(2, 24).view(2, 4, 6, K)
    loss, found = sslfast.IBOTPlusPlusPatchLoss(K, diagnostics=True).double()(teacher, student)
    flat = [x.flatten(0, 1) for x in (student, teacher)]
    torch.testing.assert_close(loss, sslfast.distillation_cross_entropy(*flat))
    entropy = torch.special.entr(torch.softmax(flat[1] / 0.04, 1)).sum(1).mean()
    torch.testing.assert_close(found.teacher_entropy, entropy)


def test_bad_input_of_ibot_plus_plus() -> None:
    teacher, student = views(2, 24).view(2, 4, 6, K)
    criterion, mask = sslfast.IBOTPlusPlusPatchLoss(K), masks()
    with pytest.raises(ValueError, match=r"mask must be given with logits \[B·N, K\]"):
        criterion(teacher.flatten(0, 1), student.flatten(0, 1))
    with pytest.raises(ValueError, match="tensors of one shape"):
        criterion(teacher[:, :6], student.flatten(0, 1)[:6])
    with pytest.raises(
        ValueError, match=r"mask must have one entry for each token of logits \(4, 6, 24\), got \(3, 2, 3\)"
    ):
        criterion(teacher, student, mask[:3])
    with pytest.raises(ValueError, match="mask must be a bool tensor"):
        criterion(teacher, student, mask.float())
    with pytest.raises(ValueError, match="visible_loss_weight must be finite, got nan"):
        criterion(teacher, student, mask, visible_loss_weight=float("nan"))


def test_bad_input() -> None:
    teacher, student = views(2), views(2)
    with pytest.raises(ValueError, match="leaves no pair of views: 1 of the teacher and 1"):
        sslfast.DINOLoss(K).double()(teacher[:1], student[:1])
    with pytest.raises(ValueError, match="teacher_temp must be finite and not zero"):
        sslfast.DINOLoss(K)(teacher, student, teacher_temp=0.0)
    with pytest.raises(ValueError, match=f"logits must have 5 prototypes, got {K}"):
        sslfast.DINOLoss(5)(teacher, student)
    with pytest.raises(ValueError, match="centering must be one of 'center', 'sinkhorn', got 'mean'"):
        sslfast.DINOLoss(K, centering="mean")
    with pytest.raises(ValueError, match="center_momentum must be between 0 and 1, got 2"):
        sslfast.IBOTPatchLoss(K, center_momentum=2)
    ibot = sslfast.IBOTPatchLoss(K)
    with pytest.raises(ValueError, match="mask has 12 masked tokens, more than the 10 rows"):
        ibot(teacher[0], student[0], torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask must be a bool tensor .* got torch.int64"):
        ibot(teacher[0], student[0], torch.ones(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"teacher_out and student_out must be \[N, K\]"):
        ibot(teacher, student, torch.ones(3, 4, dtype=torch.bool))


@pytest.mark.parametrize("make", [sslfast.DINOLoss, sslfast.IBOTPatchLoss, sslfast.IBOTPlusPlusPatchLoss])
def test_compiled_in_one_graph(make: type) -> None:
    teacher, student = views(2, dtype=torch.float32), views(2, dtype=torch.float32)
    mask = torch.arange(40).view(2, 20) % 4 == 0
    arguments = (teacher, student) if make is sslfast.DINOLoss else (teacher[0], student[0], mask)
    if make is sslfast.IBOTPlusPlusPatchLoss:
        arguments = (teacher, student, mask[:, :10])
    plain, traced = make(K), make(K)
    compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(*arguments), plain(*arguments))
    torch.testing.assert_close(traced.center, plain.center)
