"""Negative cosine, BYOL and SimSiam: the kernels against the formula in float64, and the contracts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from helpers import (
    DTYPES,
    GRAD_LOSS,
    SHAPES,
    check_loss,
    same_value_and_gradients,
    value_and_gradients,
)
from sslfast import reference

pytestmark = pytest.mark.sanitize

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Beyond the common grid: long rows (a block a row on the GPU), and many tasks of short rows.
LONG_SHAPES = [(1, 70001), (3, 2048), (20000, 3)]
CONVENTIONS = ["cosine", "distance"]


def plain(convention: str = "cosine", eps: float = 1e-8):
    def formula(p: Tensor, z: Tensor) -> Tensor:
        cosine = (F.normalize(p, dim=1, eps=eps) * F.normalize(z, dim=1, eps=eps)).sum(1).mean()
        return -cosine if convention == "cosine" else 2 - 2 * cosine

    return formula


def fused(convention: str = "cosine", eps: float = 1e-8):
    return lambda p, z: sslfast.negative_cosine(p, z, convention=convention, eps=eps)


def views(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    p = torch.randn(shape, dtype=torch.float64)
    return tuple(t.to(device, dtype) for t in (p, 0.6 * p + torch.randn(shape, dtype=torch.float64)))


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("shape", SHAPES + LONG_SHAPES, ids=str)
def test_value_and_gradients(shape: tuple[int, int], convention: str, dtype: torch.dtype, device: str) -> None:
    with sslfast.use_backend(device):
        # One feature: the cosine is ±1 and the gradient what rounding leaves of 1/‖x‖, which may be large.
        terms = shape[0] if shape[1] > 1 else 1
        check_loss(fused(convention), plain(convention), views(shape, dtype, device), 4.0, terms if terms > 1 else 1)


def test_the_value_is_that_of_pytorch() -> None:
    p, z = views((64, 32), torch.float32)
    torch.testing.assert_close(sslfast.negative_cosine(p, z), -F.cosine_similarity(p, z).mean())
    same_value_and_gradients(lambda p, z: -F.cosine_similarity(p, z).mean(), fused(), p, z)
    distance = (F.normalize(p) - F.normalize(z)).square().sum(1).mean()
    torch.testing.assert_close(sslfast.negative_cosine(p, z, convention="distance"), distance)


@pytest.mark.parametrize("needed", [needed for needed in itertools.product([False, True], repeat=2) if any(needed)])
def test_each_gradient_alone(needed: tuple[bool, bool]) -> None:
    leaves = [x.requires_grad_(n) for x, n in zip(views((37, 19), torch.float32), needed, strict=True)]
    expected = value_and_gradients(fused(), *leaves)[1:]
    wanted = [x for x in leaves if x.requires_grad]
    loss = sslfast.negative_cosine(*leaves)
    found = torch.autograd.grad(loss, wanted, torch.full_like(loss, GRAD_LOSS))
    for mine, true in zip(found, [e for e, n in zip(expected, needed, strict=True) if n], strict=True):
        assert torch.equal(mine, true)


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eps_and_rows_of_zeros(dtype: torch.dtype, device: str) -> None:
    p, z = views((6, 37), torch.float64)
    lengths = torch.tensor([0.0, 1e-3, 0.49, 0.51, 1.0, 30.0]).double()
    p, z = (x * (n / x.norm(dim=1))[:, None] for x, n in ((p, lengths), (z, lengths.flip(0))))  # norms around eps
    p, z = p.to(device, dtype), z.to(device, dtype)
    with sslfast.use_backend(device):
        check_loss(fused(eps=0.5), plain(eps=0.5), (p, z), 4.0, 1)
        zero = torch.zeros(2, 5, device=device, dtype=dtype)
        loss, dp, dz = value_and_gradients(fused(), zero, torch.ones_like(zero))
    assert loss == 0 and (dz == 0).all()
    wide = torch.finfo(dtype).max if dtype == torch.float16 else 1e30
    expected = (-GRAD_LOSS / 2 / 5**0.5 / 1e-8 * torch.ones(2, 5, dtype=torch.float64)).clamp(min=-wide)
    if dtype != torch.float16:  # whose range ends before 1e8
        torch.testing.assert_close(dp.double().cpu(), expected, rtol=1e-2, atol=0)
    else:
        assert dp.isneginf().all()


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
def test_nonfinite_rows_are_as_in_pytorch(device: str) -> None:
    for place, value in ((0, float("nan")), (1, float("inf")), (2, -float("inf"))):
        p, z = views((5, 83), torch.float32, device)
        p[place, 3] = value
        with sslfast.use_backend(device):
            loss, dp, dz = value_and_gradients(fused(), p, z)
        expected = value_and_gradients(plain(), p, z)
        assert loss.isnan() and expected[0].isnan()
        for mine, true in ((dp, expected[1]), (dz, expected[2])):
            torch.testing.assert_close(mine, true, equal_nan=True, rtol=1e-4, atol=1e-6)
            assert mine[[i for i in range(5) if i != place]].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype: torch.dtype, device: str) -> None:
    base = views((40, 67), dtype, device)
    forms = {
        "transposed": lambda x: x.T,
        "every second column": lambda x: x[:, ::2],
        "one row repeated": lambda x: x[:1].expand(9, -1),
        "a start that is not aligned": lambda x: x.flatten()[1:-2].view(-1, 67 * 40 - 3).narrow(1, 1, 2000),
    }
    for name, form in forms.items():
        p, z = (form(x).detach().requires_grad_() for x in base)
        expected = value_and_gradients(fused(), p.contiguous(), z.contiguous())
        loss = sslfast.negative_cosine(p, z)
        found = loss, *torch.autograd.grad(loss, (p, z), torch.full_like(loss, GRAD_LOSS))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), name


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck_and_double_backward(device: str) -> None:
    p, z = (x.requires_grad_() for x in views((5, 7), torch.float64, device))
    with sslfast.use_backend(device):
        assert torch.autograd.gradcheck(fused(), (p, z))
        assert torch.autograd.gradgradcheck(fused(), (p, z))
        assert torch.autograd.gradcheck(fused(eps=10.0), (p, z))  # below eps in every row
    same = torch.randn(5, 7, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: sslfast.negative_cosine(x, x * x), same)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    p, z = (x.requires_grad_() for x in views((9, 33), dtype, device))
    loss, saved = torch.ops.sslfast.negative_cosine(p.detach(), z.detach(), 1e-8, -1 / 9, 0.0)
    torch.library.opcheck(torch.ops.sslfast.negative_cosine.default, (p, z, 1e-8, -1 / 9, 0.0))
    for needed in ((True, True), (True, False), (False, False)):
        arguments = (loss, p.detach(), z.detach(), saved, 1e-8, -1 / 9, *needed)
        torch.library.opcheck(torch.ops.sslfast.negative_cosine_backward.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_compile_without_graph_breaks(device: str) -> None:
    p, z = views((12, 20), torch.float32, device)
    compiled = torch.compile(fused("distance"), backend="aot_eager", fullgraph=True)
    for mine, true in zip(
        value_and_gradients(compiled, p, z), value_and_gradients(fused("distance"), p, z), strict=True
    ):
        assert torch.equal(mine, true)


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_on_any_number_of_threads(device: str) -> None:
    p, z = views((700, 129), torch.float32, device)
    first, threads = value_and_gradients(fused(), p, z), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        second = value_and_gradients(fused(), p, z)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_mixes_dtypes() -> None:
    p, z = views((16, 8), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sslfast.negative_cosine(p.bfloat16(), z)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, sslfast.negative_cosine(p.bfloat16().float(), z))


def test_forward_mode_is_the_reference_s() -> None:
    (p, z), t = views((6, 4), torch.float64), torch.randn(6, 4, dtype=torch.float64)
    found = torch.func.jvp(lambda x: sslfast.negative_cosine(x, z), (p,), (t,))
    expected = torch.func.jvp(lambda x: reference.negative_cosine(x, z, 1e-8, -1 / 6), (p,), (t,))
    torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------------------------------------------ BYOL, SimSiam


def four(n: int = 33, d: int = 20) -> tuple[Tensor, ...]:
    return tuple(torch.randn(n, d, dtype=torch.float64) for _ in range(4))


def official_byol(p_a: Tensor, p_b: Tensor, z_a: Tensor, z_b: Tensor) -> Tensor:
    """regression_loss of the authors' code, the two directions added."""

    def regression_loss(x: Tensor, y: Tensor) -> Tensor:
        x, y = (t * t.square().sum(1, keepdim=True).clamp(min=1e-12).rsqrt() for t in (x, y))
        return (x - y).square().sum(1)

    return (regression_loss(p_a, z_b.detach()) + regression_loss(p_b, z_a.detach())).mean()


def official_sim_siam(p_a: Tensor, p_b: Tensor, z_a: Tensor, z_b: Tensor) -> Tensor:
    similar = torch.nn.CosineSimilarity(dim=1)
    return -(similar(p_a, z_b.detach()).mean() + similar(p_b, z_a.detach()).mean()) * 0.5


@pytest.mark.parametrize(
    ("loss", "official", "module"),
    [
        (sslfast.byol, official_byol, sslfast.BYOLLoss()),
        (sslfast.sim_siam, official_sim_siam, sslfast.SimSiamLoss()),
    ],
    ids=["byol", "sim_siam"],
)
def test_two_directions(loss, official, module) -> None:
    inputs = [x.requires_grad_() for x in four()]
    found, expected = loss(*inputs), official(*inputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(module(*inputs), expected)
    mine = torch.autograd.grad(found, inputs, allow_unused=True)
    true = torch.autograd.grad(expected, inputs, allow_unused=True)
    torch.testing.assert_close(mine[:2], true[:2])
    assert mine[2:] == true[2:] == (None, None)  # the targets have no gradient


def test_diagnostics_show_a_collapse() -> None:
    """At random the channels' deviation is 1/√D; where all rows point in one direction it is 0, and the loss is −1."""
    p_a, p_b, z_a, z_b = four(2000, 16)
    loss, found = sslfast.SimSiamLoss(diagnostics=True)(p_a, p_b, z_a, z_b)
    assert abs(found.channel_std.item() - 1) < 0.05
    torch.testing.assert_close(found.similarity, -loss)
    one = torch.randn(1, 16, dtype=torch.float64).expand(50, -1) * torch.rand(50, 1, dtype=torch.float64)
    loss, found = sslfast.SimSiamLoss(diagnostics=True)(one, one, one, one)
    assert found.channel_std.item() < 1e-6 and abs(loss.item() + 1) < 1e-12
    loss, found = sslfast.BYOLLoss(diagnostics=True)(p_a, p_b, z_a, z_b)
    torch.testing.assert_close(4 - 4 * found.similarity, loss)
    loss, found = sslfast.NegativeCosineLoss("distance", diagnostics=True)(p_a, z_a)
    torch.testing.assert_close(2 - 2 * found.similarity, loss)
    assert not found.similarity.requires_grad


# --------------------------------------------------------------------------------------------------------- wrong input


def test_bad_input_names_the_argument() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(TypeError, match="p must be a torch.Tensor, got list"):
        sslfast.negative_cosine([[1.0]], x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="p and z must have the same shape"):
        sslfast.negative_cosine(x, x[:2])
    with pytest.raises(TypeError, match="p and z must have the same dtype"):
        sslfast.negative_cosine(x, x.double())
    with pytest.raises(ValueError, match=r"z must be two-dimensional \[rows, features\], got shape \(4,\)"):
        sslfast.negative_cosine(x, x[0])
    with pytest.raises(ValueError, match="at least one row"):
        sslfast.negative_cosine(x[:0], x[:0])
    with pytest.raises(ValueError, match="convention must be one of cosine, distance, got 'mse'"):
        sslfast.negative_cosine(x, x, convention="mse")
    for eps in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"eps must be a positive number, got {eps}"):
            sslfast.NegativeCosineLoss(eps=eps)
    with pytest.raises(ValueError, match="p_a and z_b must have the same shape"):
        sslfast.byol(x, x, x, x[:2])
    with pytest.raises(ValueError, match="p_a and p_b must have the same shape"):
        sslfast.sim_siam(x, x[:2], x[:2], x)


@pytest.mark.parametrize("device", DEVICES)
def test_operators_check_what_they_are_given(device: str) -> None:
    """Called without the public function, with arguments that would read or write out of bounds."""
    x = torch.randn(3, 4, device=device)
    forward, backward = torch.ops.sslfast.negative_cosine, torch.ops.sslfast.negative_cosine_backward
    loss, saved = forward(x, x, 1e-8, 1.0, 0.0)
    wrong = {
        "z has an unexpected shape": lambda: forward(x, x[:2], 1e-8, 1.0, 0.0),
        "z must be Float, got Double": lambda: forward(x, x.double(), 1e-8, 1.0, 0.0),
        "p must be two-dimensional, got 1": lambda: forward(x[0], x[0], 1e-8, 1.0, 0.0),
        "p must be float32, .* got Int": lambda: forward(x.int(), x.int(), 1e-8, 1.0, 0.0),
        "saved has an unexpected shape": lambda: backward(loss, x, x, saved[:2], 1e-8, 1.0, True, True),
        "grad has an unexpected shape": lambda: backward(saved, x, x, saved, 1e-8, 1.0, True, True),
    }
    for message, call in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            call()
    assert forward(x[:0], x[:0], 1e-8, 1.0, 0.5)[0].item() == 0.5
