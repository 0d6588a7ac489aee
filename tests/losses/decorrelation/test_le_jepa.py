"""LeJEPA and LeWM against lightly's classes and their formulas; their modules; wrong input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from benchmarks import Unavailable, peers
from helpers import check_loss, value_and_gradients
from sslfast import LeJEPALoss, LeWMLoss, le_jepa, le_wm, sigreg

SLICES = 30


def lightly(module: str, name: str, **options):
    try:
        return peers.lightly_loss(module, name, **options)
    except Unavailable as reason:
        pytest.skip(f"lightly 1.6.0 cannot be imported: {reason}")


def directions(d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    random = torch.Generator().manual_seed(d)
    return F.normalize(torch.randn(d, SLICES, generator=random, dtype=torch.float64), dim=0).to(dtype)


def views(v: int, n: int = 20, d: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(v, n, d, generator=torch.Generator().manual_seed(v), dtype=torch.float64).to(dtype)


def regularizer(z: Tensor) -> Tensor:
    """SIGReg by the plain formula."""
    with sslfast.use_backend("reference"):
        return sigreg(z, slices=directions(z.shape[-1]))


def plain(global_proj: Tensor, local_proj: Tensor | None = None, share: float = 0.05, rest: float = 0.95) -> Tensor:
    every = global_proj if local_proj is None else torch.cat([global_proj, local_proj])
    return share * regularizer(every) + rest * (every - global_proj.mean(0)).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_formula(dtype: torch.dtype) -> None:
    slices = directions(7)
    inputs = (views(2, dtype=dtype), views(5, dtype=dtype))
    check_loss(lambda a, b: le_jepa(a, b, slices=slices), plain, inputs)
    check_loss(lambda a: le_jepa(a, None, 0.02, slices=slices), lambda a: plain(a, None, 0.02, 0.98), inputs[:1])
    check_loss(
        lambda a, b: le_jepa(a, b, 0.3, weighting="sum", slices=slices), lambda a, b: plain(a, b, 0.3, 1.0), inputs
    )


def slices_of_lightly(loss, z: Tensor) -> Tensor:
    """What it draws next, without drawing it."""
    state = torch.get_rng_state()
    slices = loss.sigreg._generate_unit_vectors(z.device, z.dtype, z.shape[-1])
    torch.set_rng_state(state)
    return slices


def test_equals_lightly() -> None:
    theirs = lightly("lejepa_loss", "LeJEPALoss", lambda_param=0.2, sigreg_num_vectors=SLICES)
    a, b = views(2, dtype=torch.float32), views(5, dtype=torch.float32)
    slices = slices_of_lightly(theirs, a)
    expected = value_and_gradients(lambda a, b: theirs(local_proj=b, global_proj=a), a, b)
    for mine, true in zip(
        value_and_gradients(lambda a, b: le_jepa(a, b, 0.2, slices=slices), a, b), expected, strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_le_wm_equals_lightly(normalize: bool) -> None:
    theirs = lightly("lewm_loss", "LeWMLoss", lambda_param=0.2, normalize=normalize, sigreg_num_vectors=SLICES)
    frames = views(20, 4, dtype=torch.float32)  # [batch, frames, features]
    slices = slices_of_lightly(theirs, frames)

    def of_frames(loss):
        return lambda z, predicted: loss(predicted=predicted, target=z[:, 1:], embeddings=z)

    inputs = (frames, frames[:, :-1] + 0.1)
    expected = value_and_gradients(of_frames(theirs), *inputs)
    mine = of_frames(lambda **tensors: le_wm(**tensors, lambda_param=0.2, normalize=normalize, slices=slices))
    for a, b in zip(value_and_gradients(mine, *inputs), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_target_is_a_constant() -> None:
    frames = views(20, 4).requires_grad_()
    target = frames[:, 1:].clone()
    (grad,) = torch.autograd.grad(le_wm(frames[:, :-1].detach(), target, frames.detach() + 0 * frames), frames)
    assert not grad.any()


def test_modules_keep_steps() -> None:
    a, b = views(2), views(3)
    loss_fn = LeJEPALoss(0.1, sigreg_num_vectors=8, seed=4)
    of_step = [le_jepa(a, b, 0.1, num_vectors=8, seed=4, step=k) for k in range(3)]
    assert [loss_fn(local_proj=b, global_proj=a) for _ in range(2)] == of_step[:2]
    fresh = LeJEPALoss(0.1, sigreg_num_vectors=8, seed=4)
    fresh.load_state_dict(copy.deepcopy(loss_fn.state_dict()))
    assert fresh(local_proj=b, global_proj=a) == of_step[2]
    frames, wm = views(20, 4), LeWMLoss(sigreg_num_vectors=8)
    found = [wm(predicted=frames[:, 1:], target=frames[:, 1:], embeddings=frames) for _ in range(2)]
    assert found == [le_wm(frames[:, 1:], frames[:, 1:], frames, num_vectors=8, step=k) for k in range(2)]
    assert "lambda_param=0.1" in repr(loss_fn) and "normalize=False" in repr(wm)


def test_compiles_without_graph_breaks() -> None:
    eager, compiled = LeJEPALoss(sigreg_num_vectors=8), LeJEPALoss(sigreg_num_vectors=8)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        inputs = views(2), views(3)
        found, expected = (
            value_and_gradients(lambda a, b, f=f: f(local_proj=b, global_proj=a), *inputs) for f in (step, eager)
        )
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


A = torch.ones(2, 4, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: le_jepa(A[0]), ValueError, r"global_proj must have shape \[views, rows, features\], got \(4, 3\)"),
        (lambda: le_jepa(A, A[0]), ValueError, r"local_proj must have shape \[views, rows, features\], got \(4, 3\)"),
        (lambda: le_jepa(A, A[:, :2]), ValueError, "one of local_proj must have the same shape"),
        (lambda: le_jepa(A, A.double()), TypeError, "must have the same dtype"),
        (lambda: le_jepa(A, lambda_param=1.1), ValueError, "lambda_param must be a number from 0 to 1, got 1.1"),
        (lambda: le_jepa(A, weighting="mean"), ValueError, "weighting must be one of 'convex', 'sum', got 'mean'"),
        (lambda: LeJEPALoss(-0.1), ValueError, "lambda_param"),
        (lambda: le_wm(A, A, A, -1.0), ValueError, "lambda_param must be a number from 0, got -1.0"),
        (
            lambda: le_wm(A, A, A[0]),
            ValueError,
            r"embeddings must have shape \[batch, frames, features\], got \(4, 3\)",
        ),
        (lambda: le_wm(A, A[:, :2], A), ValueError, "predicted and target must have the same shape"),
        (lambda: le_wm(A[:1], A[:1], A), ValueError, r"embeddings' batch and features, got shapes \(1, 4, 3\)"),
    ],
)
def test_wrong_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
