"""VIbCReg against the formula of solo-learn's function, written out; degenerate and wrong input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from helpers import (
    DTYPES,
    VIEW_SHAPES,
    check_loss,
    same_nonfinite,
    two_views,
    value_and_gradients,
)
from sslfast.losses.decorrelation.vibcreg import VIbCRegLoss, vibcreg


def plain(z_a: Tensor, z_b: Tensor, weights=(25.0, 25.0, 200.0), eps: float = 1e-4) -> Tensor:
    loss = weights[0] * F.mse_loss(z_a, z_b)
    for z in (z_a, z_b):
        loss = loss + weights[1] * F.relu(1 - (z.var(0) + eps).sqrt()).mean()
        unit = F.normalize(z - z.mean(0), dim=0)
        correlation = unit.T @ unit
        loss = loss + weights[2] * (correlation - correlation.diagonal().diag()).square().mean()
    return loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", VIEW_SHAPES, ids=str)
def test_value_and_gradients(shape: tuple[int, int], dtype: torch.dtype) -> None:
    # Of two rows every correlation is ±1: its gradient's terms, weight / ‖column‖, cancel to nothing but rounding.
    check_loss(vibcreg, plain, two_views(shape, dtype), floor=25.0 if shape[0] > 2 else 200 / 0.1)


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)], ids=str)
def test_terms_in_both_forms(weights: tuple[float, ...], form: str) -> None:
    for shape in ((64, 64), (17, 90), (101, 30)):
        check_loss(
            lambda a, b: vibcreg(a, b, *weights, eps=1e-2, form=form),
            lambda a, b: plain(a, b, weights, 1e-2),
            two_views(shape, torch.float32),
        )


@pytest.mark.parametrize("shape", [(64, 20), (16, 40)], ids=str)
def test_constant_columns(shape: tuple[int, int]) -> None:
    """The mean of as many equal numbers as a power of two is exact, so such a column stays zero, as in the formula."""
    z_a, z_b = two_views(shape, torch.float32)
    z_a[:, 3] = 0.5
    z_b[:, 3:5] = -7.0
    kernel = value_and_gradients(vibcreg, z_a, z_b)
    for k, t in zip(kernel, value_and_gradients(plain, z_a.double(), z_b.double()), strict=True):
        torch.testing.assert_close(k, t.float(), rtol=1e-4, atol=1e-5 * t.abs().max().item())


def test_correlation_does_not_depend_on_size() -> None:
    z_a, z_b = two_views((20, 6))
    torch.testing.assert_close(vibcreg(1e-8 * z_a, z_b / 3, 0.0, 0.0, 1.0), vibcreg(z_a, z_b, 0.0, 0.0, 1.0))


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_mean_far_from_zero(form: str) -> None:
    """The mean's rounding is then a part of x̂ that no gradient may see."""
    inputs = tuple(z + 1000 for z in two_views((64, 80), torch.float32))
    check_loss(lambda a, b: vibcreg(a, b, form=form), plain, inputs, floor=25.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(64, 20), (12, 40)], ids=str)
def test_nonfinite_row(shape: tuple[int, int], bad: float) -> None:
    z_a, z_b = two_views(shape, torch.float32)
    z_a[1] = bad
    found, expected = (value_and_gradients(f, z_a, z_b) for f in (vibcreg, plain))
    assert found[0].isnan()
    for name, f, e in zip(("loss", "dz_a", "dz_b"), found, expected, strict=True):
        same_nonfinite(name, f, e)


def test_half_precision_beyond_its_range() -> None:
    """Sums of squares of the columns, and of the distance, that pass 65504."""
    check_loss(vibcreg, plain, tuple((300 * torch.randn(32, 200)).half() for _ in range(2)), floor=25.0)


def test_module_is_the_function() -> None:
    z_a, z_b = two_views((20, 6))
    module = sslfast.VIbCRegLoss(2.0, 3.0, 0.5, False, 1e-3, form="dual")
    assert torch.equal(module(z_a, z_b), vibcreg(z_a, z_b, 2.0, 3.0, 0.5, eps=1e-3, form="dual"))
    assert repr(VIbCRegLoss()) == (
        "VIbCRegLoss(sim_loss_weight=25.0, var_loss_weight=25.0, cov_loss_weight=200.0, gather_distributed=False)"
    )
