"""Row-wise L2-normalisation: the kernels against the reference in float64, on every instruction-set level."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from helpers import SHAPES, TOLERANCE, roundings, within_budget
from sslfast import reference

pytestmark = pytest.mark.sanitize

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Beyond the common grid: long rows (a block a row on the GPU), and many tasks of short rows.
LONG_SHAPES = [(1, 70001), (3, 2048), (20000, 3)]


def name_of(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def value_and_gradient(function: object, x: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    y = function(leaf)  # type: ignore[operator]
    (grad_x,) = torch.autograd.grad(y, leaf, grad_y.to(y.dtype))
    return y.detach(), grad_x


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES + LONG_SHAPES, ids=str)
def test_value_and_gradient(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    x, grad_y = (torch.randn(shape, dtype=torch.float64).to(device, dtype) for _ in range(2))
    with sslfast.use_backend(device):
        y, grad_x = value_and_gradient(sslfast.l2_normalize, x, grad_y)
    expected = roundings(value_and_gradient, reference.l2_normalize, x, grad_y)
    truth = value_and_gradient(reference.l2_normalize, x.double(), grad_y.double())
    assert y.dtype == grad_x.dtype == dtype
    within_budget("y", y, expected[0], truth[0], dtype)
    if shape[1] == 1:
        # y = ±1 whatever x is, so the gradient is 0: what is left is the rounding of r·dy.
        size = (grad_y.double() / x.double()).abs()
        assert (grad_x.double().abs() <= TOLERANCE[dtype] * size).all()
    else:
        within_budget("grad_x", grad_x, expected[1], truth[1], dtype)


@pytest.mark.levels
def test_level_in_use() -> None:
    wanted = os.environ.get("SSLFAST_CPU_CAPABILITY") or torch.ops.sslfast.cpu_level_widest()
    assert torch.ops.sslfast.cpu_level() == wanted


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_eps_and_zero_rows(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(6, 37, dtype=torch.float64)
    x *= (torch.tensor([0.0, 1e-3, 0.49, 0.51, 1.0, 30.0]).double() / x.norm(dim=1))[:, None]  # norms around eps = 0.5
    x, grad_y = x.to(device, dtype), torch.randn(6, 37).to(device, dtype)
    with sslfast.use_backend(device):
        y, grad_x = value_and_gradient(lambda t: sslfast.l2_normalize(t, 0.5), x, grad_y)
        zero, grad_zero = value_and_gradient(sslfast.l2_normalize, x[:1].to(torch.float32), grad_y[:1].float())
    expected = roundings(value_and_gradient, lambda t: reference.l2_normalize(t, 0.5), x, grad_y)
    truth = value_and_gradient(lambda t: reference.l2_normalize(t, 0.5), x.double(), grad_y.double())
    within_budget("y", y, expected[0], truth[0], dtype)
    within_budget("grad_x", grad_x, expected[1], truth[1], dtype)
    assert (y[0] == 0).all()
    # Below eps the divisor is the constant eps, also for a row of zeros: dx = dy / eps.
    torch.testing.assert_close(grad_x[:2], grad_y[:2] * 2)
    assert (zero == 0).all()
    torch.testing.assert_close(grad_zero, grad_y[:1].float() / 1e-12)


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name_of)
def test_nonfinite_rows_are_as_in_pytorch(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(7, 83, dtype=torch.float64)
    x[1, 5] = float("inf")
    x[2, 80] = float("-inf")
    x[3, 0] = float("nan")
    x[4, [3, 81]] = float("inf")
    x[5] *= 1e30 if dtype != torch.float64 else 1e200  # finite, but the sum of squares is not: y = 0
    x, grad_y = x.to(device, dtype), torch.randn(7, 83).to(device, dtype)
    with sslfast.use_backend(device):
        y, grad_x = value_and_gradient(sslfast.l2_normalize, x, grad_y)
    wide = x if dtype == torch.float64 else x.float()
    expected = value_and_gradient(reference.l2_normalize, wide, grad_y)
    torch.testing.assert_close(y, expected[0].to(dtype), equal_nan=True)
    torch.testing.assert_close(grad_x, expected[1].to(dtype), equal_nan=True)
    assert y[1, 5].isnan() and (y[5] == 0).all() and y[[0, 6]].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_float16_norm_beyond_its_range_is_exact(device: str) -> None:
    """F.normalize rounds the norm to float16 (infinity above 65504, 0 for eps); here it stays float32."""
    x = (torch.randn(4, 600) * 2e4).clamp(-6e4, 6e4).to(device, torch.float16)
    x[3] = 0
    with sslfast.use_backend(device):
        y = sslfast.l2_normalize(x)
    torch.testing.assert_close(y, F.normalize(x.double()).half(), rtol=2e-3, atol=1e-6)
    assert (y[3] == 0).all()


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_half_conversions_round_to_nearest_even(dtype: torch.dtype, device: str) -> None:
    """Every bit pattern through the kernel as a row of one element, with eps so large that y = x · (1/eps)."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.abs() < 1e15].to(device)  # squares stay finite, and below eps²
    largest = x.double().abs().max().item()
    for eps in (largest * 1.5, largest * 3.3, largest * 2.0**9):  # the last makes float16 subnormal
        with sslfast.use_backend(device):
            y = sslfast.l2_normalize(x[:, None], eps)[:, 0]
        scale = 1 / torch.tensor(eps, dtype=torch.float32, device=device)
        assert torch.equal(y, (x.float() * scale).to(dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_strides_and_offsets(dtype: torch.dtype, device: str) -> None:
    base = torch.randn(40, 67).to(device, dtype)
    grad = torch.randn(67, 40).to(device, dtype)
    views = {
        "transposed": base.T,
        "every second column": base[:, ::2],
        "rows backwards": base.flip(0),
        "one row repeated": base[:1].expand(9, -1),
        "a start that is not aligned": base.flatten()[1:-2].view(-1, 67 * 40 - 3).narrow(1, 1, 2000),
    }
    for name, x in views.items():
        grad_y = grad.flatten()[: x.numel()].view(x.shape[::-1]).T  # not contiguous either
        with sslfast.use_backend(device):
            got = value_and_gradient_of_view(x, grad_y)
            expected = value_and_gradient(sslfast.l2_normalize, x.contiguous(), grad_y.contiguous())
        assert torch.equal(got[0], expected[0]), name
        assert torch.equal(got[1], expected[1]), name


def value_and_gradient_of_view(x: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    """As value_and_gradient(), but the operator sees ``x`` with its own strides."""
    x = x.detach().requires_grad_()
    y = sslfast.l2_normalize(x)
    return y.detach(), torch.autograd.grad(y, x, grad_y)[0]


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck_and_double_backward(device: str) -> None:
    x = torch.randn(5, 7, dtype=torch.float64, device=device, requires_grad=True)
    with sslfast.use_backend(device):
        assert torch.autograd.gradcheck(sslfast.l2_normalize, x)
        assert torch.autograd.gradgradcheck(sslfast.l2_normalize, x)
        assert torch.autograd.gradcheck(lambda t: sslfast.l2_normalize(t, 10.0), x)  # below eps in every row


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    x, grad_y = (torch.randn(9, 33).to(device, dtype) for _ in range(2))
    inv_norm = torch.ops.sslfast.l2_normalize(x, 1e-12)[1]
    torch.library.opcheck(torch.ops.sslfast.l2_normalize.default, (x.clone().requires_grad_(), 1e-12))
    torch.library.opcheck(torch.ops.sslfast.l2_normalize.default, (x.T, 1e-12))
    torch.library.opcheck(torch.ops.sslfast.l2_normalize_backward.default, (grad_y, x, inv_norm, 1e-12))


@pytest.mark.parametrize("device", DEVICES)
def test_compile_without_graph_breaks(device: str) -> None:
    x, grad_y = torch.randn(12, 20, device=device), torch.randn(12, 20, device=device)
    compiled = torch.compile(sslfast.l2_normalize, backend="aot_eager", fullgraph=True)
    for got, expected in zip(
        value_and_gradient(compiled, x, grad_y), value_and_gradient(sslfast.l2_normalize, x, grad_y), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_run_to_run(device: str) -> None:
    x, grad_y = torch.randn(700, 129, device=device), torch.randn(700, 129, device=device)
    first = value_and_gradient(sslfast.l2_normalize, x, grad_y)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # nor does the number of threads change a row
        second = value_and_gradient(sslfast.l2_normalize, x, grad_y)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.gpu
def test_cuda_graph_captures_it() -> None:
    x = torch.randn(50, 96, device="cuda")
    sslfast.l2_normalize(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sslfast.l2_normalize(x)
    x.mul_(-3).add_(1)
    graph.replay()
    torch.testing.assert_close(y, F.normalize(x))


def test_bad_input_names_the_argument() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(TypeError, match="x must be a torch.Tensor, got list"):
        sslfast.l2_normalize([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="x must be float32, .* got torch.int64"):
        sslfast.l2_normalize(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x must be two-dimensional \[rows, features\], got shape \(4,\)"):
        sslfast.l2_normalize(x[0])
    with pytest.raises(ValueError, match=r"at least one row and one feature, got shape \(3, 0\)"):
        sslfast.l2_normalize(x[:, :0])
    for eps in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"eps must be positive, got {eps}"):
            sslfast.l2_normalize(x, eps)


@pytest.mark.parametrize("device", DEVICES)
def test_operators_check_what_they_are_given(device: str) -> None:
    """Called without the public function, with arguments that would read or write out of bounds."""
    x = torch.randn(3, 4, device=device)
    y, inv_norm = torch.ops.sslfast.l2_normalize(x, 1e-12)
    backward = torch.ops.sslfast.l2_normalize_backward
    with pytest.raises(RuntimeError, match="grad_y has an unexpected shape"):
        backward(y[:2], x, inv_norm, 1e-12)
    with pytest.raises(RuntimeError, match="grad_y must be Float, got Double"):
        backward(y.double(), x, inv_norm, 1e-12)
    with pytest.raises(RuntimeError, match="inv_norm has an unexpected shape"):
        backward(y, x, inv_norm[:2], 1e-12)
    with pytest.raises(RuntimeError, match="x must be two-dimensional, got 1"):
        torch.ops.sslfast.l2_normalize(x[0], 1e-12)
    with pytest.raises(RuntimeError, match="x must be float32, float64, bfloat16 or float16, got Int"):
        torch.ops.sslfast.l2_normalize(x.int(), 1e-12)
    empty, inv_norm = torch.ops.sslfast.l2_normalize(x[:0], 1e-12)
    assert empty.shape == (0, 4) and inv_norm.shape == (0,)
