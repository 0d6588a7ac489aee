"""The mean softmax over prototypes, cross entropies and entropies against the formulas in float64, on every level."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sslfast
from helpers import roundings, within_budget
from sslfast import reference
from sslfast.ops.mean_assignment import mean_assignment

pytestmark = pytest.mark.sanitize

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TEMPERATURE = 0.3
# Rows, prototypes, targets: several pieces, ragged chunks, one of all, one target for all rows, one prototype.
SIZES = [(22, 64, 2), (17, 257, 17), (1, 1, 1), (5, 1301, 1), (9, 1, 3), (3, 1024, 3), (2, 5003, 1)]


def name_of(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def wide_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def drawn(sizes: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, K], targets [R, K] that do not sum to 1, weights [B]."""
    batch, prototypes, count = sizes
    x = torch.randn(batch, prototypes, dtype=torch.float64).to(device, dtype)
    targets = 1.3 * torch.randn(count, prototypes, dtype=torch.float64).softmax(-1)
    return x, targets.to(device, wide_of(dtype)), torch.rand(batch, dtype=torch.float64).to(device, wide_of(dtype))


def weights_of_outputs(x: Tensor) -> list[Tensor]:
    """A gradient of each of the three results."""
    draw = torch.Generator().manual_seed(5)
    shapes = (x.shape[1], len(x), len(x))
    return [torch.randn(n, generator=draw, dtype=torch.float64).to(x.device) for n in shapes]


Results = tuple[Tensor, ...]  # the three, and the gradient of the logits


def with_gradient(found: Results, leaf: Tensor, grads: list[Tensor]) -> Results:
    pairs = [(out, grad.to(out.dtype)) for out, grad in zip(found, grads, strict=True) if out.requires_grad]
    (grad,) = torch.autograd.grad([out for out, _ in pairs], leaf, [grad for _, grad in pairs])
    return *(out.detach() for out in found), grad


def kernel(x: Tensor, targets: Tensor | None, weights: Tensor | None, grads: list[Tensor], rows=None) -> Results:
    leaf = x.detach().clone().requires_grad_()
    return with_gradient(mean_assignment(leaf, targets, weights, TEMPERATURE, rows), leaf, grads)


def plain(x: Tensor, targets: Tensor | None, weights: Tensor | None, *grads: Tensor) -> Results:
    leaf = x.detach().clone().requires_grad_()
    found = reference.mean_assignment(leaf, targets, weights, TEMPERATURE)
    return with_gradient(found, leaf, list(grads))


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradient(sizes: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    x, targets, weights = drawn(sizes, dtype, device)
    grads, wide = weights_of_outputs(x), wide_of(dtype)
    for t, w in ((targets, weights), (None, None)):
        with sslfast.use_backend(device):
            found = kernel(x, t, w, grads)
        single = roundings(plain, x.to(wide), t, w, *grads)
        doubles = [None if y is None else y.double() for y in (t, w)]
        truth = plain(x.double(), *doubles, *grads)
        assert [out.dtype for out in found] == [wide] * 3 + [dtype]
        size = max(grad.abs().max().item() for grad in grads) * 3 / TEMPERATURE
        floors = (float(len(x)) ** 0.5, 10.0, 10.0, size)
        for name, mine, own, true, floor in zip(
            ("sums", "cross entropy", "entropy", "gradient"), found, single, truth, floors, strict=True
        ):
            kind = dtype if name == "gradient" else wide
            within_budget(name, mine, own.to(kind), true, kind, floor=floor)


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
def test_each_result_alone_has_its_gradient(device: str) -> None:
    x, targets, weights = drawn((6, 700, 3), torch.float64, device)
    grads = weights_of_outputs(x)
    for place in range(3):
        with sslfast.use_backend(device):
            leaf = x.clone().requires_grad_()
            out = mean_assignment(leaf, targets, weights, TEMPERATURE)[place]
            (found,) = torch.autograd.grad(out, leaf, grads[place])
        alone = [grad if i == place else torch.zeros_like(grad) for i, grad in enumerate(grads)]
        torch.testing.assert_close(found, plain(x, targets, weights, *alone)[3], rtol=1e-12, atol=1e-14)


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
def test_a_common_shift_costs_no_digit(device: str) -> None:
    """But for the rounding of x·log2(e)/τ, where the level has no fused multiply-add: 300 of 2⁻²⁴ each."""
    x, targets, weights = drawn((5, 700, 5), torch.float32, device)
    x = (x + 64).requires_grad_()
    grads = weights_of_outputs(x)
    with sslfast.use_backend(device):
        found = kernel(x, targets / 1.3, weights, grads)
    truth = plain(x.double(), targets.double() / 1.3, weights.double(), *grads)
    for mine, true in zip(found, truth, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=4e-5, atol=2e-5)


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
def test_logits_far_apart_stay_finite(device: str) -> None:
    """Where p is 0: the cross entropy is that of the logarithms, and 0·ln 0 is 0."""
    x = torch.zeros(3, 600, device=device)
    x[0, 7], x[1, :] = -1100.0, torch.linspace(0, 5000, 600)
    targets = torch.full((1, 600), 1 / 600, device=device)
    grads = weights_of_outputs(x)
    with sslfast.use_backend(device):
        found = kernel(x, targets, None, grads)
    for mine, true in zip(found, plain(x.double(), targets.double(), None, *grads), strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-4)


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_nonfinite_logits_are_as_in_pytorch(dtype: torch.dtype, device: str) -> None:
    x, _, weights = drawn((7, 600, 7), dtype, device)
    x[0, :550], x[1, 3], x[2, 0] = float("-inf"), float("-inf"), float("nan")
    x[3, 580], x[4] = float("inf"), float("-inf")
    for rows in ([0, 1, 5, 6], [2], [3], [4]):
        some, w = x[rows], weights[rows]
        grads = weights_of_outputs(some)
        with sslfast.use_backend(device):
            found = kernel(some, None, w, grads)
        expected = plain(some.float(), None, w, *grads)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine.float(), theirs, rtol=1e-2, atol=1e-2, equal_nan=True)
        assert found[0].isnan().any() == (rows[0] in (2, 3, 4))


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_rows_that_count(count: int, device: str) -> None:
    x, targets, weights = drawn((6, 90, 4), torch.float32, device)
    counted = min(count, 6)
    x[counted:], weights[counted:] = float("nan"), float("nan")
    rows, grads = torch.tensor(count, device=device), weights_of_outputs(x)
    expected = plain(x[:counted], targets, weights[:counted], grads[0], *(g[:counted] for g in grads[1:]))
    for backend in (device, "reference"):
        with sslfast.use_backend(backend):
            sums, *of_rows, gradient = kernel(x, targets, weights, grads, rows)
        torch.testing.assert_close(sums, expected[0], rtol=1e-5, atol=1e-6)
        for mine, true in zip((*of_rows, gradient), expected[1:], strict=True):
            assert (mine[counted:] == 0).all()
            torch.testing.assert_close(mine[:counted], true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck_and_double_backward(device: str) -> None:
    x, targets, weights = drawn((4, 5, 2), torch.float64, device)
    leaf = x.clone().requires_grad_()
    with sslfast.use_backend(device):
        for t, w, learning in ((targets, weights, 1), (None, None, 2)):  # a cross entropy with nothing is a constant

            def function(y: Tensor, t=t, w=w, learning=learning) -> tuple[Tensor, ...]:
                return mean_assignment(y, t, w, TEMPERATURE)[::learning]

            assert torch.autograd.gradcheck(function, leaf)
            assert torch.autograd.gradgradcheck(function, leaf)


@pytest.mark.parametrize("device", DEVICES)
def test_strides_and_the_same_bits_twice(device: str) -> None:
    x, targets, weights = drawn((9, 40, 3), torch.float32, device)
    grads = weights_of_outputs(x)
    whole = kernel(x, targets, weights, grads)
    leaf = x.T.contiguous().T.requires_grad_()
    spread = [targets.T.contiguous().T, weights.repeat_interleave(2)[::2]]
    strided = with_gradient(mean_assignment(leaf, *spread, TEMPERATURE), leaf, grads)
    for again in (strided, kernel(x, targets, weights, grads)):
        assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))
    leaf = x.clone().requires_grad_()
    mean_assignment(leaf, targets, weights, TEMPERATURE)[0].sum().backward()  # an expanded gradient
    assert leaf.grad is not None and leaf.grad.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    x, targets, weights = drawn((6, 40, 2), torch.float32, device)
    rows, operator = torch.tensor(4, device=device), torch.ops.sslfast.mean_assignment
    torch.library.opcheck(operator.default, (x.clone().requires_grad_(), targets, weights, 0.3, None))
    torch.library.opcheck(operator.default, (x, None, None, 0.3, rows))
    found = operator(x, targets, weights, 0.3, rows)
    tests = ("test_schema", "test_faketensor")
    backward = torch.ops.sslfast.mean_assignment_backward.default
    for grads in (found[:3], (found[0], None, None), (None, *found[1:3])):
        torch.library.opcheck(backward, (*grads, x, targets, weights, found[3], 0.3, rows), test_utils=tests)


def test_operators_check_what_they_are_given() -> None:
    x, targets, weights = drawn((6, 40, 2), torch.float32)
    call = torch.ops.sslfast.mean_assignment
    for arguments, message in (
        ((x[0], targets, weights, 0.3), "logits must have two dimensions, got 1"),
        ((x, targets[0], weights, 0.3), "targets must have at least one row"),
        ((x, targets[:0], weights, 0.3), "targets must have at least one row"),
        ((x, targets[:, 1:], weights, 0.3), "targets has an unexpected shape"),
        ((x, targets.double(), weights, 0.3), "targets must be Float, got Double"),
        ((x, targets, weights[1:], 0.3), "weights has an unexpected shape"),
        ((x, targets, weights, 0.0), "temperature must be finite and not zero, got 0"),
        ((x.long(), None, None, 0.3), "logits must be float32, float64, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*arguments, None)
    found = call(x, targets, weights, 0.3, None)
    backward = torch.ops.sslfast.mean_assignment_backward
    for grads, stats, message in (
        ((found[0][1:], None, None), found[3], "grad_sums has an unexpected shape"),
        ((None, found[1][1:], None), found[3], "grad_cross_entropy has an unexpected shape"),
        ((None, None, found[2].double()), found[3], "grad_entropy must be Float, got Double"),
        ((found[0], None, None), found[3][1:], "stats has an unexpected shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backward(*grads, x, targets, weights, stats, 0.3, None)
