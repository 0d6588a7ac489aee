"""MACL against lightly's and against the formula, degenerate batches, and wrong input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers import check_loss, roundings, same_value_and_gradients, two_views, value_and_gradients, within_budget
from lightly_common import lightly_loss
from sslfast.losses.contrastive.macl import MACLLoss, macl
from sslfast.losses.contrastive.nt_xent import nt_xent


def plain(
    z0: Tensor, z1: Tensor, temperature: float | Tensor = 0.1, alpha: float = 0.5, threshold: float = 0.0
) -> Tensor:
    z = torch.cat([F.normalize(z0), F.normalize(z1)])
    n = len(z0)
    s = z @ z.T
    positive = s.diagonal(n).repeat(2)
    tau = temperature * (1 + alpha * (positive.mean().detach() - threshold))
    itself = torch.eye(2 * n, dtype=torch.bool)
    log_p = positive / tau - (s / tau).masked_fill(itself, -torch.inf).logsumexp(1)
    return (-log_p / (1 - log_p.detach().exp() + 1e-8)).mean()


OPTIONS = [(0.1, 0.5, 0.0), (0.5, 1.0, 0.3), (0.05, 0.0, 1.0)]


@pytest.mark.parametrize("shape", [(2, 3), (64, 32), (101, 30)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_lightly(options: tuple[float, float, float], shape: tuple[int, int]) -> None:
    theirs = lightly_loss("macl_loss").MACLLoss(*options)
    same_value_and_gradients(MACLLoss(*options), theirs, *two_views(shape, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (33, 17)], ids=str)
def test_dtypes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_loss(lambda a, b: macl(a, b, 0.3), lambda a, b: plain(a, b, 0.3), two_views(shape, dtype), floor=10)


def test_a_temperature_that_learns() -> None:
    inputs = (*two_views((40, 12), torch.float32), torch.tensor(0.2))
    kernel = value_and_gradients(macl, *inputs)
    single = roundings(value_and_gradients, plain, *inputs)
    truth = value_and_gradients(plain, *(t.double() for t in inputs))
    for name, k, r, t in zip(("loss", "dz0", "dz1", "dtau"), kernel, single, truth, strict=True):
        within_budget(name, k, r, t, torch.float32, 5.0 if name in ("loss", "dtau") else 0.1)


def test_without_following_the_weights_are_left() -> None:
    """α = 0 and one P in all rows: NT-Xent over 1 − P."""
    z = torch.eye(4, dtype=torch.float64)
    loss = nt_xent(z, z, 0.5)
    torch.testing.assert_close(macl(z, z, 0.5, alpha=0), loss / (1 - (-loss).exp() + 1e-8))


def test_one_image_has_nothing_to_contrast() -> None:
    z0, z1 = (z.requires_grad_() for z in two_views((1, 5), torch.float32))
    loss = macl(z0, z1)
    loss.backward()
    assert loss == 0 and not z0.grad.any() and not z1.grad.any()


def test_equal_rows() -> None:
    z0, z1 = (torch.ones(6, 4, requires_grad=True) for _ in range(2))
    loss = macl(z0, z1)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(11.0).log() / (1 - 1 / 11))
    torch.testing.assert_close(z0.grad, torch.zeros(6, 4), rtol=0, atol=1e-5)


def test_no_number_comes_out_of_nan() -> None:
    z0, z1 = two_views((6, 4), torch.float32)
    z0[2, 1] = float("nan")
    assert macl(z0, z1).isnan()


def test_diagnostics_are_those_of_nt_xent_at_its_temperature() -> None:
    z0, z1 = two_views((20, 6), torch.float64)
    loss, found = MACLLoss(0.2, diagnostics=True)(z0, z1)
    torch.testing.assert_close(loss, macl(z0, z1, 0.2))
    alignment = F.cosine_similarity(z0, z1).mean()
    torch.testing.assert_close(found.positive_similarity, alignment)


def test_second_derivatives() -> None:
    """Those of the formula: what is constant there is here."""
    inputs, found = [z.requires_grad_() for z in two_views((4, 3), torch.float64)], []
    for function in (macl, plain):
        first = torch.autograd.grad(function(*inputs, 0.5), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for mine, true in zip(*found, strict=True):
        torch.testing.assert_close(mine, true)


def test_compile_without_graph_breaks() -> None:
    inputs = (*two_views((20, 6), torch.float32), torch.tensor(0.2))
    step = torch.compile(lambda a, b, t: macl(a, b, t), fullgraph=True, backend="aot_eager")
    for a, b in zip(value_and_gradients(step, *inputs), value_and_gradients(macl, *inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature .*not zero"),
        ({"alpha": 1.5}, r"alpha must be between 0 and 1, got 1\.5"),
        ({"A_0": -0.1}, r"A_0 must be between 0 and 1, got -0\.1"),
        ({"A_0": float("nan")}, "A_0 must be between 0 and 1, got nan"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        macl(torch.ones(4, 3), torch.ones(4, 3), **options)
    with pytest.raises(ValueError, match=message):
        MACLLoss(**options)
