"""SIGReg against the formulas of three packages and lightly's own class; its steps, its state; wrong input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from benchmarks import Unavailable, peers
from helpers import DTYPES, check_loss, value_and_gradients
from sslfast import SIGReg, sigreg

# (views, rows, features, slices): one row, one slice, ragged, wide with few slices.
SHAPES = [(2, 64, 16, 40), (3, 37, 11, 70), (1, 1, 5, 3), (2, 9, 700, 1), (1, 300, 4, 33)]


def lightly(module: str, name: str, **options):
    try:
        return peers.lightly_loss(module, name, **options)
    except Unavailable as reason:
        pytest.skip(f"lightly 1.6.0 cannot be imported: {reason}")


def directions(d: int, s: int, dtype: torch.dtype = torch.float64) -> Tensor:
    random = torch.Generator().manual_seed(d * s)
    return F.normalize(torch.randn(d, s, generator=random, dtype=torch.float64), dim=0).to(dtype)


def lejepa(z: Tensor, slices: Tensor, knots: int = 17, t_max: float = 3.0) -> Tensor:
    """The statistic over [−t_max, t_max], both halves computed, from complex means."""
    half = torch.linspace(0, t_max, knots, dtype=torch.float64).to(z.dtype)
    t = torch.cat([-half.flip(0), half[1:]])
    phi = torch.exp(-t.square() / 2)
    x = (z @ slices.to(z.dtype)).unsqueeze(-1) * t  # [V, N, S, 2·knots − 1]
    error = (x.cos().mean(1) - phi).square() + x.sin().mean(1).square()
    return z.shape[1] * torch.trapezoid(error * phi, t).mean()


def eb_jepa(z: Tensor, slices: Tensor, knots: int = 10, t_max: float = 3.0) -> Tensor:
    t = torch.linspace(-t_max, t_max, knots, dtype=torch.float64).to(z.dtype)
    phi = torch.exp(-t.square() / 2)
    x = (z @ slices.to(z.dtype)).unsqueeze(-1) * t
    error = (x.cos().mean(1) - phi).square() + x.sin().mean(1).square()
    return torch.trapezoid(error * phi, t).mean()


def embeddings(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    v, n, d, _ = shape
    random = torch.Generator().manual_seed(n)
    return (1.3 * torch.randn(v, n, d, generator=random, dtype=torch.float64) + 0.2).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lejepas_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    slices = directions(*shape[2:])
    check_loss(
        lambda z: sigreg(z, slices=slices), lambda z: lejepa(z, slices), (embeddings(shape, dtype),), shape[1] / 10
    )


@pytest.mark.parametrize("knots, t_max", [(2, 1.0), (5, 4.0), (17, 3.0), (34, 5.0)])
def test_quadratures(knots: int, t_max: float) -> None:
    z, slices = embeddings(SHAPES[1]), directions(11, 20)
    for formula, convention in ((lejepa, "lejepa"), (eb_jepa, "eb_jepa")):
        for count in (knots, knots + 1):
            found = sigreg(z, slices=slices, knots=count, t_max=t_max, convention=convention)
            torch.testing.assert_close(found, formula(z, slices, count, t_max))


def test_eb_jepas_formula() -> None:
    z, slices = embeddings(SHAPES[0]), directions(16, 256)
    options = {"slices": slices, "knots": 10, "convention": "eb_jepa"}
    found, expected = (
        value_and_gradients(f, z) for f in (lambda z: sigreg(z, **options), lambda z: eb_jepa(z, slices))
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(64, 16), (3, 37, 11), (2, 2, 9, 5)], ids=str)
def test_equals_lightly(shape: tuple[int, ...]) -> None:
    """lightly draws from the global generator; the same directions give the same loss and gradient."""
    theirs = lightly("lejepa_loss", "SIGReg", num_vectors=100)
    z = torch.randn(shape) + 0.1
    state = torch.get_rng_state()
    slices = theirs._generate_unit_vectors(z.device, z.dtype, shape[-1])
    torch.set_rng_state(state)
    expected = value_and_gradients(theirs, z)
    found = value_and_gradients(lambda z: sigreg(z.flatten(0, -3) if z.dim() > 3 else z, slices=slices), z)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_gaussian_sample_is_near_one_and_a_collapsed_one_far() -> None:
    """Of a standard normal sample the mean is ∫ φ (1 − φ²) dt = √2π (1 − 1/√3), up to the cut at t_max."""
    z = torch.randn(4, 4096, 8)
    assert abs(sigreg(z).item() - math.sqrt(2 * math.pi) * (1 - 1 / math.sqrt(3))) < 0.15
    assert sigreg(torch.zeros(4, 4096, 8)) > 100 * sigreg(z)


def test_gradient_descent_reaches_a_gaussian() -> None:
    z = (0.1 * torch.randn(256, 3) + 1).requires_grad_()
    loss_fn, optimizer = SIGReg(num_vectors=64), torch.optim.Adam([z], 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss_fn(z).backward()
        optimizer.step()
    z = z.detach()
    assert z.mean(0).abs().max() < 0.15 and (torch.cov(z.T) - torch.eye(3)).abs().max() < 0.25


def test_steps_and_seeds() -> None:
    z = torch.randn(2, 30, 6)
    at = lambda **how: sigreg(z, num_vectors=8, **how).item()  # noqa: E731
    assert at() == at(step=0, seed=0) == at(step=torch.tensor(0)) == at(step=torch.tensor([0], dtype=torch.int32))
    assert len({at(), at(step=1), at(step=2), at(seed=1), at(seed=-1)}) == 5
    assert at(seed=2**64 - 1) == at(seed=-1)
    loss_fn = SIGReg(num_vectors=8, seed=3)
    assert [loss_fn(z).item() for _ in range(3)] == [at(step=k, seed=3) for k in range(3)]


def test_state_travels() -> None:
    z = torch.randn(30, 6)
    seen = SIGReg(num_vectors=8)
    for _ in range(3):
        seen(z)
    assert seen.state_dict().keys() == {"global_step"} and seen.global_step == 3
    fresh = SIGReg(num_vectors=8)
    fresh.load_state_dict(copy.deepcopy(seen.state_dict()))
    assert torch.equal(fresh(z), seen(z))
    cast = SIGReg(num_vectors=8).to(torch.bfloat16)
    assert cast.global_step.dtype == torch.int64


def test_training_step_compiles_without_graph_breaks() -> None:
    eager, compiled = SIGReg(num_vectors=8), SIGReg(num_vectors=8)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        z = torch.randn(2, 12, 5)
        for a, b in zip(value_and_gradients(step, z), value_and_gradients(eager, z), strict=True):
            torch.testing.assert_close(a, b)
    assert compiled.global_step == 3


def test_second_derivative_and_forward_mode() -> None:
    slices = directions(4, 5)
    z = embeddings((1, 6, 4, 5))
    loss, plain = lambda z: sigreg(z, slices=slices), lambda z: lejepa(z, slices)

    def penalty(function, z: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(function(z), z, create_graph=True)
        return grad.square().sum()

    found, expected = (value_and_gradients(lambda z, f=f: penalty(f, z), z) for f in (loss, plain))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(*(torch.func.jvp(f, (z,), (torch.ones_like(z),)) for f in (loss, plain)), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_and_nan() -> None:
    z = torch.randn(2, 30, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sigreg(z), sigreg(z)) and sigreg(z.bfloat16()).dtype == torch.float32
        inside = sigreg(z)
    torch.testing.assert_close(inside, sigreg(z))
    z[1, 3] = math.nan
    assert sigreg(z).isnan()


def test_large_values_in_half_precision() -> None:
    """lightly's N of 70,000 rows is infinite in float16, and 257 rows are 256 in bfloat16."""
    z = torch.randn(70000, 2).half()
    torch.testing.assert_close(sigreg(z, num_vectors=4), sigreg(z.float(), num_vectors=4))


@pytest.mark.parametrize(
    ("z", "options", "error", "message"),
    [
        (
            torch.ones(4),
            {},
            ValueError,
            r"z must have shape \[rows, features\] or \[views, rows, features\], got \(4,\)",
        ),
        (torch.ones(4, 3).long(), {}, TypeError, "z must be float32"),
        (torch.ones(2, 0, 3), {}, ValueError, r"at least one view, row and feature, got shape \(2, 0, 3\)"),
        ("z", {}, TypeError, "z must be a torch.Tensor, got str"),
        (torch.ones(4, 3), {"knots": 1}, ValueError, "knots must be a whole number of at least 2, got 1"),
        (torch.ones(4, 3), {"t_max": 0}, ValueError, "t_max must be a positive number, got 0"),
        (torch.ones(4, 3), {"t_max": math.inf}, ValueError, "t_max must be a positive number, got inf"),
        (torch.ones(4, 3), {"num_vectors": 0}, ValueError, "num_vectors must be .* at least 1, got 0"),
        (torch.ones(4, 3), {"convention": "solo"}, ValueError, "convention must be one of 'lejepa', 'eb_jepa'"),
        (torch.ones(4, 3), {"step": -1}, ValueError, "step must be a whole number from 0"),
        (
            torch.ones(4, 3),
            {"step": torch.ones(2).long()},
            ValueError,
            r"step must be one whole number, got shape \(2,",
        ),
        (torch.ones(4, 3), {"seed": 0.5}, ValueError, "seed must be a 64-bit whole number, got 0.5"),
        (torch.ones(4, 3), {"slices": torch.ones(4, 3)}, ValueError, r"slices must have shape \[3, slices\].*\(4, 3\)"),
        (torch.ones(4, 3), {"slices": torch.ones(3, 2).int()}, TypeError, "slices must be float32"),
        (torch.ones(4, 3), {"slices": torch.ones(3, 2, device="meta")}, ValueError, "slices must be on z's device"),
        (torch.ones(4, 3), {"slices": torch.ones(3, 2, requires_grad=True)}, ValueError, "must not require a gradient"),
        (torch.ones(1, 2**18 + 1), {"num_vectors": 1}, ValueError, r"up to 2\^18 features unless slices are given"),
    ],
)
def test_wrong_input(z, options, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sigreg(z, **options)


def test_modules_check_their_options() -> None:
    for options in ({"knots": 1}, {"t_max": -1.0}, {"num_vectors": 0}, {"convention": "x"}, {"seed": "x"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            SIGReg(**options)
    assert "num_vectors=1024" in repr(sslfast.SIGReg())
