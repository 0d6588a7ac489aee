"""Barlow Twins against lightly's class and the written formula: value, gradients, degenerate and wrong input."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import helpers
import sslfast
from benchmarks import Unavailable, peers
from helpers import (
    DTYPES,
    VIEW_SHAPES,
    check_loss,
    same_nonfinite,
    value_and_gradients,
)
from sslfast.losses.decorrelation.barlow_twins import BarlowTwinsLoss, barlow_twins, cross_correlation_loss


def lightly(lambda_param: float = 0.005):
    try:
        return peers.lightly_loss("barlow_twins_loss", "BarlowTwinsLoss", lambda_param=lambda_param)
    except Unavailable as reason:
        pytest.skip(f"lightly 1.6.0 cannot be imported: {reason}")


def plain_terms(z_a: Tensor, z_b: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Equation 1, with C in memory."""
    a, b = ((z - z.mean(0)) / (z.var(0, correction=0) + eps).sqrt() for z in (z_a, z_b))
    c = a.T @ b / len(a)
    diagonal = c.diagonal()
    return (diagonal - 1).square().sum(), (c - diagonal.diag()).square().sum()


def plain(z_a: Tensor, z_b: Tensor, lambda_param: float = 0.005, eps: float = 1e-5) -> Tensor:
    on, off = plain_terms(z_a, z_b, eps)
    return on + lambda_param * off


two_views = functools.partial(helpers.two_views, largest=3.0, noise=0.5)


def check(function, formula, inputs: tuple[Tensor, ...]) -> None:
    # C has entries up to 1, and a gradient's terms before they cancel are GRAD_LOSS · C / std / N.
    check_loss(function, formula, inputs, terms=len(inputs[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", VIEW_SHAPES, ids=str)
def test_value_and_gradients(shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = two_views(shape, dtype)
    check(lambda a, b: barlow_twins(a, b, 0.05), lambda a, b: plain(a, b, 0.05), inputs)


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("shape", [(64, 64), (17, 90), (101, 30)], ids=str)
def test_terms_in_both_forms(shape: tuple[int, int], form: str) -> None:
    inputs = two_views(shape, torch.float32)
    for term in (0, 1):
        check(
            lambda a, b, term=term: cross_correlation_loss(a, b, eps=1e-2, form=form)[term],
            lambda a, b, term=term: plain_terms(a, b, 1e-2)[term],
            inputs,
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", VIEW_SHAPES, ids=str)
def test_equals_lightly(shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = two_views(shape, dtype)
    check(BarlowTwinsLoss(0.0051), lightly(0.0051), inputs)
    if dtype == torch.float64:
        for a, b in zip(
            value_and_gradients(BarlowTwinsLoss(), *inputs), value_and_gradients(lightly(), *inputs), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_mean_far_from_zero(form: str) -> None:
    """The mean's rounding is then a part of x̂ that no gradient may see."""
    inputs = tuple(z + 1000 for z in two_views((64, 80), torch.float32))
    check(lambda a, b: barlow_twins(a, b, form=form), plain, inputs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(64, 20), (12, 40)], ids=str)
def test_nonfinite_row(shape: tuple[int, int], bad: float) -> None:
    z_a, z_b = two_views(shape, torch.float32)
    z_a[1] = bad
    found, expected = (value_and_gradients(f, z_a, z_b) for f in (barlow_twins, lightly()))
    assert found[0].isnan()
    for name, f, e in zip(("loss", "dz_a", "dz_b"), found, expected, strict=True):
        same_nonfinite(name, f, e)


def test_half_precision_beyond_its_range() -> None:
    """At this size the sum of squares passes 65504, and lightly's value is infinite."""
    inputs = two_views((32, 1536), torch.float16)
    assert plain(*(z.double() for z in inputs), lambda_param=1.0) > 65504
    check(lambda a, b: barlow_twins(a, b, 1.0), lambda a, b: plain(a, b, 1.0), inputs)


def test_module_is_the_function() -> None:
    z_a, z_b = two_views((20, 6))
    options = {"scale_loss": 0.025, "eps": 1e-3, "statistics": "local", "form": "dual"}
    assert torch.equal(
        sslfast.BarlowTwinsLoss(0.01, False, **options)(z_a, z_b), barlow_twins(z_a, z_b, 0.01, **options)
    )
    torch.testing.assert_close(barlow_twins(z_a, z_b, scale_loss=0.025), 0.025 * plain(z_a, z_b))
    assert repr(BarlowTwinsLoss()) == (
        "BarlowTwinsLoss(lambda_param=0.005, gather_distributed=False, scale_loss=1.0, statistics='global')"
    )
