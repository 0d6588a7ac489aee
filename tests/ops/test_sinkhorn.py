"""Sinkhorn in the log domain against the textbook's exponentials in float64, on every instruction-set level."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sslfast
from helpers import SHAPES, roundings, within_budget
from sslfast import reference
from sslfast.ops import sinkhorn as op

pytestmark = pytest.mark.sanitize

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LONG_SHAPES = [(1, 1), (5, 5003), (1030, 7), (21, 512)]


def name_of(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def official(x: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """swav's ``distributed_sinkhorn`` of rows [B, K], in exponentials."""
    q = torch.exp(x / temperature).T
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / len(q)
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def from_rows(x: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """MSN's, of probabilities."""
    return official(torch.log_softmax(x / temperature, 1), 1.0, iterations)


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES + LONG_SHAPES, ids=str)
def test_assignments(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    x = torch.randn(shape, dtype=torch.float64).to(device, dtype)
    for start, textbook in (("columns", official), ("rows", from_rows)):

        def plain(x: Tensor, textbook=textbook) -> Tensor:
            return textbook(x, 0.2)

        with sslfast.use_backend(device):
            q = sslfast.sinkhorn(x, 0.2, start=start)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert q.dtype == wide and q.shape == shape
        within_budget(start, q, roundings(plain, x.to(wide)), plain(x.double()), wide)


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_positions_are_balanced_each_on_its_own(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(19, 5, 70, dtype=torch.float64).to(device, dtype)
    with sslfast.use_backend(device):
        q = sslfast.sinkhorn(x, 0.3)
        each = torch.stack([sslfast.sinkhorn(x[:, s], 0.3) for s in range(5)], 1)
        bias = sslfast.sinkhorn_bias(x, 0.3)
    torch.testing.assert_close(q, each, rtol=1e-5, atol=1e-6)
    assert bias.shape == (5, 70)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_the_bias_makes_the_assignments(iterations: int, device: str) -> None:
    x = torch.randn(33, 41, dtype=torch.float64, device=device)
    for backend in (device, "reference"):
        with sslfast.use_backend(backend):
            bias = sslfast.sinkhorn_bias(x, 0.1, iterations)
        torch.testing.assert_close(torch.softmax(x / 0.1 + bias, 1), official(x, 0.1, iterations))
    torch.testing.assert_close(sslfast.sinkhorn_bias(x, 0.1, iterations), bias)


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
def test_large_logits_stay_finite_and_right(device: str) -> None:
    """Where exp(x/τ) overflows: 4.0 at τ = 0.04 in float32, ±0.6 at 0.05 in float16; and far apart, both ways."""
    cases = [(torch.randn(64, 32) + 4.0, 0.04), ((torch.randn(64, 32) * 0.3).clamp(-0.6, 0.6).half(), 0.05)]
    cases += [(torch.randn(16, 100) * 40, 0.04), (torch.randn(300, 3) * 40, 0.04)]
    for x, temperature in cases:
        x = x.to(device)
        truth = reference.sinkhorn_bias(x.double().unsqueeze(1), temperature)[0]
        with sslfast.use_backend(device):
            bias, q = sslfast.sinkhorn_bias(x, temperature), sslfast.sinkhorn(x, temperature)
        assert bias.isfinite().all() and q.isfinite().all()
        torch.testing.assert_close(q.sum(1), torch.ones_like(q[:, 0]))
        torch.testing.assert_close(bias.double(), truth, rtol=1e-5, atol=2e-3)  # of sizes up to thousands
    assert official(cases[0][0], 0.04).isnan().any()


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name_of)
def test_infinite_and_nan_logits(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(11, 50).to(device, dtype)
    x[3, :40] = float("-inf")  # excluded pairs
    x[:, 7] = float("-inf")  # a prototype without mass
    with sslfast.use_backend(device):
        q = sslfast.sinkhorn(x, 0.5)
    kept = [k for k in range(50) if k != 7]
    torch.testing.assert_close(q[:, kept].double(), official(x.double()[:, kept], 0.5), rtol=1e-5, atol=1e-6)
    assert (q[:, 7] == 0).all()
    for wrong in ("nan", "inf"):
        x[5, 9] = float(wrong)
        with sslfast.use_backend(device):
            assert sslfast.sinkhorn(x, 0.5).isnan().any() and sslfast.sinkhorn_bias(x, 0.5).isnan().any()


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [0, 1, 9, 30, 77])
def test_rows_that_count(count: int, device: str) -> None:
    """The others are not looked at, whatever they hold."""
    x = torch.randn(30, 2, 20, device=device)
    x[count:] = float("nan")
    rows = torch.tensor([count], device=device)
    for backend in (device, "reference"):
        with sslfast.use_backend(backend):
            q, bias = sslfast.sinkhorn(x, 0.3, rows=rows), sslfast.sinkhorn_bias(x, 0.3, rows=rows)
            some = sslfast.sinkhorn(x[:count], 0.3)
        torch.testing.assert_close(q[: min(count, 30)], some)
        assert (q[count:] == 0).all() and bias.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_strides_gradients_and_bits(device: str) -> None:
    base = torch.randn(40, 67, device=device)
    for x in (base.T, base[:, ::2], base[:1].expand(9, -1), base.flatten()[1:1001].view(10, 100)):
        with sslfast.use_backend(device):
            assert torch.equal(sslfast.sinkhorn(x), sslfast.sinkhorn(x.contiguous()))
    x = base.requires_grad_()
    assert not sslfast.sinkhorn(x).requires_grad and not sslfast.sinkhorn_bias(x).requires_grad
    assert torch.equal(sslfast.sinkhorn_bias(x), sslfast.sinkhorn_bias(x))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_and_compile(device: str) -> None:
    x, rows = torch.randn(9, 2, 33, device=device), torch.tensor(7, device=device)
    ops = torch.ops.sslfast
    bias = ops.sinkhorn_bias(x, 0.3, 3, False, rows)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.sinkhorn_bias.default, (x, 0.3, 3, True, None), test_utils=tests)
    torch.library.opcheck(ops.sinkhorn_sums.default, (x, bias, 0.3, rows), test_utils=tests)
    torch.library.opcheck(ops.sinkhorn_sums.default, (x, None, 0.3, None), test_utils=tests)
    torch.library.opcheck(ops.sinkhorn_assign.default, (x, bias, 0.3, rows), test_utils=tests)
    compiled = torch.compile(lambda x: sslfast.sinkhorn(x, 0.3), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x[:, 0]), sslfast.sinkhorn(x[:, 0], 0.3))


def test_column_sums_are_the_references() -> None:
    x = torch.randn(50, 3, 37, dtype=torch.float64)
    for f in (None, torch.randn(3, 37, dtype=torch.float64)):
        found = op.column_sums(x, f, 0.2)
        expected = reference.sinkhorn_sums(x, f, 0.2)
        if f is None:
            torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])
    torch.testing.assert_close(op.updated(f, *expected), reference.sinkhorn_update(f, *expected))


def test_bad_input_names_the_argument() -> None:
    x = torch.randn(3, 4)
    for wrong, error, message in (
        ({"logits": [[1.0]]}, TypeError, "logits must be a torch.Tensor, got list"),
        ({"logits": x.int()}, TypeError, "logits must be float32, .* got torch.int32"),
        ({"logits": x[0]}, ValueError, r"logits must be \[B, K\] or \[B, S, K\] .* got shape \(4,\)"),
        ({"logits": x[:, :0]}, ValueError, r"with K at least 1, got shape \(3, 0\)"),
        ({"temperature": 0.0}, ValueError, "temperature must be finite and not zero"),
        ({"temperature": float("nan")}, ValueError, "temperature must be finite"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number, got str"),
        ({"iterations": 0}, ValueError, "iterations must be a whole number of at least 1, got 0"),
        ({"start": "both"}, ValueError, "start must be one of 'columns', 'rows', got 'both'"),
        ({"rows": torch.tensor([1, 2])}, ValueError, "rows must be a tensor of one whole number"),
        ({"rows": torch.tensor(1.0)}, ValueError, "rows must be a tensor of one whole number"),
    ):
        for function in (sslfast.sinkhorn, sslfast.sinkhorn_bias):
            with pytest.raises(error, match=message):
                function(**{"logits": x, **wrong})  # type: ignore[arg-type]


def test_operators_check_what_they_are_given() -> None:
    x = torch.randn(3, 2, 4)
    with pytest.raises(RuntimeError, match="logits must have three dimensions, got 2"):
        torch.ops.sslfast.sinkhorn_bias(x[0], 0.1, 3, False, None)
    with pytest.raises(RuntimeError, match="temperature must be finite and not zero, got 0"):
        torch.ops.sslfast.sinkhorn_bias(x, 0.0, 3, False, None)
    with pytest.raises(RuntimeError, match="rows must be Long, got Int"):
        torch.ops.sslfast.sinkhorn_bias(x, 0.1, 3, False, torch.tensor(1, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="bias has an unexpected shape"):
        torch.ops.sslfast.sinkhorn_assign(x, torch.zeros(2, 3), 0.1, None)
    with pytest.raises(RuntimeError, match="logits must be float32, .* got Int"):
        torch.ops.sslfast.sinkhorn_bias(x.int(), 0.1, 3, False, None)
