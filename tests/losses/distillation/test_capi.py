"""CAPI's loss against its formula in float64; the adapter's tests hold it against lightly's class."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from helpers import DTYPES, check_loss, same_value_and_gradients, value_and_gradients
from sslfast.losses.distillation import diagnostics

TEMPERATURES = {"teacher_temperature": 0.3, "student_temperature": 0.5}


def assigned(logits: Tensor, temperature: float, shift: float = 50.0) -> Tensor:
    """As facebookresearch/capi writes it, without its epsilon: the maximum of each cluster is ``shift``."""
    q = logits.detach() / temperature  # [B, S, K]
    q = torch.exp(q - q.amax(0) + shift)
    for _ in range(3):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(2, keepdim=True)
    return q


def formula(student: Tensor, teacher: Tensor, index: Tensor | None = None) -> Tensor:
    q = assigned(teacher.to(student), TEMPERATURES["teacher_temperature"])
    if index is not None:
        q = q.gather(1, index[..., None].expand(-1, -1, q.shape[2]))
    return -(q * F.log_softmax(student / TEMPERATURES["student_temperature"], -1)).sum(-1).mean()


def loss(student: Tensor, teacher: Tensor, index: Tensor | None = None) -> Tensor:
    return sslfast.capi(teacher, student, index, **TEMPERATURES)


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 4, 48), (17, 3, 301), (1, 5, 6), (3, 1, 1), (2, 2, 1301)], ids=str)
def test_value_and_gradient(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    teacher, student = drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype)
    rows = shape[0] * shape[1]
    check_loss(partial(loss, teacher=teacher), partial(formula, teacher=teacher), (student,), floor=10.0, terms=rows)
    index = torch.rand(shape[:2]).argsort(1)[:, : (shape[1] + 1) // 2]
    predicted = drawn(*index.shape, shape[2], dtype=dtype)
    how = {"teacher": teacher, "index": index}
    check_loss(partial(loss, **how), partial(formula, **how), (predicted,), floor=10.0, terms=index.numel())


def test_a_token_may_be_predicted_twice() -> None:
    teacher, student = drawn(3, 4, 9), drawn(3, 5, 9)
    index = torch.tensor([[0, 0, 3, 1, 0], [2, 2, 2, 2, 2], [1, 0, 3, 2, 1]])
    same_value_and_gradients(
        partial(loss, teacher=teacher, index=index), partial(formula, teacher=teacher, index=index), student
    )


def test_the_clustering_head_learns_from_its_own_assignments() -> None:
    logits = drawn(6, 3, 20)
    found = value_and_gradients(lambda x: loss(x, x), logits)
    expected = value_and_gradients(lambda x: formula(x, x), logits)
    torch.testing.assert_close(found, expected)


def test_all_tokens_together_are_positions_of_their_own() -> None:
    """``positionwise_sk=False`` of the published head."""
    teacher, student = drawn(6, 3, 20), drawn(6, 3, 20)
    flat = [x.reshape(18, 1, 20) for x in (student, teacher)]
    q = sslfast.sinkhorn(teacher.flatten(0, 1), 0.3)
    expected = sslfast.assignment_cross_entropy(student.flatten(0, 1), q, temperature=0.5)
    torch.testing.assert_close(loss(*flat), expected)
    assert (loss(*flat) - loss(student, teacher)).abs() > 1e-3


def test_finite_where_exponentials_are_not() -> None:
    """At the recipe's temperatures, in every dtype; one cluster is far below the others."""
    teacher, student = 4 + 8 * drawn(16, 2, 50, dtype=torch.float32), drawn(16, 2, 50, dtype=torch.float32)
    teacher[:, :, 7] -= 1000
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        value, gradient = value_and_gradients(partial(sslfast.capi, teacher.to(dtype)), student.to(dtype))
        assert value.isfinite() and gradient.isfinite().all()


def test_diagnostics_and_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = drawn(30, 3, 16) / 20, drawn(30, 2, 16)
    index = torch.tensor([[2, 0]] * 30)
    criterion = sslfast.CAPILoss(0.3, 0.5, diagnostics=True)
    found_loss, found = criterion(teacher, student, index)
    assert torch.equal(found_loss, sslfast.CAPILoss(0.3, 0.5)(teacher, student, index))
    q = assigned(teacher, 0.3).flatten(0, 1)
    torch.testing.assert_close(found.loss_above_uniform, found_loss - math.log(16))
    torch.testing.assert_close(found.teacher_entropy, torch.special.entr(q).sum(1).mean())
    torch.testing.assert_close(found.usage_perplexity, torch.special.entr(q.mean(0)).sum().exp())
    monkeypatch.setattr(diagnostics, "PART", 7 * 16)  # of large ones a part at a time
    torch.testing.assert_close(criterion(teacher, student, index)[1], found)
    assert not criterion.state_dict() and "teacher_temperature=0.3" in repr(criterion)


def test_strides_dtypes_autocast_and_compile() -> None:
    teacher, student = drawn(5, 4, 40, dtype=torch.float32), drawn(5, 2, 40, dtype=torch.float32)
    index = torch.tensor([[3, 1]] * 5)
    expected = value_and_gradients(partial(loss, teacher=teacher, index=index), student)
    by_position = teacher.transpose(0, 1).contiguous().transpose(0, 1)  # the published layout
    columns = index.T.contiguous().T
    found = value_and_gradients(partial(loss, teacher=by_position, index=columns), student.mT.contiguous().mT)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    compiled = torch.compile(sslfast.capi, backend="aot_eager", fullgraph=True)
    traced = value_and_gradients(lambda s: compiled(teacher, s, index, **TEMPERATURES), student)
    assert all(torch.equal(a, b) for a, b in zip(traced, expected, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(student, teacher, index), expected[0])
    half = loss(student, teacher.bfloat16(), index)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss(student, teacher.bfloat16().float(), index))


def test_second_derivatives_and_no_gradient_for_the_teacher() -> None:
    teacher, student = drawn(3, 3, 4).requires_grad_(), drawn(3, 2, 4).requires_grad_()
    index = torch.tensor([[2, 0], [1, 1], [0, 2]])
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, index), student)
    assert torch.autograd.gradgradcheck(lambda s: loss(s, teacher, index), student)
    assert torch.autograd.grad(loss(student, teacher, index), teacher, allow_unused=True) == (None,)


def test_bad_input() -> None:
    teacher, student, index = drawn(4, 3, 6), drawn(4, 2, 6), torch.zeros(4, 2, dtype=torch.int64)
    beyond = index + torch.tensor([0, 3])
    wrong = [
        (ValueError, "student_logits must have teacher_logits' images, tokens and clusters", (teacher, student)),
        (ValueError, "images and clusters, got", (teacher, student[:3], index[:3])),
        (ValueError, r"teacher_logits must be \[images, tokens, clusters\]", (teacher[0], student, index)),
        (ValueError, r"student_logits must be .* got \(4, 0, 6\)", (teacher, student[:, :0], index[:, :0])),
        (TypeError, "student_logits must be float32.* got torch.int64", (teacher, student.long(), index)),
        (TypeError, "teacher_logits must be a torch.Tensor, got list", ([teacher], student, index)),
        (TypeError, "teacher_index must be an int64 tensor, got torch.int32", (teacher, student, index.int())),
        (ValueError, r"teacher_index must have shape \(4, 2\)", (teacher, student, index[:, :1])),
        (ValueError, "teacher_index must be positions 0 to 2, got 0 to 3", (teacher, student, beyond)),
    ]
    for kind, message, arguments in wrong:
        with pytest.raises(kind, match=message):
            sslfast.capi(*arguments)  # type: ignore[arg-type]
    for name in ("teacher_temperature", "student_temperature"):
        with pytest.raises(ValueError, match=f"{name} must be finite and not zero"):
            sslfast.capi(teacher, teacher, **{name: 0.0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="iterations must be a whole number"):
        sslfast.capi(teacher, teacher, sinkhorn_iterations=0)
    compiled = torch.compile(sslfast.capi, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="teacher_rows must be from 0"):
        compiled(teacher, student, beyond)  # whose values are not looked at before
