"""EMP-SSL against lightly's and against the D × D determinant, on both sides of the border; degenerate batches."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from benchmarks import Unavailable, peers
from helpers import DTYPES, GRAD_LOSS, Sizes, roundings, same_value_and_gradients, value_and_gradients, within_budget
from sslfast import EMPSSLLoss, emp_ssl

# Fewer rows than features, as many and one off, more; one row, one feature.
SHAPES = [(20, 50), (33, 33), (33, 34), (34, 33), (70, 24), (1, 8), (9, 1)]


def lightly(**options):
    try:
        return peers.lightly_loss("emp_ssl_loss", "EMPSSLLoss", **options)
    except Unavailable as reason:
        pytest.skip(f"lightly 1.6.0 cannot be imported: {reason}")


def views(count: int, n: int, d: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shared = torch.randn(n, d, dtype=torch.float64)
    return [F.normalize(shared + torch.randn(n, d), dim=1).to(dtype) for _ in range(count)]


def plain(*z_views: Tensor, eps: float = 0.2, coef: float = 200.0, sign: float = 1.0) -> Tensor:
    z = torch.stack(z_views)
    _, n, d = z.shape
    identity = torch.eye(d, dtype=z.dtype)
    rate = 0.5 * torch.logdet(identity + d / (n * eps) * z.mT @ z).mean()
    return sign * rate - coef * F.cosine_similarity(z, z.mean(0, keepdim=True), dim=2).mean()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("options", [{}, {"tcr_eps": 0.7, "inv_coef": -3}], ids=str)
def test_equals_lightly(options: dict, count: int, shape: tuple[int, int]) -> None:
    theirs, ours = lightly(**options), EMPSSLLoss(**options)
    same_value_and_gradients(lambda *z: ours(list(z)), lambda *z: theirs(list(z)), *views(count, *shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("convention", "sign"), [("lightly", 1.0), ("paper", -1.0)])
def test_formula(convention: str, sign: float, shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = views(3, *shape, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    formula = partial(plain, eps=0.3, coef=20.0, sign=sign)
    kernel = value_and_gradients(lambda *z: emp_ssl(z, 0.3, 20.0, convention=convention), *inputs)
    reference = roundings(value_and_gradients, formula, *(z.to(wide) for z in inputs))
    truth = value_and_gradients(formula, *(z.double() for z in inputs))
    assert kernel[0].dtype == wide and kernel[1].dtype == dtype
    for i, (k, r, t) in enumerate(zip(kernel, reference, truth, strict=True)):
        # Of a gradient c A⁻¹ z what is along the large directions cancels.
        floor = 20.0 if i == 0 else GRAD_LOSS * max(20.0, shape[1] / 0.3) / inputs[0].shape[0]
        within_budget("loss" if i == 0 else f"dz{i - 1}", k, r.to(k.dtype), t, dtype, floor)


@pytest.mark.parametrize("scale", [1.0, 1e3], ids=str)
@pytest.mark.parametrize("shape", [(8, 24), (24, 8)], ids=str)
def test_without_full_rank(shape: tuple[int, int], scale: float) -> None:
    """Rows that are all the same, zeros, and columns that depend on each other: the identity is what is left of them.

    In float32 a norm of 1e3 leaves nothing of it, and the Gram matrix of equal rows would not be positive definite.
    """
    z = [scale * v for v in views(2, *shape, torch.float32)]
    z[0][:] = z[0][0]
    z[1][3:] = 0
    z[1][:, 1] = z[1][:, 0]
    kernel = value_and_gradients(lambda *z: emp_ssl(z), *z)
    truth = value_and_gradients(plain, *(v.double() for v in z))
    torch.testing.assert_close(kernel[0].double(), truth[0], rtol=1e-6, atol=1e-6)
    learning = z[1][:, 0] != 0  # the gradient of a row of zeros is divided by the smallest norm
    for mine, true in zip(kernel[1:], truth[1:], strict=True):
        mine, true = mine.double()[learning], true[learning]
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5 * true.abs().max().item())


def test_zeros() -> None:
    loss = emp_ssl([torch.zeros(5, 3, requires_grad=True)] * 2)
    assert loss.item() == 0


def test_not_finite_is_nan() -> None:
    for value in (math.nan, math.inf):
        for shape in ((4, 6), (6, 4)):
            z = views(2, *shape)
            z[1][2, 1] = value
            loss, _, gradient = value_and_gradients(lambda *z: emp_ssl(z), *z)
            assert loss.isnan() and gradient.isnan().any()


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)], ids=str)
def test_an_identity_that_is_lost_is_nan(shape: tuple[int, int]) -> None:
    """Equal rows of norm 1e10: beside their squares float64 has no 1. A factor that is not one must not be used."""
    z = [1e10 * v for v in views(2, *shape)]
    z[1][:] = z[1][0]
    loss, *gradients = value_and_gradients(lambda *z: emp_ssl(z), *z)
    assert loss.isnan() and gradients[1].isnan().any()


def test_training_lowers_the_rate_of_lightly_and_raises_that_of_the_paper() -> None:
    z = [v.requires_grad_() for v in views(2, 20, 6)]

    def rate() -> float:
        return emp_ssl(z, inv_coef=0.0).item()

    before = rate()
    for convention, raised in (("lightly", False), ("paper", True)):
        grads = torch.autograd.grad(emp_ssl(z, inv_coef=0.0, convention=convention), z)
        with torch.no_grad():
            for v, g in zip(z, grads, strict=True):
                v -= 0.1 * g
        assert (rate() > before) == raised
        with torch.no_grad():
            for v, g in zip(z, grads, strict=True):
                v += 0.1 * g


def test_no_matrix_of_the_longer_side() -> None:
    """Nothing is larger than all views together."""
    sizes = Sizes()
    for shape in ((5, 500), (500, 5)):
        inputs = views(2, *shape, torch.float32)
        with sizes:
            value_and_gradients(lambda *z: emp_ssl(z), *inputs)
    assert sizes.largest == 2 * 5 * 500


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)], ids=str)
def test_twice_differentiable(shape: tuple[int, int]) -> None:
    inputs = tuple(z.requires_grad_() for z in views(2, *shape))
    assert torch.autograd.gradcheck(lambda *z: emp_ssl(z, 0.5, 2.0), inputs)
    assert torch.autograd.gradgradcheck(lambda *z: emp_ssl(z, 0.5, 2.0), inputs)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)], ids=str)
def test_autocast_keeps_single_precision(shape: tuple[int, int]) -> None:
    inputs = views(2, *shape, torch.float32)
    whole = lambda *z: emp_ssl(z)  # noqa: E731
    same_value_and_gradients(torch.autocast("cpu", dtype=torch.bfloat16)(whole), whole, *inputs)


def test_compile_without_graph_breaks() -> None:
    inputs = views(3, 12, 6, torch.float32)
    step = torch.compile(lambda *z: emp_ssl(z), fullgraph=True, backend="aot_eager")
    for a, b in zip(
        value_and_gradients(step, *inputs), value_and_gradients(lambda *z: emp_ssl(z), *inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("z_views", "options", "error", "message"),
    [
        ([torch.ones(4, 3)], {}, ValueError, r"z_views must contain at least two views, got 1"),
        (torch.ones(2, 4, 3), {}, TypeError, r"z_views must be a list"),
        ([torch.ones(4, 3), torch.ones(4, 2)], {}, ValueError, r"z_views\[0\] and z_views\[1\] .*same shape"),
        ([torch.ones(4, 3)] * 2, {"tcr_eps": 0.0}, ValueError, r"tcr_eps must be a positive finite number, got 0.0"),
        ([torch.ones(4, 3)] * 2, {"inv_coef": math.nan}, ValueError, r"inv_coef must be a finite number, got nan"),
        ([torch.ones(4, 3)] * 2, {"convention": "solo"}, ValueError, r"convention must be one of 'lightly', 'paper'"),
    ],
)
def test_wrong_input(z_views, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sslfast.EMPSSLLoss(**options)(z_views)
