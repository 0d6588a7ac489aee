"""VISReg against lightly's class and the formula; its steps; wrong input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import Unavailable, peers
from helpers import check_loss, value_and_gradients
from sslfast import VISRegLoss, visreg

SLICES = 25


def directions(d: int) -> Tensor:
    random = torch.Generator().manual_seed(d)
    return F.normalize(torch.randn(d, SLICES, generator=random, dtype=torch.float64), dim=0)


def views(v: int, n: int = 20, d: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    return (1.5 * torch.randn(v, n, d, generator=torch.Generator().manual_seed(v), dtype=torch.float64)).to(dtype)


def plain(global_proj: Tensor, local_proj: Tensor) -> Tensor:
    z = torch.cat([global_proj, local_proj])
    n = z.shape[1]
    mean, std = z.mean(1, keepdim=True), z.std(1, correction=0, keepdim=True)
    sorted_ = (((z - mean) / (std.detach() + 1e-4)) @ directions(z.shape[2]).to(z.dtype)).sort(1).values
    quantiles = torch.distributions.Normal(0, 1).icdf(torch.arange(1, n + 1, dtype=torch.float64) / (n + 1))
    shape = (sorted_ - quantiles.to(z.dtype)[:, None]).square().mean()
    pred = (z - global_proj.mean(0)).square().mean()
    return 0.1 * pred + 0.9 * ((1 - std).square().mean() + 2 * shape + 3 * mean.square().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_formula(dtype: torch.dtype) -> None:
    options = {"lambda_shape": 2.0, "lambda_center": 3.0, "slices": directions(7)}
    inputs = views(2, dtype=dtype), views(3, dtype=dtype)
    check_loss(lambda a, b: visreg(a, b, **options), plain, inputs)


def test_equals_lightly() -> None:
    try:
        theirs = peers.lightly_loss("visreg_loss", "VISRegLoss", num_slices=SLICES, lambda_param=0.6)
    except Unavailable as reason:
        pytest.skip(f"lightly 1.6.0 cannot be imported: {reason}")
    a, b = views(2, dtype=torch.float32), views(3, dtype=torch.float32)
    state = torch.get_rng_state()
    slices = torch.randn(7, SLICES)
    slices = slices / slices.norm(p=2, dim=0)
    torch.set_rng_state(state)
    expected = value_and_gradients(lambda a, b: theirs(local_proj=b, global_proj=a), a, b)
    for mine, true in zip(
        value_and_gradients(lambda a, b: visreg(a, b, 0.6, slices=slices), a, b), expected, strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-6)


def test_module_keeps_steps() -> None:
    a, b = views(2), views(3)
    loss_fn = VISRegLoss(num_slices=8, seed=2)
    of_step = [visreg(a, b, num_slices=8, seed=2, step=k) for k in range(3)]
    assert [loss_fn(local_proj=b, global_proj=a) for _ in range(2)] == of_step[:2]
    fresh = VISRegLoss(num_slices=8, seed=2)
    fresh.load_state_dict(copy.deepcopy(loss_fn.state_dict()))
    found = fresh.forward_components(local_proj=b, global_proj=a)
    assert found.total == of_step[2]
    torch.testing.assert_close(found.total, 0.1 * found.pred + 0.9 * (found.scale + found.shape + found.center))
    assert "num_slices=8" in repr(fresh)


def test_compiles_without_graph_breaks() -> None:
    eager, compiled = VISRegLoss(num_slices=8), VISRegLoss(num_slices=8)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    found, expected = (value_and_gradients(lambda a, f=f: f(global_proj=a), views(2)) for f in (step, eager))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


A = torch.ones(2, 4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: visreg(A[:, :1]), "global_proj must have at least two rows"),
        (lambda: visreg(A, eps=0.0), "eps must be positive, got 0.0"),
        (lambda: visreg(A, num_slices=0), "num_slices must be a whole number of at least 1, got 0"),
        (lambda: visreg(A, lambda_scale=-1.0), "lambda_scale must be a number from 0, got -1.0"),
        (lambda: visreg(A, lambda_param=2.0), "lambda_param must be a number from 0 to 1, got 2.0"),
        (
            lambda: visreg(A, slices=torch.ones(2, 3)),
            r"slices must have shape \[3, slices\] for global_proj's features",
        ),
        (lambda: VISRegLoss(num_slices=0), "num_slices"),
    ],
)
def test_wrong_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
