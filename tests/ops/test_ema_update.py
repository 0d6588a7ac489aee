"""Exponential moving averages of many tensors: the kernels against the formula in float64, at every level."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import sslfast
from helpers import DTYPES, within_budget
from sslfast import reference
from sslfast.ops.ema_update import ema_update

pytestmark = pytest.mark.sanitize

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Many small ones in one task, one over several tasks and past their border, none, one number, whole and ragged vectors.
SHAPES = [(3,), (0,), (), (64, 64), (7, 5, 3), (70001,), (1,), (65536,), (257, 513), (2,)] + [(5,)] * 150
HALVES = (torch.bfloat16, torch.float16)


def drawn(dtype: torch.dtype, device: str, shapes: list[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes]


def copies(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [t.to(dtype or t.dtype, copy=True) for t in tensors]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def check(averages: list[Tensor], students: list[Tensor], momentum: float, copy: torch.dtype | None = None) -> None:
    """One update within the budget, and the rounded copy exactly that of the new averages."""
    device = averages[0].device.type
    single, truth = copies(averages), copies(averages, torch.float64)
    reference.ema_update(single, students, momentum)
    reference.ema_update(truth, copies(students, torch.float64), momentum)
    rounded = [torch.full_like(t, float("nan"), dtype=copy) for t in averages] if copy is not None else []
    given, places = copies(students), [t.data_ptr() for t in averages]
    with sslfast.use_backend(device):
        ema_update(averages, students, momentum, rounded)
    within_budget("averages", flat(averages), flat(single), flat(truth), averages[0].dtype)
    for t, new in zip(averages, rounded, strict=False):
        assert torch.equal(new, t.to(new.dtype))
    assert all(torch.equal(a, b) for a, b in zip(students, given, strict=True))
    assert [t.data_ptr() for t in averages] == places  # nothing is bound anew


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 1.0])
@pytest.mark.parametrize(("average", "student"), [*itertools.product(DTYPES, DTYPES)], ids=str)
def test_one_update(average: torch.dtype, student: torch.dtype, momentum: float, device: str) -> None:
    check(drawn(average, device), drawn(student, device), momentum)


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("copy", DTYPES, ids=str)
@pytest.mark.parametrize("average", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("student", DTYPES, ids=str)
def test_a_rounded_copy(student: torch.dtype, average: torch.dtype, copy: torch.dtype, device: str) -> None:
    check(drawn(average, device), drawn(student, device), 0.9, copy)


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ends_are_exact(dtype: torch.dtype, device: str) -> None:
    """m = 0 gives the student, m = 1 leaves the teacher, and a teacher that is where its student is stays."""
    teacher, student = drawn(dtype, device), drawn(dtype, device)
    for momentum, expected in ((0.0, student), (1.0, teacher)):
        found = copies(teacher)
        ema_update(found, student, momentum)
        assert torch.equal(flat(found), flat(expected))
    for momentum in (0.3, 0.77, 0.9999):
        found = copies(student)
        ema_update(found, student, momentum)
        assert torch.equal(flat(found), flat(student))


@pytest.mark.parametrize("device", DEVICES)
def test_one_minus_m_is_not_rounded_first(device: str) -> None:
    """In float32 1 − 0.99999 has an error of 1 %, which an average keeps; here it has none."""
    teacher = [torch.zeros(1000, device=device)]
    ema_update(teacher, [torch.ones(1000, device=device)], 0.99999)
    assert (teacher[0].double() - 1e-5).abs().max() < 1e-12


@pytest.mark.parametrize("device", DEVICES)
def test_orders_of_memory(device: str) -> None:
    """Channels last beside channels last is flat memory; all else goes pair by pair, also beside flat ones."""
    x = torch.randn(4, 6, 5, 3, device=device)
    last = {"memory_format": torch.channels_last}
    orders = {
        "channels last": lambda t: t.clone(**last),
        "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "with gaps": lambda t: torch.stack([t, t], -1)[..., 0],
        "contiguous": lambda t: t.clone(),
    }
    s = torch.randn_like(x)
    expected = 0.9 * x + 0.1 * s
    for (one, of_t), (other, of_s) in itertools.product(orders.items(), orders.items()):
        base = of_t(x)
        ema_update([base, x.clone()], [of_s(s), s], 0.9)
        torch.testing.assert_close(base, expected, msg=lambda m, one=one, other=other: f"{one}, {other}: {m}")
    beside = torch.stack([x, x], -1)
    ema_update([beside[..., 0]], [s], 0.9)
    assert torch.equal(beside[..., 1], x)  # what lies between is not touched


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_start_that_is_not_aligned(dtype: torch.dtype, device: str) -> None:
    for offset in (1, 3):
        bases = [torch.randn(40009, device=device).to(dtype) for _ in range(2)]
        t, s = (b[offset:-1] for b in bases)
        before = bases[0].clone()
        expected = torch.lerp(t.float(), s.float(), 1 - 0.75).to(dtype)
        ema_update([t], [s], 0.75)
        torch.testing.assert_close(t, expected)
        assert torch.equal(bases[0][:offset], before[:offset]) and torch.equal(bases[0][-1:], before[-1:])


def test_numbers_that_are_not_finite_are_as_in_pytorch() -> None:
    t = torch.tensor([1.0, float("nan"), 1.0, float("inf"), float("inf"), -float("inf")])
    s = torch.tensor([float("nan"), 1.0, float("inf"), 1.0, float("inf"), 1.0])
    expected = torch.lerp(t, s, 0.1)
    ema_update([t], [s], 0.9)
    torch.testing.assert_close(t, expected, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_run_to_run_and_on_any_threads(device: str) -> None:
    teacher, student = drawn(torch.float32, device), drawn(torch.float32, device)
    first, second = copies(teacher), copies(teacher)
    ema_update(first, student, 0.99)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        ema_update(second, student, 0.99)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(flat(first), flat(second))


@pytest.mark.parametrize("device", DEVICES)
def test_the_momentum_may_be_a_tensor(device: str) -> None:
    teacher, student = drawn(torch.float32, device), drawn(torch.float32, device)
    by_number, by_tensor = copies(teacher), copies(teacher)
    ema_update(by_number, student, 0.99)
    ema_update(by_tensor, student, torch.tensor(0.99, dtype=torch.float64, device=device))
    assert torch.equal(flat(by_number), flat(by_tensor))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("copy", [None, torch.float16], ids=str)
def test_opcheck(copy: torch.dtype | None, device: str) -> None:
    shapes: list[tuple[int, ...]] = [(3,), (4, 5), ()]
    lists = [drawn(torch.float32, device, shapes) for _ in range(2)]
    lists.append(drawn(copy, device, shapes) if copy is not None else [])
    operator = torch.ops.sslfast.ema_update_.default
    torch.library.opcheck(operator, (*lists, 0.9, None))
    torch.library.opcheck(operator, (*lists, 0.0, torch.tensor(0.9, dtype=torch.float64, device=device)))


def test_a_graph_that_saved_a_teacher_notices() -> None:
    x = torch.randn(5, requires_grad=True)
    teacher = torch.randn(5)
    y = (x * teacher).sum()
    ema_update([teacher], [torch.randn(5)], 0.9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.gpu
def test_cuda_graph_captures_it() -> None:
    """With the momentum in a tensor every replay takes the one that is in it then."""
    teacher, student = drawn(torch.float32, "cuda"), drawn(torch.float32, "cuda")
    expected, m = copies(teacher), torch.tensor(0.9, dtype=torch.float64, device="cuda")
    ema_update(copies(teacher), student, m)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema_update(teacher, student, m)
    for momentum in (0.9, 0.5):
        m.fill_(momentum)
        graph.replay()
        ema_update(expected, student, momentum)
    assert torch.equal(flat(teacher), flat(expected))


@pytest.mark.parametrize("device", DEVICES)
def test_the_operator_checks_what_it_is_given(device: str) -> None:
    """Called without the public function, with arguments that would read or write out of bounds."""
    x = torch.randn(3, 4, device=device)
    update = torch.ops.sslfast.ema_update_
    wrong = {
        "students must be as many as averages, 1, got 2": ([x], [x, x], [], 0.9, None),
        "rounded must be as many as averages, 1, or none, got 2": ([x], [x], [x, x], 0.9, None),
        "students must lie in memory as averages do": ([x], [x[:2]], [], 0.9, None),
        "rounded must lie in memory as averages do": ([x], [x], [x.T.contiguous().T], 0.9, None),
        "averages must lie in memory as averages do, without gaps": ([x[:, ::2]], [x[:, ::2]], [], 0.9, None),
        "students must have one dtype": ([x, x], [x, x.half()], [], 0.9, None),
        "rounded copies are of float32 averages": ([x.double()], [x], [x], 0.9, None),
        "averages must be float32, .*, got Int": ([x.int()], [x], [], 0.9, None),
        "momentum must be Double, got Float": ([x], [x], [], 0.0, torch.tensor(0.9, device=device)),
        "momentum has an unexpected shape": ([x], [x], [], 0.0, torch.ones(1, dtype=torch.float64, device=device)),
    }
    for message, arguments in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            update(*arguments)


def test_the_reference_is_the_same_average() -> None:
    student = torch.randn(7, 5)
    found = []
    for backend in ("cpu", "reference"):
        teacher = torch.linspace(-1, 1, 35).view(7, 5).clone()
        with sslfast.use_backend(backend):
            sslfast.nn.ema_update_([teacher], [student], 0.9)
        found.append(teacher)
    torch.testing.assert_close(*found)
