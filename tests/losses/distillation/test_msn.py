"""MSN and PMSN against the formulas in float64 and lightly's classes; priors, layouts, inputs that do not fit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from adapter_common import peer
from helpers import within_budget

# Anchor views, images, prototypes, features.
SIZES = [(2, 6, 20, 8), (11, 5, 64, 16), (1, 1, 3, 4), (3, 4, 1, 5), (1, 9, 131, 7)]
FORMS = {
    "msn": (sslfast.msn, {}),
    "no Sinkhorn": (sslfast.msn, {"sinkhorn_iterations": 0}),
    "options": (sslfast.msn, {"temperature": 0.3, "target_sharpen_temperature": 0.5, "entropy_weight": 0.7}),
    "no regulariser": (sslfast.msn, {"regularization_weight": 0.0, "sinkhorn_iterations": 1}),
    "pmsn": (sslfast.pmsn, {"power_law_exponent": 0.7, "regularization_weight": 2.5}),
}


def embeddings(
    sizes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    views, batch, prototypes, width = sizes
    draw = torch.Generator().manual_seed(seed)
    shapes = ((views * batch, width), (batch, width), (prototypes, width))
    anchors, targets, c = (torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in shapes)
    return anchors.requires_grad_(), targets, c.requires_grad_()


def formula(
    anchors: Tensor,
    targets: Tensor,
    prototypes: Tensor,
    *,
    temperature: float = 0.1,
    target_sharpen_temperature: float = 0.25,
    sinkhorn_iterations: int = 3,
    regularization_weight: float = 1.0,
    entropy_weight: float = 0.0,
    power_law_exponent: float | None = None,
) -> Tensor:
    """The papers', with probabilities."""
    c = F.normalize(prototypes)
    p = torch.softmax(F.normalize(anchors) @ c.T / temperature, 1)
    with torch.no_grad():
        t = torch.softmax(F.normalize(targets) @ c.T / temperature, 1) ** (1 / target_sharpen_temperature)
        t = t / t.sum(1, keepdim=True)
        for _ in range(sinkhorn_iterations):
            t = t / t.sum(0)
            t = t / t.sum(1, keepdim=True)
    loss = -(t.repeat(len(p) // len(t), 1) * p.log()).sum(1).mean()
    mean = p.mean(0)
    if power_law_exponent is None:
        prior = math.log(len(mean)) + (mean * mean.log()).sum()
    else:
        q = torch.arange(1, len(mean) + 1, dtype=mean.dtype) ** -power_law_exponent
        prior = F.kl_div(mean.log(), q / q.sum(), reduction="sum")
    return loss + regularization_weight * prior - entropy_weight * (p * p.log()).sum(1).mean()


def value_and_gradients(loss: Any, inputs: tuple[Tensor, ...], **how: Any) -> list[Tensor]:
    value = loss(*inputs, **how)
    return [value.detach(), *torch.autograd.grad(value, [x for x in inputs if x.requires_grad])]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_value_and_gradients(sizes: tuple[int, ...], form: str, dtype: torch.dtype) -> None:
    loss, how = FORMS[form]
    inputs = embeddings(sizes, dtype)
    found = value_and_gradients(loss, inputs, **how)
    with sslfast.use_backend("reference"):
        own = value_and_gradients(loss, inputs, **how)
    wide = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in inputs)
    truth = value_and_gradients(formula, wide, **how)
    assert found[0].shape == () and found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, mine, plain, true in zip(("value", "anchors", "prototypes"), found, own, truth, strict=True):
        floor = 20.0 if name == "value" else 20.0 / len(inputs[0])
        within_budget(name, mine.to(dtype), plain.to(dtype), true, dtype, floor=floor)


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # lightly's PMSNLoss
@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_as_lightly(sizes: tuple[int, ...], iterations: int) -> None:
    loss = peer("lightly.loss")

    def uniform(mean: Tensor) -> Tensor:
        return torch.full_like(mean, 1 / len(mean))

    how = {"sinkhorn_iterations": iterations, "regularization_weight": 0.7}
    inputs = embeddings(sizes, torch.float64)
    for mine, theirs, digits in (
        (sslfast.MSNLoss(**how), loss.MSNLoss(**how), 1e-12),
        (sslfast.PMSNLoss(**how), loss.PMSNLoss(**how), 1e-6),  # whose power law is float32
        (sslfast.PMSNLoss(**how, target_distribution=uniform), loss.PMSNCustomLoss(uniform, **how), 1e-12),
    ):
        for sharpness in (0.25, 1.0):
            sharp = {"target_sharpen_temperature": sharpness}
            pairs = [value_and_gradients(criterion, inputs, **sharp) for criterion in (mine, theirs)]
            for found, expected in zip(*pairs, strict=True):
                torch.testing.assert_close(found, expected, rtol=digits, atol=digits)


def test_finite_where_probabilities_are_zero() -> None:
    """At τ = 0.005 a logit is 400 below the others: upstream's log(p ** −t) is infinite, and in float16 NaN."""
    anchors = torch.eye(4).repeat(2, 1)
    inputs = (anchors.requires_grad_(), -torch.eye(4), torch.eye(4).requires_grad_())
    for loss in (sslfast.msn, sslfast.pmsn):
        found = value_and_gradients(loss, inputs, temperature=0.005)
        assert all(x.isfinite().all() for x in found)
    assert found[0] > 100
    half = tuple(x.detach().half().requires_grad_(x.requires_grad) for x in inputs)
    assert all(x.isfinite().all() for x in value_and_gradients(sslfast.msn, half, temperature=0.02))
    nothing = torch.tensor([1.0, 0.0, 0.0])  # a prior of 0, and a prototype that no anchor is near
    rows = torch.tensor([[1.0, 0.0]], requires_grad=True)
    c = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0]], requires_grad=True)
    found = value_and_gradients(sslfast.pmsn, (rows, rows.detach(), c), temperature=0.001, target_distribution=nothing)
    assert all(x.isfinite().all() for x in found)
    other = nothing.flip(0)
    found = value_and_gradients(sslfast.pmsn, (rows, rows.detach(), c), temperature=0.001, target_distribution=other)
    assert all(x.isfinite().all() for x in found)


def test_target_distributions() -> None:
    inputs = embeddings((2, 6, 20, 8))
    law = torch.arange(1, 21) ** -0.25
    law = law / law.sum()
    expected = value_and_gradients(sslfast.pmsn, inputs)
    given = value_and_gradients(sslfast.pmsn, inputs, target_distribution=law)
    called = value_and_gradients(sslfast.pmsn, inputs, target_distribution=lambda mean: law.to(mean))
    for found in (given, called):
        for mine, true in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, true)
    learnt = law.clone().requires_grad_()
    sslfast.pmsn(*inputs, target_distribution=learnt).backward()
    assert learnt.grad is not None and learnt.grad.isfinite().all()


@pytest.mark.parametrize("name", ["MSNLoss", "PMSNLoss"])
def test_modules(name: str) -> None:
    inputs = embeddings((2, 6, 20, 8))
    law = torch.softmax(torch.randn(20), 0)
    module, function = getattr(sslfast, name), getattr(sslfast, name.removesuffix("Loss").lower())
    how = {"temperature": 0.2, "sinkhorn_iterations": 2, "regularization_weight": 0.5, "entropy_weight": 0.3}
    how |= {"target_distribution": law} if name == "PMSNLoss" else {}
    criterion = module(**how)
    assert torch.equal(criterion(*inputs, 0.5), function(*inputs, target_sharpen_temperature=0.5, **how))
    assert not criterion.state_dict() and "temperature=0.2" in repr(criterion)
    assert criterion.double().prior()(torch.full((20,), 0.05, dtype=torch.float64)).dtype == torch.float64
    if name == "PMSNLoss":
        assert criterion.target_distribution.dtype == torch.float64
    loss, found = module(diagnostics=True)(*inputs)
    assert torch.equal(loss, function(*inputs))
    assert 0 < found.usage_perplexity <= 20.001 and 0 <= found.teacher_entropy <= math.log(20)
    alone = function(*inputs, regularization_weight=0.0)
    torch.testing.assert_close(found.loss_above_uniform, alone.detach() - math.log(20))


def test_views_follow_one_another_and_targets_are_constants() -> None:
    anchors, targets, prototypes = embeddings((3, 4, 20, 8), torch.float64)
    whole = sslfast.msn(anchors, targets, prototypes, regularization_weight=0.0)
    each = [sslfast.msn(view, targets, prototypes, regularization_weight=0.0) for view in anchors.split(4)]
    torch.testing.assert_close(whole, sum(each) / 3)
    learning = targets.clone().requires_grad_()
    sslfast.msn(anchors, learning, prototypes).backward()
    assert learning.grad is None


def test_double_backward() -> None:
    """As the formula's: numbers would see the targets move with the prototypes."""
    inputs = embeddings((2, 3, 4, 3), torch.float64)
    for form in ("options", "pmsn"):
        loss, how = FORMS[form]
        second = []
        for function in (loss, formula):
            first = torch.autograd.grad(function(*inputs, **how), (inputs[0], inputs[2]), create_graph=True)
            size = sum(grad.square().sum() for grad in first)
            second.append(torch.autograd.grad(size, (inputs[0], inputs[2])))
        for mine, true in zip(*second, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-10)


def test_compile_and_autocast() -> None:
    inputs = embeddings((2, 6, 20, 8))
    for criterion in (sslfast.MSNLoss(), sslfast.PMSNLoss()):
        expected = value_and_gradients(criterion, inputs)
        compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
        for mine, true in zip(value_and_gradients(compiled, inputs), expected, strict=True):
            torch.testing.assert_close(mine, true)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = criterion(inputs[0].bfloat16(), inputs[1], inputs[2])
        assert mixed.dtype == torch.float32
        torch.testing.assert_close(mixed.detach(), expected[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"anchors": torch.zeros(5, 8)}, ValueError, "anchors must be a whole number of views of the 6 targets, got 5"),
        ({"anchors": torch.zeros(6)}, ValueError, "anchors must be two-dimensional"),
        ({"targets": torch.zeros(6, 7)}, ValueError, "targets and anchors must have the same width, got 7 and 8"),
        ({"prototypes": torch.zeros(0, 8)}, ValueError, "prototypes must have at least one row"),
        ({"prototypes": torch.zeros(4, 8).double()}, TypeError, "prototypes and anchors must have the same dtype"),
        ({"temperature": 0.0}, ValueError, "temperature must be finite and not zero"),
        ({"target_sharpen_temperature": "a"}, TypeError, "target_sharpen_temperature must be a number, got str"),
        ({"sinkhorn_iterations": -1}, ValueError, "sinkhorn_iterations must be a whole number of at least 0, got -1"),
        ({"regularization_weight": None}, TypeError, "regularization_weight must be a number, got None"),
        ({"entropy_weight": "a"}, TypeError, "entropy_weight must be a number, got 'a'"),
        ({"gather_distributed": True}, RuntimeError, "needs an initialised process group"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"anchors": torch.zeros(12, 8), "targets": torch.zeros(6, 8), "prototypes": torch.eye(8)[:5], **wrong}
    for loss in (sslfast.msn, sslfast.pmsn):
        with pytest.raises(error, match=message):
            loss(**arguments)


def test_distributions_that_do_not_fit() -> None:
    inputs = embeddings((2, 6, 20, 8))
    for q, error, message in (
        ("uniform", TypeError, "target_distribution must be a tensor or a function, got str"),
        (torch.ones(19), ValueError, r"target_distribution must have shape \(20,\), got \(19,\)"),
        (lambda mean: mean.long(), TypeError, "target_distribution must be a floating-point tensor, got torch.int64"),
        (lambda mean: 0.05, TypeError, "target_distribution must be a floating-point tensor, got <class 'float'>"),
    ):
        with pytest.raises(error, match=message):
            sslfast.pmsn(*inputs, target_distribution=q)
    with pytest.raises(TypeError, match="power_law_exponent must be a number, got 'a'"):
        sslfast.PMSNLoss(power_law_exponent="a")


# ------------------------------------------------------------------------------------------------- the mean assignment


def test_mean_assignment() -> None:
    logits = torch.randn(7, 30, dtype=torch.float64)
    p = torch.softmax(logits / 0.2, 1)
    torch.testing.assert_close(sslfast.mean_assignment(logits, 0.2), p.mean(0))
    weights = torch.rand(7, dtype=torch.float64)
    torch.testing.assert_close(sslfast.mean_assignment(logits, 0.2, row_weights=weights), weights @ p)
    rows = torch.tensor([4])
    torch.testing.assert_close(sslfast.mean_assignment(logits, 0.2, rows=rows), p[:4].mean(0))
    found = sslfast.mean_assignment(logits, 0.2, row_weights=weights, rows=rows)
    torch.testing.assert_close(found, weights[:4] @ p[:4])
    assert sslfast.mean_assignment(logits[:0]).isnan().all()
    assert (sslfast.mean_assignment(logits[:0], row_weights=weights[:0]) == 0).all()


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, ValueError, r"logits must be \[B, K\], got shape \(2, 3, 4\)"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "with K at least 1, got shape"),
        ({"logits": torch.zeros(2, 3).long()}, TypeError, "logits must be float32"),
        ({"temperature": 0.0}, ValueError, "temperature must be finite and not zero"),
        ({"row_weights": torch.ones(2)}, ValueError, r"row_weights must have shape \(4,\), got \(2,\)"),
        ({"row_weights": [1.0] * 4}, TypeError, "row_weights must be a torch.Tensor, got list"),
        ({"rows": 2}, ValueError, "rows must be a tensor of one whole number, got 2"),
    ],
    ids=str,
)
def test_mean_assignment_of_what_does_not_fit(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sslfast.mean_assignment(**{"logits": torch.zeros(4, 3), **wrong})
