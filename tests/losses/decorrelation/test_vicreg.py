"""VICReg and its three terms against lightly's, pytorch-metric-learning's and the written formula; wrong input."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from benchmarks import Unavailable, peers
from helpers import (
    DTYPES,
    VIEW_SHAPES,
    check_loss,
    same_nonfinite,
    same_value_and_gradients,
    two_views,
    value_and_gradients,
)
from sslfast.losses.decorrelation.vicreg import VICRegLoss, covariance_loss, invariance_loss, variance_loss, vicreg

SHAPES = [*VIEW_SHAPES, (24, 3, 10), (9, 2, 3, 20)]  # places between rows and features
WEIGHTS = (2.0, 3.0, 0.5)  # all terms of a size


def lightly(name: str = "VICRegLoss", *arguments):
    """The class, made with ``arguments``, or one of the functions of its file."""
    try:
        loss = peers.lightly_loss("vicreg_loss", "VICRegLoss")
    except Unavailable as reason:
        pytest.skip(f"lightly 1.6.0 cannot be imported: {reason}")
    found = getattr(importlib.import_module(type(loss).__module__), name)
    return found(*arguments) if name == "VICRegLoss" else found


def metric_learning(**options: float):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    loss = losses.VICRegLoss(**options)
    return lambda a, b: loss(a, ref_emb=b)


def plain(z_a: Tensor, z_b: Tensor, weights=WEIGHTS, eps: float = 1e-4, views: int = 2) -> Tensor:
    """Equation 6 with the covariance matrices in memory; ``views`` divides the variances."""
    n, d = z_a.shape[0], z_a.shape[-1]
    loss = weights[0] * (z_a - z_b).square().mean()
    for z in (z_a, z_b):
        loss = loss + weights[1] / views * F.relu(1 - (z.var(0) + eps).sqrt()).mean()
        centred = z.flatten(1, -2).transpose(0, 1) if z.dim() > 2 else z[None]  # [P, N, D]
        centred = centred - centred.mean(1, keepdim=True)
        cov = centred.mT @ centred / (n - 1)
        loss = loss + weights[2] / d * (cov - cov.diagonal(dim1=1, dim2=2).diag_embed()).square().sum() / len(cov)
    return loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_loss(lambda a, b: vicreg(a, b, *WEIGHTS), plain, two_views(shape, dtype))


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)], ids=str)
def test_terms_in_both_forms(weights: tuple[float, ...], form: str) -> None:
    for shape in ((64, 64), (17, 90), (101, 30)):
        for reduction, views in (("mean", 2), ("sum", 1)):
            check_loss(
                lambda a, b, r=reduction: vicreg(a, b, *weights, eps=1e-2, variance_reduction=r, form=form),
                lambda a, b, views=views: plain(a, b, weights, 1e-2, views),
                two_views(shape, torch.float32),
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_lightly(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = two_views(shape, dtype)
    check_loss(VICRegLoss(), lightly("VICRegLoss"), inputs)
    weights = (*WEIGHTS, False, 1e-3)
    check_loss(VICRegLoss(*weights), lightly("VICRegLoss", *weights), inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_functions_equal_lightly(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    z_a, z_b = two_views(shape, dtype)
    check_loss(invariance_loss, lightly("invariance_loss"), (z_a, z_b))
    check_loss(covariance_loss, lightly("covariance_loss"), (z_a,))
    check_loss(lambda x: variance_loss(x, 1e-2), lambda x: lightly("variance_loss")(x, 1e-2), (z_a,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(64, 20), (12, 40)], ids=str)
def test_equals_metric_learning(shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = two_views(shape, dtype)
    check_loss(vicreg, metric_learning(), inputs)
    theirs = metric_learning(invariance_lambda=2.0, variance_mu=3.0, covariance_v=0.5, eps=1e-3)
    check_loss(lambda a, b: vicreg(a, b, *WEIGHTS, eps=1e-3), theirs, inputs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(64, 20), (12, 40)], ids=str)
def test_nonfinite_row(shape: tuple[int, int], bad: float) -> None:
    z_a, z_b = two_views(shape, torch.float32)
    z_a[1] = bad
    found, expected = (value_and_gradients(f, z_a, z_b) for f in (vicreg, lightly()))
    assert not expected[0].isfinite()
    for f, e in zip(found, expected, strict=True):
        # Nothing that is not finite is hidden. (A kernel may lose more of dz_b than the one row that lightly loses.)
        assert not f[~e.isfinite()].isfinite().any()
    for ours, theirs in ((variance_loss, "variance_loss"), (covariance_loss, "covariance_loss")):
        same_nonfinite(theirs, ours(z_a), lightly(theirs)(z_a))


def test_half_precision_beyond_its_range() -> None:
    """Covariances whose squares pass 65504, and columns whose sums do: lightly's value is infinite."""
    large = tuple((30 * torch.randn(32, 2048)).half() for _ in range(2))
    assert plain(*(z.double() for z in large), (0.0, 0.0, 1.0)) > 65504
    check_loss(lambda a, b: vicreg(a, b, *WEIGHTS), plain, large)
    offset = two_views((64, 12), torch.float64)[0].mul(0.5).add(3000).half()
    check_loss(variance_loss, lambda x: F.relu(1 - (x.var(0) + 1e-4).sqrt()).mean(), (offset,))
    far = tuple((z * 1e3).half() for z in two_views((16, 4)))
    check_loss(invariance_loss, F.mse_loss, far)


def test_module_is_the_function() -> None:
    z_a, z_b = two_views((20, 6))
    options = {"variance_reduction": "sum", "form": "dual"}
    module = sslfast.VICRegLoss(2.0, 3.0, 0.5, False, 1e-3, **options)
    assert torch.equal(module(z_a, z_b), vicreg(z_a, z_b, 2.0, 3.0, 0.5, eps=1e-3, **options))
    assert repr(VICRegLoss()) == (
        "VICRegLoss(lambda_param=25.0, mu_param=25.0, nu_param=1.0, gather_distributed=False, "
        "eps=0.0001, variance_reduction='mean', invariance='global')"
    )


@pytest.mark.parametrize("shape", [(31, 40), (9, 3, 5)], ids=str)
def test_local_invariance_in_one_process(shape: tuple[int, ...]) -> None:
    same_value_and_gradients(VICRegLoss(invariance="local"), vicreg, *two_views(shape))
