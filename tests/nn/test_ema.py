"""The teacher of a student: pairs by name, buffers, precision, momentum, state, wrong input."""

from __future__ import annotations

import copy
import io
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from sslfast import _checks
from sslfast.nn import ExponentialMovingAverage, cosine_schedule, ema_update_


def encoder(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


def trained(student: nn.Module, steps: int = 1) -> nn.Module:
    """A few steps of anything: other weights and other statistics."""
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        student(torch.randn(8, 3, 8, 8).to(next(student.parameters()).dtype)).square().mean().backward()
        optimizer.step()
    return student


def plain(teacher: nn.Module, student: nn.Module, m: float) -> dict[str, Tensor]:
    of = dict(student.named_parameters())
    return {n: m * t.detach().double() + (1 - m) * of[n].detach().double() for n, t in teacher.named_parameters()}


def agrees(teacher: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, t in teacher.named_parameters():
        torch.testing.assert_close(t.detach().double(), expected[name], rtol=1e-6, atol=1e-7)


def test_every_parameter_moves_and_keeps_its_memory() -> None:
    student, teacher = trained(encoder()), encoder(1)
    expected, places = plain(teacher, student, 0.9), [p.data_ptr() for p in teacher.parameters()]
    ema_update_(teacher, student, 0.9)
    agrees(teacher, expected)
    assert [p.data_ptr() for p in teacher.parameters()] == places
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_pairs_are_matched_by_name() -> None:
    """In another order zip would pair weights of the same shape with each other's."""

    class Heads(nn.Module):
        def __init__(self, names: str) -> None:
            super().__init__()
            for name in names:
                setattr(self, name, nn.Linear(3, 3))

    student, teacher = Heads("ab"), Heads("ba")
    expected = plain(teacher, student, 0.5)
    ema_update_(teacher, student, 0.5)
    agrees(teacher, expected)


@pytest.mark.parametrize("policy", ["copy", "average", "skip"])
def test_statistics_of_batch_normalisation(policy: str) -> None:
    student, teacher = encoder(), encoder()
    before = {n: b.clone() for n, b in teacher.named_buffers()}
    trained(student, 3)
    ema_update_(teacher, student, 0.9, buffers=policy)
    for name, b in teacher.named_buffers():
        of_student = dict(student.named_buffers())[name]
        if policy == "skip":
            assert torch.equal(b, before[name])
        elif policy == "copy" or not b.is_floating_point():
            assert torch.equal(b, of_student)
        else:
            torch.testing.assert_close(b, 0.9 * before[name] + 0.1 * of_student)


def test_statistics_follow_over_many_updates() -> None:
    """A teacher in eval() that never copied them would normalise by mean 0 and variance 1."""
    student = encoder()
    teacher = ExponentialMovingAverage(student, 0.9)
    for _ in range(10):
        teacher.update(trained(student))
    assert torch.equal(teacher.module[1].running_mean, student[1].running_mean)
    assert teacher.module[1].num_batches_tracked.item() == 10


def test_sequences_of_tensors() -> None:
    t, s = [torch.ones(3), torch.zeros(2, 2)], (torch.zeros(3), torch.ones(2, 2))
    ema_update_(t, s, 0.75)
    assert t[0].tolist() == [0.75] * 3 and t[1].flatten().tolist() == [0.25] * 4
    counters = [torch.tensor([3])]
    ema_update_(counters, [torch.tensor([7])], 0.9)  # whole numbers are copied
    assert counters[0].item() == 7


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_teacher_of_a_half_student_and_its_copy(half: torch.dtype) -> None:
    student = encoder().to(half)
    teacher, copied = copy.deepcopy(student).float(), copy.deepcopy(student)
    for step in range(5):
        for p in student.parameters():
            p.data.add_(torch.randn(p.shape).to(half), alpha=0.1)
        expected = plain(teacher, student, 0.99)
        ema_update_(teacher, student, 0.99, rounded=copied)
        agrees(teacher, expected)
        for a, b in zip(teacher.parameters(), copied.parameters(), strict=True):
            assert torch.equal(a.to(half), b), step
    for b in copied.buffers():
        assert b.dtype in (half, torch.int64)


def test_a_bfloat16_average_stands_still_and_says_so() -> None:
    _checks._warned.clear()
    student, teacher = [torch.ones(4, dtype=torch.bfloat16)], [torch.full((4,), 0.5, dtype=torch.bfloat16)]
    with pytest.warns(UserWarning, match="averages in 16 bits stand still"):
        for _ in range(100):
            ema_update_(teacher, student, 0.9992)
    assert teacher[0].tolist() == [0.5] * 4
    master = [torch.full((4,), 0.5)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(100):
            ema_update_(master, student, 0.9992, rounded=teacher)
    assert abs(master[0][0].item() - (1 - 0.5 * 0.9992**100)) < 1e-6
    assert torch.equal(teacher[0], master[0].bfloat16())


def test_the_momentum_is_how_much_stays() -> None:
    """m = 0.99 moves the teacher by 1 %; and the tensor is read."""
    for m in (0.99, torch.tensor(0.99), torch.tensor([0.99], dtype=torch.float64)):
        teacher = [torch.zeros(1)]
        ema_update_(teacher, [torch.ones(1)], m)
        assert abs(teacher[0].item() - 0.01) < 1e-8


# ------------------------------------------------------------------------------------------------------------ compile


def test_compile_without_graph_breaks_and_without_compiling_anew() -> None:
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ema_update_, backend=frames, fullgraph=True)
    student, teacher = [torch.randn(3, 4), torch.randn(5)], [torch.zeros(3, 4), torch.zeros(5)]
    expected = [t.clone() for t in teacher]
    counts = []
    for m in (0.9, 0.5, 0.3):
        compiled(teacher, student, torch.tensor(m, dtype=torch.float64))
        ema_update_(expected, student, m)
        counts.append(frames.frame_count)
    assert counts[-1] == counts[0]
    assert all(torch.equal(a, b) for a, b in zip(teacher, expected, strict=True))


def test_compile_of_modules() -> None:
    student, teacher = encoder(), encoder(1)
    other = copy.deepcopy(teacher)
    torch.compile(partial(ema_update_, momentum=0.9), backend="aot_eager", fullgraph=True)(teacher, student)
    ema_update_(other, student, 0.9)
    for a, b in zip(teacher.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


# --------------------------------------------------------------------------------------------------------- the module


def test_the_module_is_a_copy_without_gradient() -> None:
    student = encoder()
    teacher = ExponentialMovingAverage(student, 0.9)
    assert teacher.average is None and not any(p.requires_grad for p in teacher.parameters())
    expected = plain(teacher.module, trained(student), 0.9)
    teacher.update(student)
    agrees(teacher.module, expected)
    y = teacher(torch.randn(2, 3, 8, 8))
    assert y.shape == (2, 5) and not y.requires_grad


def test_the_module_keeps_a_float32_average_of_a_half_student() -> None:
    student = encoder().bfloat16()
    teacher = ExponentialMovingAverage(student, 0.999)
    assert isinstance(teacher.average, nn.Module)
    assert {p.dtype for p in teacher.average.parameters()} == {torch.float32}
    expected = plain(teacher.average, trained(student), 0.999)
    teacher.update(student)
    agrees(teacher.average, expected)
    for new, half in zip(teacher.average.parameters(), teacher.module.parameters(), strict=True):
        assert half.dtype == torch.bfloat16 and torch.equal(new.bfloat16(), half)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_dict_round_trip_keeps_the_next_value(dtype: torch.dtype) -> None:
    def made() -> ExponentialMovingAverage:
        return ExponentialMovingAverage(encoder().to(dtype), lambda step: cosine_schedule(step, 10, 0.5, 1.0))

    student, teacher = encoder().to(dtype), made()
    for _ in range(3):
        teacher.update(trained(student))
    file = io.BytesIO()
    torch.save(teacher.state_dict(), file)
    file.seek(0)
    restored = made()
    restored.load_state_dict(torch.load(file, weights_only=True))
    trained(student)
    teacher.update(student)
    restored.update(student)
    assert restored.updates == teacher.updates == 4
    for a, b in zip(teacher.state_dict().values(), restored.state_dict().values(), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_the_schedule_is_given_the_number_of_the_update() -> None:
    seen: list[int] = []
    teacher = ExponentialMovingAverage(nn.Linear(1, 1), lambda step: seen.append(step) or 0.5)
    student = nn.Linear(1, 1)
    for step in (None, None, 7, None):
        teacher.update(student, step)
    assert seen == [0, 1, 7, 8]


# --------------------------------------------------------------------------------------------------------- wrong input


class Wrong:
    student = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    shorter = nn.Sequential(nn.Linear(3, 4))
    wider = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    normalised = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.BatchNorm1d(2, affine=False))
    wrapped = nn.ModuleDict({"module": student})


def teacher() -> nn.Module:
    return copy.deepcopy(Wrong.student)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Wrong.shorter, 0.9), r"parameters of the same names: student lacks 1\.weight, 1\.bias$"),
        ((Wrong.wider, 0.9), r"same shapes, got 0\.weight \(4, 3\) and \(5, 3\), 0\.bias \(4,\) and \(5,\), 1\.weight"),
        ((Wrong.wrapped, 0.9), r"student has module\.0\.weight, .*which teacher lacks; of a wrapped model pass"),
        ((Wrong.normalised, 0.9), r"buffers of the same names: student has 2\.running_mean, .*buffers='skip'"),
        ((Wrong.student, 1.5), r"momentum must be between 0 and 1, got 1\.5"),
        ((Wrong.student, -0.1), r"momentum must be between 0 and 1, got -0\.1"),
        ((Wrong.student, float("nan")), r"momentum must be between 0 and 1, got nan"),
        ((Wrong.student, torch.tensor(1.5)), r"momentum must be between 0 and 1, got tensor\(1\.5"),
        ((Wrong.student, torch.ones(2)), r"momentum must be a number or a one-element .*, got shape \(2,\)"),
        ((Wrong.student, torch.tensor(1)), r"momentum must be a number or a one-element .*dtype torch\.int64"),
    ],
)
def test_what_does_not_fit_is_named(arguments: tuple[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ema_update_(teacher(), *arguments)


def test_kinds_that_do_not_fit() -> None:
    x, z = torch.randn(3), torch.randn(3, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"all of them sequences of tensors: teacher is Sequential, student is list"):
        ema_update_(teacher(), [x], 0.9)
    with pytest.raises(TypeError, match="student must be a module or a sequence of tensors, got Tensor"):
        ema_update_([x], x, 0.9)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"student\[1\] must be a torch.Tensor, got float"):
        ema_update_([x, x], [x.clone(), 1.0], 0.9)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="student lacks 1"):
        ema_update_([x, x], [x.clone()], 0.9)
    with pytest.raises(TypeError, match=r"momentum must be a number, got '0.9'"):
        ema_update_([x], [x.clone()], "0.9")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="buffers must be one of copy, average, skip, got 'lerp'"):
        ema_update_([x], [x.clone()], 0.9, buffers="lerp")
    with pytest.raises(ValueError, match="student's parameter 0 must be on the teacher's device cpu, got meta"):
        ema_update_([x], [torch.empty(3, device="meta")], 0.9)
    complex_pair = [torch.zeros_like(z)], [z]
    assert ema_update_(*complex_pair, 0.9) is None and torch.equal(complex_pair[0][0], z)  # as all that is no average
    with pytest.raises(TypeError, match="student's parameter 0 must be float32, .* got torch.int64"):
        ema_update_([x], [torch.ones(3, dtype=torch.int64)], 0.9)
    with pytest.raises(TypeError, match="student must be a torch.nn.Module, got list"):
        ExponentialMovingAverage([x])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="momentum must be between 0 and 1, got 2"):
        ExponentialMovingAverage(encoder(), 2)


def test_a_teacher_that_is_its_student_is_refused() -> None:
    student = encoder()
    with pytest.raises(ValueError, match=r"must not share memory, but parameter 0\.weight is the same: .*deepcopy"):
        ema_update_(student, student, 0.9)
    x = torch.randn(4, 4)
    with pytest.raises(ValueError, match="teacher and student must not share memory, but parameter 0 is the same"):
        ema_update_([x.view(16)], [x.view(16)], 0.9)
    with pytest.raises(ValueError, match="teacher and rounded must not share memory"):
        ema_update_([x], [x.clone()], 0.9, rounded=[x])
