"""The Triton kernels of prototype_cross_entropy: value and gradients, in the interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from helpers import roundings, within_budget
from sslfast import NormalizedPrototypes, _native, prototype_cross_entropy, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = _native.why_no_triton(DEVICE)
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON))]
if torch.cuda.is_available():  # else these tests run in the interpreter
    pytestmark.append(pytest.mark.gpu)

FORMS = ["streamed", "banded"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (student's views, samples, features, prototypes): one row, one prototype, one feature; ragged tiles; two products;
# more than one chunk of the gradient.
SHAPES = [(1, 1, 8, 40), (2, 7, 5, 1), (1, 20, 1, 33), (3, 13, 24, 67), (2, 20, 130, 35), (2, 17, 300, 33)]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    with sslfast.use_gradient_form(request.param):
        yield request.param


def make(views: int, samples: int, d: int, k: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=random), dim=-1).to(DEVICE, dtype)

    targets = min(views, 2)
    rows = {"student": unit(views, samples, d), "teacher": unit(targets, samples, d), "w": unit(k, d), "u": unit(k, d)}
    return {**rows, "pairs": [(t, v) for t in range(targets) for v in range(views) if t != v or views == 1]}


def run(function: Any, given: dict[str, Any], kind: torch.dtype) -> tuple[Tensor, ...]:
    """Loss and three times its gradients for student and w."""
    student, teacher, w, u = (given[name].to(kind, copy=True) for name in ("student", "teacher", "w", "u"))
    student.requires_grad_()
    w.requires_grad_()
    wide = torch.float64 if kind == torch.float64 else torch.float32
    bias, weights = (None if given.get(x) is None else given[x].to(wide) for x in ("bias", "weights"))
    if function is prototype_cross_entropy:
        loss = function(student, teacher, w, u, pairs=given["pairs"], teacher_bias=bias, row_weights=weights)
    else:
        loss = function(student, teacher, w, u, given["pairs"], 0.1, 0.04, bias, weights)
    return (loss.detach(), *torch.autograd.grad(3 * loss, (student, w)))


def check(given: dict[str, Any]) -> None:
    dtype = given["student"].dtype
    with sslfast.use_backend("triton"):
        mine = run(prototype_cross_entropy, given, dtype)
    plain = roundings(run, reference.prototype_cross_entropy, given, torch.float32)
    truth = run(reference.prototype_cross_entropy, given, torch.float64)
    floors = (1.0, 30 / given["student"].shape[1], 30 / len(given["w"]))
    for name, a, own, right, floor in zip(("loss", "dstudent", "dw"), mine, plain, truth, floors, strict=True):
        within_budget(name, a, own, right, dtype, floor=floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int, int], dtype: torch.dtype, form: str) -> None:
    check(make(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_and_weights(dtype: torch.dtype, form: str) -> None:
    given = make(3, 13, 24, 67, dtype)
    given["bias"] = torch.randn(67, device=DEVICE)
    given["weights"] = torch.rand(13, device=DEVICE)
    given["weights"][::3] = 0
    check(given)


def test_normalized_prototypes_and_second_order(form: str) -> None:
    given = make(2, 5, 8, 19)
    w = (3 * given["w"]).requires_grad_()
    gain = (torch.rand(19, device=DEVICE) + 0.5).requires_grad_()
    student = given["student"].requires_grad_()
    found = []
    for backend in ("triton", "reference"):
        with sslfast.use_backend(backend):
            loss = prototype_cross_entropy(student, given["teacher"], NormalizedPrototypes(w, gain), given["u"])
            grads = torch.autograd.grad(loss, (student, w, gain), create_graph=True)
            again = torch.autograd.grad(sum(g.square().sum() for g in grads), (student, w, gain))
            found.append((loss, *grads, *again))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_bands(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two samples each, the last of one."""
    from sslfast.kernels import prototype_bands

    monkeypatch.setattr(prototype_bands, "BAND_BYTES", 2 * 67 * (4 * (2 * 3 + 2) + 2 * 3))
    given = make(3, 13, 24, 67, dtype)
    given["weights"] = torch.rand(13, device=DEVICE)
    given["weights"][::3] = 0
    with sslfast.use_gradient_form("banded"):
        check(given)


def test_a_row_without_weight_may_hold_anything(form: str) -> None:
    given = make(2, 5, 8, 19)
    given["weights"] = torch.tensor([1.0, 0, 2, 0, 1], device=DEVICE)
    given["student"][:, 1], given["teacher"][:, 3] = float("nan"), float("inf")
    with sslfast.use_backend("triton"):
        found = run(prototype_cross_entropy, given, torch.float32)
    assert all(x.isfinite().all() for x in found) and found[1].abs().max() > 0


def test_second_backward_and_parts_that_learn(form: str) -> None:
    given = make(2, 5, 8, 19)
    for learning in (("student",), ("w",), ("student", "w")):
        leaves = {name: given[name].clone().requires_grad_(name in learning) for name in ("student", "w")}
        with sslfast.use_backend("triton"):
            loss = prototype_cross_entropy(leaves["student"], given["teacher"], leaves["w"], given["u"])
        wanted = [leaves[name] for name in learning]
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        again = torch.autograd.grad(2 * loss, wanted)
        assert all(torch.equal(2 * a, b) for a, b in zip(first, again, strict=True))


def test_pairs_that_bands_do_not_serve_are_streamed() -> None:
    given = make(3, 4, 8, 19)
    given["pairs"] = [(0, 2), (1, 0)]
    with sslfast.use_gradient_form("banded"):
        check(given)


def test_choice_of_the_form() -> None:
    """Few features are streamed; where one product does not take them all, bands cost less."""
    from sslfast.kernels.prototype_bands import costs

    for ratio in (0.2, 1.0):
        few, many = costs(128, 2, ratio, 128), costs(384, 2, ratio, 128)
        assert few["streamed"] < few["banded"] and many["banded"] < many["streamed"]


def test_many_programs_share_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from sslfast.kernels import _owner

    for split in (1, 3):
        monkeypatch.setattr(_owner, "best_split", lambda programs, slots, most, split=split: min(split, most))
        check(make(2, 70, 8, 40))


def test_opcheck() -> None:
    teacher, u, bias = torch.randn(6, 8, device=DEVICE), torch.randn(9, 8, device=DEVICE), torch.randn(9, device=DEVICE)
    w = torch.randn(9, 8, device=DEVICE, requires_grad=True)
    scale = torch.tensor(2.0, device=DEVICE)
    torch.library.opcheck(torch.ops.sslfast.prototype_attend_triton.default, (teacher, u, w, bias, scale))


@pytest.mark.parametrize("learns", [True, False])
def test_opcheck_of_bands(learns: bool) -> None:
    given = make(2, 5, 8, 19)
    student, w = given["student"].requires_grad_(learns), given["w"].requires_grad_(learns)
    gain, bias = torch.rand(19, device=DEVICE).requires_grad_(learns), torch.randn(19, device=DEVICE)
    tensors = student, given["teacher"], w, gain, given["u"], None, bias, torch.rand(5, device=DEVICE)
    options = [0, 1], [1, 0], 0.1, 0.04, True, False, learns, learns
    torch.library.opcheck(torch.ops.sslfast.prototype_cross_entropy_banded.default, (*tensors, *options))
