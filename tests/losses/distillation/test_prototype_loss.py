"""The loss of a head's features against DINOLoss and IBOTPatchLoss on its logits, over several steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sslfast import DINOHead, DINOLoss, IBOTPatchLoss, NormalizedPrototypes, PrototypeLoss

K, D = 40, 12
CENTERINGS = ("center", "sinkhorn")


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def heads() -> tuple[Tensor, NormalizedPrototypes, Tensor]:
    """The student's prototypes, the teacher's, and these as rows."""
    direction, gain = torch.randn(K, D, dtype=torch.float64), torch.rand(K, 1, dtype=torch.float64) + 0.5
    return unit(K, D).requires_grad_(), NormalizedPrototypes(direction, gain), gain * F.normalize(direction)


def same(mine: Callable[[Tensor], Tensor], right: Callable[[Tensor], Tensor], student: Tensor, w: Tensor) -> None:
    student.requires_grad_()
    found, wanted = mine(student), right(student)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(torch.autograd.grad(found, (student, w)), torch.autograd.grad(wanted, (student, w)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("centering", CENTERINGS)
def test_dino(centering: str) -> None:
    w, prototypes, u = heads()
    mine, right = (make(K, centering=centering).double() for make in (PrototypeLoss, DINOLoss))
    for step in range(3):
        student, teacher, temperature = unit(4, 9, D), unit(2, 9, D), 0.04 + 0.01 * step
        same(
            lambda h, g=teacher, t=temperature: mine(h, g, w, prototypes, None, t),
            lambda h, g=teacher, t=temperature: right(g @ u.T, h @ w.T, t),
            student,
            w,
        )
    torch.testing.assert_close(mine.center, right.center[0])
    assert mine.center.any() == (centering == "center")


@pytest.mark.parametrize("centering", CENTERINGS)
def test_ibot_in_a_buffer(centering: str) -> None:
    w, prototypes, u = heads()
    mine, right = (make(K, centering=centering).double() for make in (PrototypeLoss, IBOTPatchLoss))
    mask = torch.rand(5, 11) < 0.4
    mask[2] = False
    for _ in range(3):
        student, teacher = unit(60, D), unit(60, D)
        same(
            lambda h, g=teacher: mine(h, g, w, prototypes, mask),
            lambda h, g=teacher: right(g @ u.T, h @ w.T, mask),
            student,
            w,
        )
        teacher[int(mask.sum()) :] = float("nan")
        other = copy.deepcopy(mine)
        assert other(student.detach(), teacher, w, prototypes, mask).isfinite() and other.center.isfinite().all()
    nothing = mine(unit(60, D), unit(60, D), w, prototypes, torch.zeros_like(mask))
    assert nothing == 0 and mine.center.isfinite().all()


def test_accumulation_and_state() -> None:
    """Halves that wait for one update move the centre as the whole does; a round trip changes no loss."""
    w, prototypes, _ = heads()
    halves, whole = PrototypeLoss(K).double(), PrototypeLoss(K).double()
    student, teacher = unit(2, 8, D), unit(2, 8, D)
    for part in (slice(0, 3), slice(3, 8)):
        halves(student[:, part], teacher[:, part], w, prototypes, update_center=False)
    halves.update_center()
    whole(student, teacher, w, prototypes)
    torch.testing.assert_close(halves.center, whole.center)
    other = PrototypeLoss(K).double()
    other.load_state_dict({"center": whole.state_dict()["center"].view(1, 1, K)})
    assert torch.equal(other(student, teacher, w, prototypes), whole(student, teacher, w, prototypes))
    assert "output_dim=40" in repr(whole)


def test_compiled_head_under_autocast() -> None:
    sizes = {"hidden_dim": 16, "bottleneck_dim": D}
    student, teacher = DINOHead(8, K, **sizes), DINOHead(8, K, **sizes).requires_grad_(False)
    mask, x = torch.rand(3, 7) < 0.6, torch.randn(3, 7, 8)
    criterion = PrototypeLoss(K, centering="sinkhorn")

    def step(x: Tensor, mask: Tensor) -> Tensor:
        return criterion(student(x), teacher(x), student.prototypes, teacher.prototypes, mask)

    plain = step(x[mask], mask)
    torch.testing.assert_close(torch.compile(step)(x[mask], mask), plain)
    with torch.autocast("cpu", torch.bfloat16):
        loss = step(x[mask], mask)
    torch.testing.assert_close(loss, plain, rtol=0.05, atol=0)
    loss.backward()
    assert all(p.grad is not None for name, p in student.named_parameters() if "weight_g" not in name)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"teacher": unit(9, D)}, "teacher must be \\[views, samples, features\\] without a mask"),
        ({"mask": torch.ones(3, 3, dtype=torch.bool)}, "teacher must be \\[rows, features\\] with a mask"),
        ({"student_prototypes": unit(K + 1, D)}, "prototypes must be 40, as output_dim says, got 41"),
        ({"teacher_temp": 0.0}, "temperature"),
    ],
)
def test_bad_arguments(change: dict[str, Any], match: str) -> None:
    given: dict[str, Any] = {"student": unit(3, 9, D), "teacher": unit(2, 9, D), "student_prototypes": unit(K, D)}
    with pytest.raises(ValueError, match=match):
        PrototypeLoss(K)(**(given | change))
    with pytest.raises(ValueError, match="mask has 20 masked tokens, more than the 9 rows"):
        PrototypeLoss(K)(unit(9, D), unit(9, D), unit(K, D), mask=torch.ones(2, 10, dtype=torch.bool))
    with pytest.raises(ValueError, match="centering must be one of"):
        PrototypeLoss(K, centering="none")
