"""W-MSE against lightly's, seed for seed: value, gradient, running statistics; whitened rows; wrong input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import Unavailable, peers
from helpers import roundings, value_and_gradients, within_budget
from sslfast.losses.decorrelation.w_mse import Whitening2d, WMSELoss, norm_mse_loss

TOLERANCE = {torch.float64: {"rtol": 1e-9, "atol": 1e-11}, torch.float32: {"rtol": 1e-4, "atol": 1e-5}}


def lightly(name: str, **options):
    try:
        return peers.lightly_loss("wmse_loss", name, **options)
    except Unavailable as reason:
        pytest.skip(f"lightly 1.6.0 cannot be imported: {reason}")


def correlated(n: int, d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (1 + torch.randn(n, d) @ (torch.eye(d) + 0.5 * torch.randn(d, d) / d**0.5)).to(dtype)


def seeded(function, seed: int = 5):
    def call(*inputs: Tensor) -> Tensor:
        torch.manual_seed(seed)
        return function(*inputs)

    return call


def by_order(x0: Tensor, x1: Tensor) -> Tensor:
    """Knows which row is which."""
    return (torch.arange(len(x0)).unsqueeze(1) * (x0 - 2 * x1)).square().mean()


def same_statistics(ours, theirs) -> None:
    found, expected = dict(ours.named_buffers()), dict(theirs.named_buffers())
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **TOLERANCE[value.dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"embedding_dim": 8, "w_size": 16},
        {"embedding_dim": 5, "w_size": 12, "w_iter": 3, "num_samples": 3, "momentum": 0.2},
        {"embedding_dim": 8, "w_size": 48, "eps": 0.1, "track_running_stats": False},
        {"embedding_dim": 1, "w_size": 2, "loss_fn": by_order, "eps": 0.01},
        {"embedding_dim": 6, "w_size": 16, "loss_fn": by_order},
    ],
    ids=lambda options: ", ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in options.items()),
)
def test_equals_lightly(options: dict, dtype: torch.dtype) -> None:
    ours, theirs = WMSELoss(**options).to(dtype), lightly("WMSELoss", **options).to(dtype)
    rows = 48 * options.get("num_samples", 2)
    for step in range(3):
        for loss_fn in (ours, theirs):
            loss_fn.train(step < 2)
        x = correlated(rows, options["embedding_dim"], dtype)
        before = copy.deepcopy(theirs)
        kernel = value_and_gradients(seeded(ours), x)
        state = torch.get_rng_state()
        value_and_gradients(seeded(theirs), x)
        assert torch.equal(state, torch.get_rng_state())  # as many numbers were drawn

        def plain(x: Tensor, module: torch.nn.Module = before) -> list[Tensor]:
            return value_and_gradients(seeded(copy.deepcopy(module).to(x.dtype)), x)

        for name, k, p, t in zip(("loss", "dx"), kernel, roundings(plain, x), plain(x.double()), strict=True):
            within_budget(name, k, p, t, dtype)
        same_statistics(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_whitening_equals_lightly(dtype: torch.dtype) -> None:
    ours = Whitening2d(6, 0.3).to(dtype)
    theirs = lightly("Whitening2d", num_features=6, momentum=0.3).to(dtype)
    for training in (True, True, False):
        x = correlated(20, 6, dtype)
        ours.train(training), theirs.train(training)
        torch.testing.assert_close(ours(x), theirs(x), **TOLERANCE[dtype])
        same_statistics(ours, theirs)
    theirs.load_state_dict(ours.state_dict())


def test_whitened_rows_are_white() -> None:
    white = Whitening2d(6)(correlated(50, 6))
    torch.testing.assert_close(white.mean(0), torch.zeros(6).double(), rtol=0.0, atol=1e-12)
    torch.testing.assert_close(white.T.cov(), torch.eye(6).double(), rtol=0.0, atol=1e-10)


def test_formula() -> None:
    """One sub-batch: the order of the rows does not matter."""
    x = correlated(40, 6)

    def white(z: Tensor) -> Tensor:
        return torch.linalg.solve(torch.linalg.cholesky(z.T.cov()), (z - z.mean(0)).T).T

    def plain(z: Tensor) -> Tensor:
        return (F.normalize(white(z[:20])) - F.normalize(white(z[20:]))).square().sum(1).mean()

    for a, b in zip(value_and_gradients(WMSELoss(6, w_size=20), x), value_and_gradients(plain, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(dtype: torch.dtype) -> None:
    """lightly's Cholesky does not take them; squares that float16 cannot hold."""
    x = (100 * correlated(64, 6)).to(dtype)
    loss_fn = WMSELoss(6, w_size=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value_and_gradients(seeded(loss_fn), x)
    truth = value_and_gradients(seeded(WMSELoss(6, w_size=16)), x.double())
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype
    torch.testing.assert_close(found[0].double(), truth[0], rtol=1e-3, atol=1e-3)
    assert found[1].isfinite().all() and loss_fn.whitening.running_variance.isfinite().all()


def test_norm_mse_loss() -> None:
    x0, x1 = correlated(9, 4), correlated(9, 4)
    expected = (F.normalize(x0) - F.normalize(x1)).square().sum(1).mean()
    torch.testing.assert_close(norm_mse_loss(x0, x1), expected)


def test_twice_differentiable() -> None:
    x = correlated(16, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(seeded(WMSELoss(2, w_size=4, track_running_stats=False)), (x,))


def test_compile_without_graph_breaks() -> None:
    x = correlated(64, 6, torch.float32)
    eager, compiled = WMSELoss(6, w_size=32), WMSELoss(6, w_size=32)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for a, b in zip(value_and_gradients(seeded(step), x), value_and_gradients(seeded(eager), x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    same_statistics(compiled, eager)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((33, 4), r"multiple of num_samples=2 rows, got 33"),
        ((8, 4), r"multiple of w_size=8 rows a view, got 4"),
        ((24, 4), r"multiple of w_size=8 rows a view, got 12"),
        ((32, 3), r"num_features=4 features, got 3"),
        ((32,), r"input must be two-dimensional"),
    ],
)
def test_wrong_input(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WMSELoss(4, w_size=8)(torch.ones(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding_dim": 8, "w_size": 15}, r"w_size must be at least twice embedding_dim=8, got 15"),
        ({"w_iter": 0}, r"w_iter must be a positive integer, got 0"),
        ({"num_samples": 1}, r"num_samples must be at least 2, got 1"),
        ({"eps": -0.1}, r"eps must be between 0 and 1, got -0.1"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WMSELoss(**options)


def test_covariance_without_full_rank() -> None:
    """A constant feature: an error that names eps, which helps."""
    x = correlated(32, 4)
    x[:, 1] = 2.0
    with pytest.raises(torch.linalg.LinAlgError, match=r"not positive definite with eps=0.0.*larger eps"):
        WMSELoss(4, w_size=8)(x)
    assert WMSELoss(4, w_size=8, eps=1e-3)(x).isfinite()
