"""prototype_cross_entropy on the CPU: value and every gradient against the reference in float64, and its contracts."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from helpers import DTYPES, roundings, within_budget
from sslfast import NormalizedPrototypes, prototype_cross_entropy, reference

pytestmark = pytest.mark.sanitize
GRAD_LOSS = 1.7  # not 1: a backward that forgets it fails


class Case(NamedTuple):
    """Views of the student and of the teacher, samples, features, prototypes."""

    views: int
    targets: int
    samples: int
    d: int
    k: int


# Aligned, DINO's crops, ragged everywhere, prime, one of everything, more samples than a tile, many teachers' views,
# more views than half a tile, two blocks of prototypes and a bit.
CASES = [
    Case(2, 2, 32, 64, 256),
    Case(6, 2, 20, 32, 500),
    Case(3, 2, 13, 31, 257),
    Case(1, 1, 1, 1, 1),
    Case(1, 1, 7, 5, 1),
    Case(1, 1, 401, 16, 211),
    Case(5, 4, 9, 24, 193),
    Case(100, 2, 3, 8, 40),
    Case(2, 1, 50, 40, 400),
]


def inputs_of(case: Case, kind: torch.dtype = torch.float64) -> dict[str, Any]:
    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)

    pairs = None if case.views > 1 else [(0, 0)]
    return {
        "student": unit(case.views, case.samples, case.d).to(kind),
        "teacher": unit(case.targets, case.samples, case.d).to(kind),
        "w": unit(case.k, case.d).to(kind),
        "u": unit(case.k, case.d).to(kind),
        "pairs": pairs,
    }


def by(function: Any, given: dict[str, Any], kind: torch.dtype) -> tuple[Tensor, ...]:
    """Loss, and GRAD_LOSS times its gradients for student and prototypes (and the gain where there is one)."""
    wide = torch.float64 if kind == torch.float64 else torch.float32
    tensors = {
        name: x.detach().to(wide if name in ("gain", "bias", "weights") else kind, copy=True)
        for name, x in given.items()
        if isinstance(x, Tensor)
    }
    learning = [tensors[name].requires_grad_() for name in ("student", "w", "gain") if name in tensors]
    w, u = tensors["w"], tensors["u"]
    if "gain" in tensors:
        parts = (w, tensors["gain"]), (u, tensors["gain"].detach())
        make = NormalizedPrototypes if function is prototype_cross_entropy else reference.normalized_prototypes
        w, u = (make(*part) for part in parts)
    pairs = given["pairs"]
    if function is prototype_cross_entropy:
        options: dict[str, Any] = {
            "pairs": pairs,
            "teacher_bias": tensors.get("bias"),
            "row_weights": tensors.get("weights"),
        }
        loss = function(tensors["student"], tensors["teacher"], w, u, **options, **given.get("temperatures", {}))
    else:
        if pairs is None:
            views = itertools.product(range(len(tensors["teacher"])), range(len(tensors["student"])))
            pairs = [(t, v) for t, v in views if t != v]
        of = {"student_temperature": 0.1, "teacher_temperature": 0.04, **given.get("temperatures", {})}
        bias, weights = tensors.get("bias"), tensors.get("weights")
        loss = function(tensors["student"], tensors["teacher"], w, u, pairs, *of.values(), bias, weights)
    return (loss.detach(), *torch.autograd.grad(GRAD_LOSS * loss, learning))


def check(given: dict[str, Any], dtype: torch.dtype) -> None:
    given = {name: x.to(dtype) if name in ("student", "teacher", "w", "u") else x for name, x in given.items()}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mine = by(prototype_cross_entropy, given, dtype)
    truth = by(reference.prototype_cross_entropy, given, torch.float64)
    plain = roundings(by, reference.prototype_cross_entropy, given, wide)
    assert mine[0].dtype == wide
    # A gradient is a difference of two distributions that may cancel: its floor is the size of their terms.
    floors = (1e-3, GRAD_LOSS * 10 / given["student"].shape[1], GRAD_LOSS * 10 / len(given["w"]), 1e-1)
    for name, a, right, own, floor in zip(
        ("loss", "dstudent", "dw", "dgain"), mine, truth, plain, floors, strict=False
    ):
        assert a.dtype == (wide if name in ("loss", "dgain") else dtype)
        within_budget(name, a, own, right, dtype if a.dtype == dtype else wide, floor=floor)


@pytest.mark.levels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients(case: Case, dtype: torch.dtype) -> None:
    check(inputs_of(case), dtype)


@pytest.mark.levels
@pytest.mark.parametrize("case", CASES[1:4], ids=str)
def test_bias_weights_and_gain(case: Case) -> None:
    """DINO's centre, rows of weight 0, weight normalisation with a gain that learns."""
    weights = torch.rand(case.samples).double()
    weights[::3] = 0 if case.samples > 1 else 1
    gain = 0.5 + torch.rand(case.k).double()
    given = inputs_of(case) | {"bias": torch.randn(case.k).double(), "weights": weights, "gain": gain}
    given["w"] = 3 * given["w"]
    check(given, torch.float32)
    check(given, torch.float64)


@pytest.mark.levels
@pytest.mark.parametrize("scale", [30.0, 1e3])
def test_large_logits(scale: float) -> None:
    """Neither features nor prototypes of norm 1: logits whose exponentials leave float32's range."""
    given = inputs_of(Case(3, 2, 11, 16, 450))
    given["student"], given["u"] = given["student"] * scale, given["u"] * scale
    check(given, torch.float32)


@pytest.mark.parametrize(
    "case", [Case(2, 2, 300, 12, 20011), Case(1, 1, 200, 400, 20011), Case(10, 2, 64, 256, 12000)], ids=str
)
def test_more_logits_than_are_kept(case: Case) -> None:
    """Several chunks, and blocks of prototypes whose exponentials are computed again: dW is read and written again."""
    given = inputs_of(case)
    single = {name: x.float() if isinstance(x, Tensor) else x for name, x in given.items()}
    for a, b in zip(
        by(prototype_cross_entropy, single, torch.float32),
        by(reference.prototype_cross_entropy, single, torch.float32),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-6 * b.abs().max().item())


# ---------------------------------------------------------------------------------------------------------- contracts


def small() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """student [3, 7, 5], teacher [2, 7, 5], w and u [20, 5] in float32; student and w learn."""
    student, teacher, w, u = (torch.randn(shape) for shape in ((3, 7, 5), (2, 7, 5), (20, 5), (20, 5)))
    return student.requires_grad_(), teacher, w.requires_grad_(), u


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(GRAD_LOSS * loss, inputs)


def test_dino_and_ibot_formulas() -> None:
    """facebookresearch/dino's loop over crops, and dinov2's weighted sum over masked tokens."""
    student, teacher, w, u = small()
    center = torch.randn(1, 20)
    p = F.softmax((teacher @ u.T - center) / 0.04, -1)
    log_q = F.log_softmax(student @ w.T / 0.1, -1)
    terms = [(-(p[t] * log_q[v]).sum(-1)).mean() for t in range(2) for v in range(3) if t != v]
    mine = prototype_cross_entropy(student, teacher, w, u, teacher_bias=-center / 0.04)
    torch.testing.assert_close(mine, sum(terms) / len(terms))
    weights = torch.rand(7)
    rows = -(F.softmax(teacher[0] @ u.T / 0.07, -1) * log_q[0]).sum(-1) @ weights
    mine = prototype_cross_entropy(student[0], teacher[0], w, u, teacher_temperature=0.07, row_weights=weights)
    torch.testing.assert_close(mine, rows)


def test_every_subset_of_gradients() -> None:
    student, teacher, w, u = small()
    gain = torch.rand(20) + 0.5
    full = gradients(
        prototype_cross_entropy(student, teacher, NormalizedPrototypes(w, gain.requires_grad_()), u), student, w, gain
    )
    for chosen in range(1, 8):
        leaves = [t.detach().clone().requires_grad_(bool(chosen >> i & 1)) for i, t in enumerate((student, w, gain))]
        loss = prototype_cross_entropy(leaves[0], teacher, NormalizedPrototypes(leaves[1], leaves[2]), u)
        (GRAD_LOSS * loss).backward()
        for i, (leaf, right) in enumerate(zip(leaves, full, strict=True)):
            assert (leaf.grad is not None) == bool(chosen >> i & 1)
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, right)
    with torch.no_grad():
        assert not prototype_cross_entropy(student, teacher, w, u).requires_grad


def test_nothing_reaches_the_teacher() -> None:
    student, teacher, w, u = small()
    constants = [t.requires_grad_() for t in (teacher, u, torch.randn(20), torch.rand(7))]
    loss = prototype_cross_entropy(student, teacher, w, u, teacher_bias=constants[2], row_weights=constants[3])
    loss.backward()
    assert all(t.grad is None for t in constants)
    shared = prototype_cross_entropy(student, teacher, w)  # the teacher's prototypes are the student's, as constants
    torch.testing.assert_close(
        gradients(shared, w)[0], gradients(prototype_cross_entropy(student, teacher, w, w.detach().clone()), w)[0]
    )


def test_second_backward_through_the_same_graph() -> None:
    """The first one hands the gradient on without a copy: neither it nor a second one may change the other's."""
    student, teacher, w, u = small()
    loss = prototype_cross_entropy(student, teacher, w, u)
    first = torch.autograd.grad(loss, (student, w), torch.tensor(2.0), retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()
    again = torch.autograd.grad(loss, (student, w))
    for a, b in zip(again, kept, strict=True):
        torch.testing.assert_close(2 * a, b)
    total = prototype_cross_entropy(student, teacher, w, u) + prototype_cross_entropy(student, teacher, w, u)
    torch.testing.assert_close(torch.autograd.grad(total, w)[0], kept[1])


def test_rows_without_weight_take_no_part() -> None:
    student, teacher, w, u = small()
    weights = torch.tensor([0.5, 0.0, 0.25, 0.0, 0.0, 1.0, 0.125])
    taken = weights != 0
    few = student.detach()[:, taken].clone().requires_grad_()
    right = prototype_cross_entropy(few, teacher[:, taken], w, u, row_weights=weights[taken])
    with torch.no_grad():
        student[:, ~taken] = float("nan")
        teacher[:, ~taken] = float("inf")
    for backend in (None, "reference"):
        with sslfast.use_backend(backend):
            loss = prototype_cross_entropy(student, teacher, w, u, row_weights=weights)
            torch.testing.assert_close(loss, right)
            ds, dw = gradients(loss, student, w)
            torch.testing.assert_close(ds[:, taken], gradients(right, few)[0] if backend is None else ds[:, taken])
            assert not ds[:, ~taken].any() and dw.isfinite().all()
            right = right.detach()
    nothing = prototype_cross_entropy(student, teacher, w, u, row_weights=torch.zeros(7))
    assert nothing == 0 and not any(g.any() for g in gradients(nothing, student, w))


def test_unused_views_and_repeated_pairs() -> None:
    student, teacher, w, u = small()
    pairs = [(1, 0), (1, 0), (0, 2)]
    given = prototype_cross_entropy(student, teacher, w, u, pairs=pairs), (student, w)
    with sslfast.use_backend("reference"):
        plain = prototype_cross_entropy(student, teacher, w, u, pairs=pairs)
    torch.testing.assert_close(given[0], plain)
    for a, b in zip(gradients(*given[:1], *given[1]), gradients(plain, student, w), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("where", ["student", "teacher", "w", "u", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_values_flow_as_in_pytorch(where: str, value: float) -> None:
    student, teacher, w, u = small()
    tensors = {"student": student, "teacher": teacher, "w": w, "u": u, "bias": torch.randn(20)}
    with torch.no_grad():
        tensors[where].view(-1, tensors[where].shape[-1])[-1, 0] = value
    found = []
    for backend in (None, "reference"):
        with sslfast.use_backend(backend):
            loss = prototype_cross_entropy(student, teacher, w, u, teacher_bias=tensors["bias"])
            found.append((loss.detach(), *gradients(loss, student, w)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.isfinite(), b.isfinite())
        torch.testing.assert_close(a[a.isfinite()], b[b.isfinite()], rtol=1e-4, atol=1e-5)


def test_same_bits_and_strides() -> None:
    student, teacher, w, u = (torch.randn(shape) for shape in ((3, 40, 24), (2, 40, 24), (700, 24), (700, 24)))
    student.requires_grad_()
    w.requires_grad_()
    one, two = (gradients(prototype_cross_entropy(student, teacher, w, u), student, w) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    strided = [
        t.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_(t.requires_grad)
        for t in (student, teacher, w, u)
    ]
    loss = prototype_cross_entropy(*strided)
    for a, b in zip(one, gradients(loss, strided[0], strided[2]), strict=True):
        assert torch.equal(a, b)


def test_second_order_and_opcheck() -> None:
    student = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    gain = torch.rand(6, dtype=torch.float64, requires_grad=True)
    teacher, u = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)

    def function(student: Tensor, w: Tensor, gain: Tensor) -> Tensor:
        prototypes = NormalizedPrototypes(w, gain)
        return prototype_cross_entropy(student, teacher, prototypes, u, student_temperature=0.5)

    torch.autograd.gradcheck(function, (student, w, gain))
    torch.autograd.gradgradcheck(function, (student, w, gain))
    arguments = (student, teacher, w, gain, u, None, None, torch.rand(3).double())
    views = [0, 1], [1, 0]
    torch.library.opcheck(
        torch.ops.sslfast.prototype_cross_entropy.default, (*arguments, *views, 0.1, 0.1, True, False, True, True)
    )


def test_compile_autocast_and_transforms() -> None:
    student, teacher, w, u = small()

    def function(student: Tensor, w: Tensor) -> Tensor:
        return prototype_cross_entropy(student, teacher, w, u)

    plain = function(student, w)
    right = gradients(plain, student, w)
    compiled = torch.compile(function, fullgraph=True)
    for _ in range(2):
        loss = compiled(student, w)
        torch.testing.assert_close(loss, plain)
        torch.testing.assert_close(gradients(loss, student, w), right)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(function(student, w), plain)
    tangents = (torch.randn_like(student), torch.randn_like(w))
    _, tangent = torch.func.jvp(function, (student.detach(), w.detach()), tangents)
    torch.testing.assert_close(GRAD_LOSS * tangent, sum((a * b).sum() for a, b in zip(right, tangents, strict=True)))


def test_mixed_dtypes() -> None:
    """Features in 16 bits beside prototypes in float32: each is read as it is, each gradient has its own dtype."""
    student, teacher, w, u = small()
    half = student.detach().bfloat16().requires_grad_()
    loss = prototype_cross_entropy(half, teacher.bfloat16(), w, u)
    wide = half.detach().float().requires_grad_()
    right = prototype_cross_entropy(wide, teacher.bfloat16().float(), w, u)
    torch.testing.assert_close(loss, right)
    ds, dw = gradients(loss, half, w)
    assert ds.dtype == torch.bfloat16 and dw.dtype == torch.float32
    torch.testing.assert_close(dw, gradients(right, wide, w)[1])


def test_teacher_by_reference_warns() -> None:
    student, teacher, w, _ = small()
    with pytest.warns(UserWarning, match="the student's own memory"):
        prototype_cross_entropy(student, teacher, w, w.data)


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"student": torch.randn(7)}, ValueError, "student must be"),
        ({"teacher": torch.randn(2, 6, 5)}, ValueError, "same samples"),
        ({"teacher": torch.randn(7, 5)}, ValueError, "same samples"),
        ({"teacher_prototypes": torch.randn(19, 5)}, ValueError, "equally many, got 20 and 19"),
        ({"teacher_prototypes": torch.randn(20, 4)}, ValueError, "student's 5 features, got 4"),
        ({"student_prototypes": None}, TypeError, "student_prototypes must be a torch.Tensor"),
        ({"student": torch.ones(3, 7, 5, dtype=torch.int64)}, TypeError, "student must be float32"),
        ({"student_temperature": 0}, ValueError, "student_temperature must be finite and not zero"),
        ({"teacher_temperature": float("nan")}, ValueError, "teacher_temperature"),
        ({"teacher_temperature": "warm"}, TypeError, "teacher_temperature must be a number"),
        ({"pairs": []}, ValueError, "at least one pair"),
        ({"pairs": [(2, 0)]}, ValueError, r"got \(2, 0\)"),
        ({"pairs": [(0, 1.5)]}, ValueError, "whole numbers"),
        ({"pairs": [(0, 1, 2)]}, ValueError, "pairs"),
        ({"teacher_bias": torch.randn(19)}, ValueError, r"teacher_bias must have shape \(20,\)"),
        ({"row_weights": torch.ones(7, dtype=torch.bool)}, TypeError, "row_weights must be float32"),
        ({"row_weights": torch.rand(8)}, ValueError, r"row_weights must have shape \(7,\)"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], match: str) -> None:
    student, teacher, w, u = small()
    given = {"student": student, "teacher": teacher, "student_prototypes": w, "teacher_prototypes": u} | change
    with pytest.raises(error, match=match):
        prototype_cross_entropy(**given)


def test_one_view_has_no_pair() -> None:
    student, teacher, w, _ = small()
    with pytest.raises(ValueError, match=r"pass pairs=\[\(0, 0\)\]"):
        prototype_cross_entropy(student[:1], teacher[:1], w)
