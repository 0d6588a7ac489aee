"""Alignment and uniformity against the formulas with every distance, and against lightly's class."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import Unavailable, peers
from helpers import GRAD_LOSS, roundings, value_and_gradients, within_budget
from sslfast.losses.contrastive.hypersphere import HypersphereLoss, alignment, hypersphere, uniformity

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def uniformity_by_formula(x: Tensor, t: float) -> Tensor:
    """The log of the mean, which the plain one would round to log 0 where every pair is far apart."""
    pairs = torch.pdist(x).pow(2).mul(-t)
    return pairs.logsumexp(0) - math.log(len(pairs))


def alignment_by_formula(x: Tensor, y: Tensor, alpha: float) -> Tensor:
    return (x - y).norm(dim=1).pow(alpha).mean()


def hypersphere_by_formula(z_a: Tensor, z_b: Tensor, t: float, lam: float, alpha: float) -> Tensor:
    # 16-bit rows are rounded to 16 bits again when they have been normalised, as in PyTorch.
    x, y = (F.normalize(z).to(torch.float64 if z.dtype == torch.float64 else torch.float32) for z in (z_a, z_b))
    spread = uniformity_by_formula(x, t) + uniformity_by_formula(y, t)
    return alignment_by_formula(x, y, alpha) + lam * spread / 2


def two_views(n: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rows of norms near 1, exactly representable in ``dtype``."""
    z_a = torch.randn(n, d, dtype=torch.float64) / d**0.5
    return z_a.to(dtype), (z_a + 0.5 * torch.randn(n, d, dtype=torch.float64) / d**0.5).to(dtype)


def check(
    ours, formula, inputs: tuple[Tensor, ...], floor: float, exponent: float = 1.0, normalizes: bool = False
) -> None:
    """Value and gradients within the error budget.

    ``floor`` is the size of a gradient's terms before they cancel. Exponents of size ``exponent`` are themselves
    differences, so that their rounding is that of this size.
    """
    dtype = inputs[0].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kernel = value_and_gradients(ours, *inputs)
    plain = roundings(value_and_gradients, formula, *(x if normalizes else x.to(wide) for x in inputs))
    truth = value_and_gradients(formula, *(x.double() for x in inputs))
    assert kernel[0].dtype == wide and all(k.dtype == dtype for k in kernel[1:])
    for i, (k, p, t) in enumerate(zip(kernel, plain, truth, strict=True)):
        within_budget(f"input {i}" if i else "loss", k, p.to(k.dtype), t, dtype, floor * exponent if i else exponent)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t", [2.0, 40.0])
@pytest.mark.parametrize("shape", [(64, 64), (127, 61), (2, 5), (33, 1), (230, 24)], ids=str)
def test_uniformity_of_rows_of_any_norm(shape: tuple[int, int], t: float, dtype: torch.dtype) -> None:
    x, _ = two_views(*shape, dtype)
    largest = x.double().norm(dim=1).max().item()
    floor, exponent = GRAD_LOSS * 4 * t * largest / shape[0], max(1.0, 2 * t * largest**2)
    check(lambda x: uniformity(x, t), lambda x: uniformity_by_formula(x, t), (x,), floor, exponent)


@pytest.mark.parametrize("zeros", [1, 2, 5], ids=["one", "a pair", "all but one"])
@pytest.mark.parametrize("t", [0.5, 30.0])
def test_rows_of_zeros(t: float, zeros: int) -> None:
    """They have no direction: normalised they stay zero, at distance 1 from the others and 0 from one another."""
    x, y = two_views(6, 5, torch.float64)
    x[:zeros] = 0
    got = value_and_gradients(lambda x: uniformity(x, t, normalize=True), x)
    expected = value_and_gradients(lambda x: uniformity_by_formula(F.normalize(x), t), x)
    torch.testing.assert_close(got, expected)
    step = torch.compile(lambda x: uniformity(x, t, normalize=True), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(x), expected[0])  # a graph is made without looking at the rows
    torch.testing.assert_close(hypersphere(x, y, t), hypersphere_by_formula(x, y, t, 1.0, 2.0))


def test_uniformity_beyond_the_range_of_exp() -> None:
    """A Gaussian potential that is zero in float32: its log is finite all the same."""
    x = torch.stack([torch.ones(40), -torch.ones(40)])  # a distance of √160, of 2 when normalised
    torch.testing.assert_close(uniformity(x, 2.0), torch.tensor(-320.0))
    torch.testing.assert_close(uniformity(x, 60.0, normalize=True), torch.tensor(-240.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("t", "lam", "alpha"), [(1.0, 1.0, 2.0), (2.0, 0.3, 1.0), (30.0, 1.0, 3.0)])
@pytest.mark.parametrize("shape", [(64, 64), (127, 61), (2, 5)], ids=str)
def test_hypersphere(shape: tuple[int, int], t: float, lam: float, alpha: float, dtype: torch.dtype) -> None:
    inputs = two_views(*shape, dtype)
    floor = GRAD_LOSS * (2**alpha + 4 * t) / shape[0] / min(z.double().norm(dim=1).min().item() for z in inputs)
    check(
        HypersphereLoss(t, lam, alpha),
        lambda a, b: hypersphere_by_formula(a, b, t, lam, alpha),
        inputs,
        floor,
        normalizes=True,
    )


@pytest.mark.parametrize("options", [{}, {"t": 2.0, "lam": 0.5, "alpha": 1.0}], ids=str)
def test_equals_lightly(options: dict[str, float]) -> None:
    try:
        peers.nt_xent("lightly", 0.5)  # makes torchvision importable, which lightly.loss needs
        theirs = importlib.import_module("lightly.loss.hypersphere_loss").HypersphereLoss(**options)
    except Unavailable as reason:
        pytest.skip(f"lightly 1.6.0 cannot be imported: {reason}")
    inputs = two_views(50, 20, torch.float64)
    got, expected = (value_and_gradients(f, *inputs) for f in (HypersphereLoss(**options), theirs))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", [1.0, 2.0, 2.5])
def test_alignment(alpha: float) -> None:
    x, y = two_views(30, 12)
    y[3] = x[3]  # the gradient of a distance of zero
    check(lambda x, y: alignment(x, y, alpha), lambda x, y: alignment_by_formula(x, y, alpha), (x, y), GRAD_LOSS / 30)
    unit = alignment(F.normalize(x), F.normalize(y), alpha)
    torch.testing.assert_close(alignment(x, y, alpha, normalize=True), unit)


def test_uniformity_normalises() -> None:
    x, _ = two_views(30, 12, torch.float64)
    got = value_and_gradients(lambda x: uniformity(x, normalize=True), x)
    expected = value_and_gradients(lambda x: uniformity_by_formula(F.normalize(x), 2.0), x)
    torch.testing.assert_close(got, expected)


def test_compile_without_graph_breaks() -> None:
    def both(a: Tensor, b: Tensor) -> Tensor:
        return hypersphere(a, b) + uniformity(a)

    inputs = two_views(30, 12)
    step = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_gradients(step, *inputs), value_and_gradients(both, *inputs))


def test_wrong_input() -> None:
    x = torch.ones(4, 3)
    for call, message in (
        (lambda: uniformity(x[:1]), "at least two rows, got 1"),
        (lambda: uniformity(x, 0.0), r"t must be a positive finite number, got 0\.0"),
        (lambda: uniformity(x[0]), "x must be two-dimensional"),
        (lambda: alignment(x, x[:2]), "x and y must have the same shape"),
        (lambda: alignment(x, x, -1.0), "alpha must be a positive"),
        (lambda: hypersphere(x, x[:, :2]), "z_a and z_b must have the same shape"),
        (lambda: HypersphereLoss(t=float("nan")), "t must be a positive"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
