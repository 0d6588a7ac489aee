"""MMCR against lightly's and against singular values, matrices without full rank, second derivatives, wrong input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import Unavailable, peers
from helpers import GRAD_LOSS, roundings, value_and_gradients, within_budget
from sslfast.losses.decorrelation.mmcr import MMCRLoss, mmcr

# [B, k, D]: centroids wide and tall, views wide and tall, one sample, one view, one feature, one direction only.
SHAPES = [(5, 2, 30), (40, 2, 8), (9, 3, 4), (1, 2, 7), (6, 1, 5), (7, 2, 1), (12, 4, 8)]


def lightly(**options):
    try:
        return peers.lightly_loss("mmcr_loss", "MMCRLoss", **options)
    except Unavailable as reason:
        pytest.skip(f"lightly 1.6.0 cannot be imported: {reason}")


def networks(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shared = torch.randn(shape[0], 1, shape[2])
    return (shared + torch.randn(shape)).to(dtype), (shared + torch.randn(shape)).to(dtype)


def plain(online: Tensor, momentum: Tensor, lmda: float = 0.3) -> Tensor:
    z = torch.cat([online, momentum], dim=1)
    return lmda * torch.linalg.svdvals(z).sum() / len(z) - torch.linalg.svdvals(z.mean(1)).sum()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_lightly(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    inputs = networks(shape, dtype)
    kernel = value_and_gradients(MMCRLoss(0.3), *inputs)
    expected = value_and_gradients(lightly(lmda=0.3), *inputs)
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for a, b in zip(kernel, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula_in_single_precision(shape: tuple[int, int, int], scale: float) -> None:
    inputs = [scale * z for z in networks(shape, torch.float32)]
    kernel = value_and_gradients(lambda a, b: mmcr(a, b, 0.3), *inputs)
    reference = roundings(value_and_gradients, plain, *inputs)
    truth = value_and_gradients(plain, *(z.double() for z in inputs))
    for name, k, r, t in zip(("loss", "donline", "dmomentum"), kernel, reference, truth, strict=True):
        within_budget(name, k, r, t, torch.float32, scale if name == "loss" else 1e-3)


def test_gradient_without_full_rank() -> None:
    """Views twice, samples twice, and zeros: the least of the subgradients, U Vᵀ on the support alone."""
    online, _ = networks((6, 2, 5), torch.float32)
    online[1:4] = online[0]
    online[4] = 0
    momentum = online.clone()
    found = value_and_gradients(lambda a, b: mmcr(a, b, 0.3), online, momentum)
    z = torch.cat([online, momentum], dim=1).double()

    def least(x: Tensor) -> Tensor:
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        return (u * (s > 1e-6).to(s.dtype).unsqueeze(-2)) @ vh

    truth = GRAD_LOSS * (0.3 / len(z) * least(z) - least(z.mean(1)).unsqueeze(1) / z.shape[1])
    torch.testing.assert_close(found[0].double(), plain(online.double(), momentum.double()), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat(found[1:], dim=1).double(), truth, rtol=1e-4, atol=1e-5)
    zeros = torch.zeros(3, 2, 4)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in value_and_gradients(mmcr, zeros, zeros))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(dtype: torch.dtype) -> None:
    """lightly's SVD does not take them; squares that float16 cannot hold."""
    inputs = [300 * z for z in networks((8, 2, 6), dtype)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value_and_gradients(lambda a, b: mmcr(a, b, 0.3), *inputs)
    truth = value_and_gradients(plain, *(z.double() for z in inputs))
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype
    torch.testing.assert_close(found[0].double(), truth[0], rtol=1e-5, atol=0.0)
    for a, b in zip(found[1:], truth[1:], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("shape", [(3, 2, 6), (9, 3, 4)], ids=str)
def test_second_derivatives(shape: tuple[int, int, int]) -> None:
    inputs = tuple(z.requires_grad_() for z in networks(shape, torch.float64))
    assert torch.autograd.gradgradcheck(lambda a, b: mmcr(a, b, 0.3), inputs)


def test_third_derivative_is_refused() -> None:
    online, momentum = networks((3, 2, 6), torch.float64)
    (first,) = torch.autograd.grad(mmcr(online.requires_grad_(), momentum), online, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), online, create_graph=True)
    with pytest.raises(RuntimeError, match="third is not implemented"):
        torch.autograd.grad(second.sum(), online)


def test_compile_without_graph_breaks() -> None:
    inputs = networks((9, 2, 5), torch.float32)
    step = torch.compile(mmcr, fullgraph=True, backend="aot_eager")
    for a, b in zip(value_and_gradients(step, *inputs), value_and_gradients(mmcr, *inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("online", "momentum", "lmda", "error", "message"),
    [
        (torch.ones(4, 2, 3), torch.ones(4, 1, 3), 0.1, ValueError, r"online and momentum .*same shape"),
        (torch.ones(4, 2, 3), torch.ones(4, 2, 3).double(), 0.1, TypeError, r"online and momentum .*same dtype"),
        (torch.ones(4, 3), torch.ones(4, 3), 0.1, ValueError, r"online must have shape \[samples, views, features\]"),
        (torch.ones(4, 2, 3).int(), torch.ones(4, 2, 3).int(), 0.1, TypeError, r"online must be float32"),
        (torch.ones(4, 2, 3), torch.ones(4, 2, 3), -0.1, ValueError, r"lmda must be .*zero or more, got -0.1"),
    ],
)
def test_wrong_input(online, momentum, lmda: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mmcr(online, momentum, lmda)
