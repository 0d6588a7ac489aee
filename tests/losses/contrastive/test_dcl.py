"""Decoupled losses against lightly's and against the formula, and wrong input."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import Unavailable, peers
from helpers import roundings, value_and_gradients, within_budget
from sslfast.losses.contrastive.dcl import DCLLoss, DCLWLoss, dcl, dclw


def lightly(name: str, **options):
    try:
        peers.nt_xent("lightly", 0.5)  # declares torchvision's operators first, where its wheel needs that
    except Unavailable as reason:
        pytest.skip(f"lightly 1.6.0 cannot be imported: {reason}")
    return getattr(importlib.import_module("lightly.loss.dcl_loss"), name)(**options)


def two_views(n: int, d: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    z0 = torch.randn(n, d)
    return z0.to(dtype), (z0 + torch.randn(n, d)).to(dtype)


def plain(z0: Tensor, z1: Tensor, tau: Tensor, sigma: float | None = None) -> Tensor:
    """Equation 6 as a mean over the 2N rows."""
    z0, z1 = F.normalize(z0), F.normalize(z1)
    n, z = len(z0), torch.cat([z0, z1])
    s = z @ z.T / tau
    positive = s.diagonal(n).repeat(2)
    sample = torch.arange(2 * n) % n
    lse = s.masked_fill(sample[:, None] == sample[None], -torch.inf).logsumexp(1)
    weights = torch.ones(n)
    if sigma is not None:
        weights = 2 - n * ((z0 * z1).sum(1) / sigma).softmax(0).detach()
    return (lse - weights.repeat(2) * positive).mean()


def distance(out0: Tensor, out1: Tensor) -> Tensor:
    return (out0[:, 0] - 0.5 * out1[:, 1]).square() + 1  # not symmetric, and differentiable


@pytest.mark.parametrize("shape", [(1, 8), (2, 3), (64, 32), (101, 30)], ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [(DCLLoss, "DCLLoss", {}), (DCLLoss, "DCLLoss", {"weight_fn": distance}), (DCLWLoss, "DCLWLoss", {"sigma": 0.3})],
    ids=["dcl", "dcl weighted", "dclw"],
)
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # lightly's
def test_equals_lightly(ours, theirs: str, options: dict, temperature: float, shape: tuple[int, int]) -> None:
    inputs = two_views(*shape)
    kernel = value_and_gradients(ours(temperature, **options), *inputs)
    expected = value_and_gradients(lightly(theirs, temperature=temperature, **options), *inputs)
    for a, b in zip(kernel, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tau", [0.1, 0.01])
@pytest.mark.parametrize("sigma", [None, 0.5])
def test_single_precision(sigma: float | None, tau: float) -> None:
    inputs = (*two_views(75, 20, torch.float32), torch.tensor(tau))
    formula = lambda z0, z1, t: plain(z0, z1, t, sigma)  # noqa: E731
    kernel = value_and_gradients(dcl if sigma is None else dclw, *inputs)
    single = roundings(value_and_gradients, formula, *inputs)
    truth = value_and_gradients(formula, *(t.double() for t in inputs))
    for name, k, r, t in zip(("loss", "dz0", "dz1", "dtau"), kernel, single, truth, strict=True):
        within_budget(name, k, r, t, torch.float32, 1 / tau if name in ("loss", "dtau") else 0.1)


def test_not_normalised() -> None:
    z0, z1 = (F.normalize(z) for z in two_views(20, 6))
    torch.testing.assert_close(dcl(3 * z0, 3 * z1, 0.2, normalize=False), dcl(z0, z1, 0.2 / 9))


def test_diagnostics() -> None:
    z0, z1 = (F.normalize(z) for z in two_views(20, 6))
    for function, module in ((dcl, DCLLoss), (dclw, DCLWLoss)):
        loss, found = module(0.2, diagnostics=True)(z0, z1)
        torch.testing.assert_close(loss, function(z0, z1, 0.2))
        z, sample = torch.cat([z0, z1]), torch.arange(40) % 20
        s = (z @ z.T).masked_fill(sample[:, None] == sample[None], -torch.inf)
        positive = (z0 * z1).sum(1).repeat(2)
        torch.testing.assert_close(found.accuracy, (positive > s.amax(1)).double().mean())
        torch.testing.assert_close(found.hardest_negative_similarity, s.amax(1).mean())
        pairs = s[s.isfinite()]
        torch.testing.assert_close(found.uniformity_at_temperature, (-2.5 * (2 - 2 * pairs)).exp().mean().log())


def test_compile_without_graph_breaks() -> None:
    inputs = (*two_views(20, 6, torch.float32), torch.tensor(0.2))
    for function in (dcl, dclw):
        step = torch.compile(lambda a, b, t, f=function: f(a, b, t), fullgraph=True, backend="aot_eager")
        for a, b in zip(value_and_gradients(step, *inputs), value_and_gradients(function, *inputs), strict=True):
            torch.testing.assert_close(a, b)


def test_module_is_the_function() -> None:
    z0, z1 = two_views(20, 6)
    learns = torch.nn.Parameter(torch.tensor(0.2))
    module = DCLWLoss(learns, sigma=0.4)
    module(z0, z1).backward()
    assert torch.equal(DCLWLoss(0.2, 0.4)(z0, z1), dclw(z0, z1, 0.2, sigma=0.4))
    assert list(module.state_dict()) == ["temperature"] and learns.grad != 0


@pytest.mark.parametrize(
    ("z0", "z1", "options", "error", "message"),
    [
        (torch.ones(4, 3), torch.ones(4, 2), {}, ValueError, r"z0 and z1 .*same shape"),
        (torch.ones(4, 3), torch.ones(4, 3), {"temperature": 0.0}, ValueError, r"temperature .*not zero"),
        (
            torch.ones(4, 3),
            torch.ones(4, 3),
            {"weight_fn": lambda a, b: a},
            ValueError,
            r"weight_fn .*\(4,\).*\(4, 3\)",
        ),
    ],
)
def test_wrong_input(z0, z1, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dcl(z0, z1, **options)


def test_wrong_sigma() -> None:
    with pytest.raises(ValueError, match="sigma must be positive, got 0"):
        DCLWLoss(sigma=0)
