"""FroSSL against lightly's and against the formula, for two views and more; wrong input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import Unavailable, peers
from helpers import roundings, value_and_gradients, within_budget
from sslfast.losses.decorrelation.frossl import FroSSLLoss, frossl

SHAPES = [(64, 32), (20, 50), (33, 33), (7, 5), (1, 8), (4, 1)]  # (20, 50): fewer rows than features


def lightly(**options):
    try:
        return peers.lightly_loss("frossl_loss", "FroSSLLoss", **options)
    except Unavailable as reason:
        pytest.skip(f"lightly 1.6.0 cannot be imported: {reason}")


def views(count: int, n: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    shared = 1 + torch.randn(n, d)  # a mean that centring would take away
    return [(shared + torch.randn(n, d)).to(dtype) for _ in range(count)]


def plain(*z_views: Tensor, weight: float = 1.0) -> Tensor:
    unit = [F.normalize(z, dim=0) for z in z_views]
    mean = torch.stack(unit).mean(0)
    loss = torch.zeros((), dtype=mean.dtype)
    for z in unit:
        moment = z.T @ z
        loss = loss + 2 * (torch.linalg.matrix_norm(moment) / moment.trace().detach()).log()
        loss = loss + weight * len(unit) / len(z) * (z - mean).square().sum()
    return loss


def check(function, formula, inputs: list[Tensor]) -> None:
    kernel = value_and_gradients(function, *inputs)
    reference = roundings(value_and_gradients, formula, *inputs)
    truth = value_and_gradients(formula, *(z.double() for z in inputs))
    # A column's gradient cancels before it is divided by the column's norm, of one row entirely.
    norms = torch.cat([z.double().norm(dim=0) for z in inputs])
    floor = max(1.0, 1 / norms[norms > 0].min().item())
    for i, (k, r, t) in enumerate(zip(kernel, reference, truth, strict=True)):
        within_budget("loss" if i == 0 else f"dz{i - 1}", k, r, t, inputs[0].dtype, floor)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_lightly(dtype: torch.dtype, count: int, shape: tuple[int, int]) -> None:
    inputs = views(count, *shape, dtype)
    theirs, ours = lightly(invariance_weight=0.7), FroSSLLoss(0.7)
    check(lambda *z: ours(list(z)), lambda *z: theirs(list(z)), inputs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_formula(dtype: torch.dtype, count: int, shape: tuple[int, int]) -> None:
    check(lambda *z: frossl(z), plain, views(count, *shape, dtype))


def test_small_columns() -> None:
    """Small features count as any other; below a norm of 1e-12, and dead, they leave the trace, a constant."""
    sizes = torch.tensor([1.0, 1e-9, 1e-13, 0.0], dtype=torch.float64)
    inputs = [z * sizes for z in views(2, 9, 4, torch.float64)]
    kernel = value_and_gradients(lambda *z: frossl(z), *inputs)
    expected = value_and_gradients(plain, *inputs)
    torch.testing.assert_close(kernel[0], expected[0])
    for a, b in zip(kernel[1:], expected[1:], strict=True):
        largest = b.abs().amax(0).clamp_min(1e-300)  # column by column: they differ by 13 orders of magnitude
        torch.testing.assert_close(a / largest, b / largest, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(dtype: torch.dtype) -> None:
    """Norms of columns that float16 cannot hold."""
    inputs = [3e4 * z for z in views(2, 64, 8, dtype)]
    inputs = [z.clamp(-6e4, 6e4) for z in inputs]
    found = value_and_gradients(lambda *z: frossl(z), *inputs)
    truth = value_and_gradients(plain, *(z.double() for z in inputs))
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype
    torch.testing.assert_close(found[0].double(), truth[0], rtol=1e-5, atol=1e-5)
    wide = value_and_gradients(lambda *z: frossl(z), *(z.float() for z in inputs))
    for a, b in zip(wide, truth, strict=True):  # in float32: the gradients are below what float16 holds
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-5 * b.abs().max().item())


def test_twice_differentiable() -> None:
    inputs = tuple(z.requires_grad_() for z in views(3, 6, 4, torch.float64))
    assert torch.autograd.gradgradcheck(lambda *z: frossl(z, 0.5), inputs)


def test_compile_without_graph_breaks() -> None:
    inputs = views(3, 20, 6, torch.float32)
    step = torch.compile(lambda *z: frossl(z, 0.5), fullgraph=True, backend="aot_eager")
    expected = value_and_gradients(lambda *z: frossl(z, 0.5), *inputs)
    for a, b in zip(value_and_gradients(step, *inputs), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("z_views", "error", "message"),
    [
        ([torch.ones(4, 3)], ValueError, r"z_views must contain at least two views, got 1"),
        (torch.ones(2, 4, 3), TypeError, r"z_views must be a list"),
        ([torch.ones(4, 3), torch.ones(4, 2)], ValueError, r"z_views\[0\] and z_views\[1\] .*same shape"),
        ([torch.ones(4, 3), torch.ones(4, 3).double()], TypeError, r"z_views\[0\] and z_views\[1\] .*same dtype"),
        ([torch.ones(4, 3), torch.ones(4)], ValueError, r"z_views\[1\] must be two-dimensional"),
    ],
)
def test_wrong_input(z_views, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FroSSLLoss()(z_views)
