"""The Triton kernels of characteristic_sums: through the interpreter where there is no GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import sslfast
from helpers import roundings, same_nonfinite, within_budget
from sslfast import _native, reference
from sslfast.ops.characteristic_sums import characteristic_sums

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = _native.why_no_triton(DEVICE)
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON))]
if torch.cuda.is_available():  # else these tests run in the interpreter
    pytestmark.append(pytest.mark.gpu)

STEP = 3 / 16
# (views, rows, features, slices, knots): one of each; ragged in all; rows and knots for several programs.
SHAPES = [(1, 1, 1, 1, 1), (2, 37, 13, 50, 16), (1, 150, 6, 33, 35), (3, 20, 130, 40, 9)]


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, size: float = 1.0) -> tuple[Tensor, Tensor]:
    views, n, d, s, _ = shape
    random = torch.Generator().manual_seed(n)
    z = (size * torch.randn(views, n, d, generator=random) + 0.3).to(DEVICE, dtype)
    return z, torch.nn.functional.normalize(torch.randn(d, s, generator=random), dim=0).to(DEVICE)


def run(function: Any, z: Tensor, slices: Tensor, kind: torch.dtype, knots: int) -> list[Tensor]:
    leaf = z.to(kind, copy=True).requires_grad_()
    sums = function(leaf, slices.double() if kind == torch.float64 else slices, knots, STEP)
    weights = torch.randn(sums.shape, generator=torch.Generator().manual_seed(1)).to(sums)
    return [sums.detach(), *torch.autograd.grad(sums, leaf, weights)]


def check(z: Tensor, slices: Tensor, knots: int) -> list[Tensor]:
    with sslfast.use_backend("triton"):
        kernel = run(characteristic_sums, z, slices, z.dtype, knots)
    plain = roundings(run, reference.characteristic_sums, z, slices, torch.float32, knots)
    truth = run(reference.characteristic_sums, z, slices, torch.float64, knots)
    for what, k, p, t, floor in zip(("sums", "dz"), kernel, plain, truth, (1.0, STEP * knots), strict=True):
        within_budget(what, k, p.to(k.dtype), t, k.dtype, floor)
    return kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(*make(shape, dtype), shape[-1])


@pytest.mark.parametrize("size", [1e-4, 50.0, 3e4])
def test_small_and_large_projections(size: float) -> None:
    check(*make((1, 20, 6, 33, 16), size=size), 16)


def test_bands_of_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    from sslfast.kernels import characteristic_sums as kernel

    z, slices = make((2, 20, 6, 75, 5))
    whole = check(z, slices, 5)
    monkeypatch.setattr(kernel, "BAND_BYTES", 1)
    assert len(kernel._bands(40, 75)) == 3
    for a, b in zip(check(z, slices, 5), whole, strict=True):
        torch.testing.assert_close(a, b)


def test_rows_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the rows for each program; some programs have none."""
    from sslfast.kernels import characteristic_sums as kernel

    monkeypatch.setattr(kernel, "best_split", lambda *_: 4)
    check(*make((1, 330, 4, 10, 5)), 5)


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy on ∞ − ∞, in the interpreter
def test_nonfinite_and_strides() -> None:
    z, slices = make((2, 20, 5, 7, 4))
    for bad in (math.nan, math.inf):
        poisoned = z.clone()
        poisoned[1, 3, 2] = bad
        with sslfast.use_backend("triton"):
            found = run(characteristic_sums, poisoned, slices, torch.float32, 4)
        for name, a, b in zip(
            ("sums", "dz"), found, run(reference.characteristic_sums, poisoned, slices, torch.float32, 4), strict=True
        ):
            same_nonfinite(name, a, b)
    with sslfast.use_backend("triton"):
        one = characteristic_sums(z, slices, 4, STEP)
        two = characteristic_sums(z.transpose(0, 1).contiguous().transpose(0, 1), slices.T.contiguous().T, 4, STEP)
    torch.testing.assert_close(one, two)  # the library adds in another order


def test_operator() -> None:
    z, slices = make((1, 5, 3, 4, 3))
    torch.library.opcheck(torch.ops.sslfast.characteristic_sums_triton.default, (z.requires_grad_(), slices, 3, STEP))


def test_float64_is_refused() -> None:
    z, slices = make((1, 5, 3, 4, 3))
    with sslfast.use_backend("triton"), pytest.raises(RuntimeError, match="not float64"):
        characteristic_sums(z.double(), slices.double(), 3, STEP)
