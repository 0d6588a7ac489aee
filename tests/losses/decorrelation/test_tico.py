"""TiCo against lightly's and against the formula over several steps; its state; wrong input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import Unavailable, peers
from helpers import GRAD_LOSS, roundings, value_and_gradients, within_budget
from sslfast.losses.decorrelation.tico import TiCoLoss, tico

SHAPES = [(64, 32), (7, 40), (33, 17), (2, 3), (5, 1)]


def lightly(**options):
    try:
        return peers.lightly_loss("tico_loss", "TiCoLoss", **options)
    except Unavailable as reason:
        pytest.skip(f"lightly 1.6.0 cannot be imported: {reason}")


def two_views(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    z_a = 1 + torch.randn(n, d)
    return z_a.to(dtype), (z_a + torch.randn(n, d)).to(dtype)


def plain(z_a: Tensor, z_b: Tensor, covariance: Tensor, beta: float = 0.9, rho: float = 8.0) -> tuple[Tensor, Tensor]:
    a, b = F.normalize(z_a), F.normalize(z_b)
    c = beta * covariance + (1 - beta) * (a.T @ a).detach() / len(a)
    return 1 - (a * b).sum(1).mean() + rho * torch.einsum("ni,ij,nj->n", a, c, a).mean(), c


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_lightly_over_steps(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    ours, theirs = TiCoLoss(0.8, 5.0), lightly(beta=0.8, rho=5.0)
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    for update in (False, True, True, False, True):
        inputs = two_views(*shape, dtype)
        found, expected = (
            value_and_gradients(lambda a, b, f=f, u=update: f(a, b, update_covariance_matrix=u), *inputs)
            for f in (ours, theirs)
        )
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, **tolerance)
        if update:
            torch.testing.assert_close(ours.C, theirs.C, **tolerance)
    assert ours.C.dtype == dtype


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula_in_single_precision(shape: tuple[int, int]) -> None:
    inputs = two_views(*shape, torch.float32)
    covariance = torch.randn(10, shape[1])
    covariance = covariance.T @ covariance / 10
    kernel = value_and_gradients(lambda a, b: tico(a, b, covariance)[0], *inputs)
    reference = roundings(value_and_gradients, lambda a, b: plain(a, b, covariance)[0], *inputs)
    truth = value_and_gradients(lambda a, b: plain(a, b, covariance.double())[0], *(z.double() for z in inputs))
    for name, k, r, t in zip(("loss", "dz_a", "dz_b"), kernel, reference, truth, strict=True):
        within_budget(name, k, r, t, torch.float32, 8.0 if name == "loss" else 8 * GRAD_LOSS / shape[0])
    torch.testing.assert_close(tico(*inputs, covariance)[1], plain(*inputs, covariance)[1])


def test_zero_rows() -> None:
    inputs = [z.index_fill(0, torch.tensor([1]), 0.0) for z in two_views(6, 4, torch.float64)]
    covariance = torch.eye(4, dtype=torch.float64)
    found = value_and_gradients(lambda a, b: tico(a, b, covariance)[0], *inputs)
    expected = value_and_gradients(lambda a, b: plain(a, b, covariance)[0], *inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(dtype: torch.dtype) -> None:
    """Norms of rows that float16 cannot hold, and second moments in float32."""
    inputs = [(4e4 * z).clamp(-6e4, 6e4) for z in two_views(16, 32, dtype)]
    loss_fn = TiCoLoss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_fn(*inputs)
    truth, c = plain(*(z.double() for z in inputs), torch.zeros(32, 32))
    assert loss.dtype == loss_fn.C.dtype == torch.float32
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss_fn.C.double(), c, rtol=1e-5, atol=1e-7)


def test_second_derivative() -> None:
    """The moments are constants in it, as in the first."""
    inputs = two_views(6, 4, torch.float64)
    covariance = torch.eye(4, dtype=torch.float64)

    def penalty(function, *leaves: Tensor) -> Tensor:
        grads = torch.autograd.grad(function(*leaves, covariance)[0], leaves, create_graph=True)
        return sum(grad.square().sum() for grad in grads)

    found = value_and_gradients(lambda *z: penalty(tico, *z), *inputs)
    for a, b in zip(found, value_and_gradients(lambda *z: penalty(plain, *z), *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_state_travels() -> None:
    """The moments are saved, loaded into a module that has seen nothing, and cast with the module."""
    inputs = two_views(6, 4, torch.float32)
    seen = TiCoLoss()
    assert seen.C.numel() == 0
    seen(*inputs)
    fresh = torch.nn.ModuleDict({"loss": TiCoLoss()})
    fresh.load_state_dict({f"loss.{name}": value for name, value in seen.state_dict().items()})
    assert torch.equal(fresh["loss"].C, seen.C) and fresh["loss"].C.data_ptr() != seen.C.data_ptr()
    assert torch.equal(fresh["loss"](*inputs), seen(*inputs))
    seen.load_state_dict(TiCoLoss().state_dict())  # back to the start
    assert torch.equal(seen(*inputs), TiCoLoss()(*inputs))
    assert seen.to(torch.float64).C.dtype == torch.float64


def test_a_first_step_in_inference_mode() -> None:
    """As a validation pass before training does: the average it leaves must not stop the training step."""
    loss, views = TiCoLoss(), [torch.randn(8, 5, requires_grad=True) for _ in range(2)]
    with torch.inference_mode():
        loss(*views)
    before = loss.C.clone()
    loss(*views).backward()
    assert views[0].grad is not None and not torch.equal(loss.C, before)


def test_backward_after_the_next_step() -> None:
    """A later batch does not change the moments that an earlier loss is differentiated with."""
    first, second = two_views(6, 4, torch.float64), two_views(6, 4, torch.float64)
    expected = value_and_gradients(TiCoLoss(), *first)
    loss_fn = TiCoLoss()
    leaf = first[0].clone().requires_grad_()
    loss = loss_fn(leaf, first[1])
    for _ in range(2):
        loss_fn(*second)
    (found,) = torch.autograd.grad(GRAD_LOSS * loss, leaf)
    torch.testing.assert_close(found, expected[1])


def test_training_step_compiles_without_graph_breaks() -> None:
    eager, compiled = TiCoLoss(), TiCoLoss()
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        inputs = two_views(8, 5, torch.float32)
        for a, b in zip(value_and_gradients(step, *inputs), value_and_gradients(eager, *inputs), strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(compiled.C, eager.C)


@pytest.mark.parametrize(
    ("z_a", "z_b", "covariance", "error", "message"),
    [
        (torch.ones(4, 3), torch.ones(4, 2), None, ValueError, r"z_a and z_b .*same shape"),
        (torch.ones(4, 3), torch.ones(4, 3).double(), None, TypeError, r"z_a and z_b .*same dtype"),
        (torch.ones(1, 3), torch.ones(1, 3), None, ValueError, r"at least two rows, got 1"),
        (torch.ones(4, 3), torch.ones(4, 3), torch.eye(2), ValueError, r"covariance .*\(3, 3\).*got \(2, 2\)"),
        (torch.ones(4, 3), torch.ones(4, 3), torch.eye(3, device="meta"), ValueError, r"z_a's device cpu, got meta"),
    ],
)
def test_wrong_input(z_a, z_b, covariance, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tico(z_a, z_b, covariance)
