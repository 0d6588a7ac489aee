"""The spectral contrastive loss against its formula with the N × N matrix, and wrong input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers import GRAD_LOSS, roundings, value_and_gradients, within_budget
from sslfast.losses.decorrelation.spectral_contrastive import SpectralContrastiveLoss, spectral_contrastive


def two_views(n: int, d: int, dtype: torch.dtype, norm: float = 1.0) -> tuple[Tensor, Tensor]:
    """Rows of norms around ``norm``, some above and some below."""
    z_a = torch.randn(n, d)
    z_b = z_a + torch.randn(n, d)
    norms = norm * (0.25 + 1.5 * torch.rand(2, n, 1))
    return (F.normalize(z_a) * norms[0]).to(dtype), (F.normalize(z_b) * norms[1]).to(dtype)


def plain(z_a: Tensor, z_b: Tensor, mu: float | None) -> Tensor:
    """Equation 6 with the authors' restriction to a ball, as a choice between a row and its normalised self."""
    if mu is not None:
        z_a, z_b = (torch.where(z.norm(dim=1, keepdim=True) < mu**0.5, z, F.normalize(z) * mu**0.5) for z in (z_a, z_b))
    n, s = len(z_a), z_a @ z_b.T
    others = ~torch.eye(n, dtype=torch.bool)
    loss = s[others].square().sum() / (n * (n - 1)) - 2 * s.diagonal().mean()
    return loss if mu is None else loss / mu


@pytest.mark.parametrize("shape", [(64, 8), (12, 40), (30, 30), (2, 3), (7, 1), (201, 17)], ids=str)
@pytest.mark.parametrize("mu", [None, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_formula(dtype: torch.dtype, mu: float | None, shape: tuple[int, int]) -> None:
    inputs = two_views(*shape, dtype, 1.0 if mu is None else mu**0.5)
    formula = lambda a, b: plain(a, b, mu)  # noqa: E731
    kernel = value_and_gradients(lambda a, b: spectral_contrastive(a, b, mu), *inputs)
    reference = roundings(value_and_gradients, formula, *inputs)
    truth = value_and_gradients(formula, *(z.double() for z in inputs))
    for name, k, r, t in zip(("loss", "dz_a", "dz_b"), kernel, reference, truth, strict=True):
        within_budget(name, k, r, t, dtype, 1.0 if name == "loss" else GRAD_LOSS / shape[0])


@pytest.mark.parametrize("mu", [None, 1.0])
def test_zero_rows(mu: float | None) -> None:
    inputs = [z.index_fill(0, torch.tensor([2]), 0.0) for z in two_views(6, 4, torch.float64)]
    found = value_and_gradients(lambda a, b: spectral_contrastive(a, b, mu), *inputs)
    for a, b in zip(found, value_and_gradients(lambda a, b: plain(a, b, mu), *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(dtype: torch.dtype) -> None:
    """Squares of similarities that float16 cannot hold."""
    inputs = two_views(32, 8, dtype, norm=30.0)
    loss = spectral_contrastive(*inputs, None)
    truth = plain(*(z.double() for z in inputs), None)
    assert loss.dtype == torch.float32 and truth > 65504
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0.0)
    shortened = spectral_contrastive(*inputs, 1.0)
    torch.testing.assert_close(shortened.double(), plain(*(z.double() for z in inputs), 1.0), rtol=1e-2, atol=1e-2)


def test_twice_differentiable() -> None:
    inputs = tuple(z.requires_grad_() for z in two_views(5, 3, torch.float64))
    assert torch.autograd.gradgradcheck(spectral_contrastive, inputs)


def test_compile_without_graph_breaks() -> None:
    inputs = two_views(20, 6, torch.float32)
    step = torch.compile(spectral_contrastive, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        value_and_gradients(step, *inputs), value_and_gradients(spectral_contrastive, *inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_module_is_the_function() -> None:
    inputs = two_views(9, 4, torch.float32)
    assert torch.equal(SpectralContrastiveLoss(0.5)(*inputs), spectral_contrastive(*inputs, 0.5))


@pytest.mark.parametrize(
    ("z_a", "z_b", "mu", "error", "message"),
    [
        (torch.ones(4, 3), torch.ones(5, 3), 1.0, ValueError, r"z_a and z_b .*same shape"),
        (torch.ones(4, 3), torch.ones(4, 3).double(), 1.0, TypeError, r"z_a and z_b .*same dtype"),
        (torch.ones(1, 3), torch.ones(1, 3), 1.0, ValueError, r"at least two rows, got 1"),
        (torch.ones(4, 3), torch.ones(4, 3), 0.0, ValueError, r"mu must be a positive .*got 0.0"),
        (torch.ones(4, 3), torch.ones(4, 3), float("inf"), ValueError, r"mu must be a positive finite .*got inf"),
    ],
)
def test_wrong_input(z_a, z_b, mu: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        spectral_contrastive(z_a, z_b, mu)
