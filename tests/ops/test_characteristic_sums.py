"""characteristic_sums on the CPU: sums and gradient against the reference in float64, and the operator's contracts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import sslfast
from helpers import DTYPES, roundings, within_budget
from sslfast import reference
from sslfast._checks import accumulator
from sslfast.ops.characteristic_sums import characteristic_sums

pytestmark = pytest.mark.sanitize

# (views, rows, features, slices, knots): aligned; ragged everywhere; one of each; rows shared by several tasks; wide;
# many slices; groups of eight knots that are whole, and one more.
SHAPES = [
    (2, 64, 64, 128, 16),
    (3, 37, 13, 50, 16),
    (1, 1, 1, 1, 1),
    (1, 700, 5, 3, 4),
    (1, 9, 700, 17, 9),
    (1, 5, 3, 401, 8),
    (2, 33, 20, 33, 40),
]


def make(shape: tuple[int, ...], dtype: torch.dtype, size: float = 1.0) -> tuple[Tensor, Tensor]:
    views, n, d, s, _ = shape
    random = torch.Generator().manual_seed(n * d + s)
    z = size * torch.randn(views, n, d, generator=random, dtype=torch.float64) + 0.3
    slices = torch.nn.functional.normalize(torch.randn(d, s, generator=random, dtype=torch.float64), dim=0)
    z = z.to(dtype)
    return z, slices.to(accumulator(z))


def run(function: Any, z: Tensor, slices: Tensor, kind: torch.dtype, knots: int, step: float) -> list[Tensor]:
    """Sums and the gradient of a sum of them that is weighted at random, computed in ``kind``."""
    leaf = z.to(kind, copy=True).requires_grad_()
    sums = function(leaf, slices.to(accumulator(leaf)), knots, step)
    weights = torch.randn(sums.shape, generator=torch.Generator().manual_seed(1)).to(sums.dtype)
    return [sums.detach(), *torch.autograd.grad(sums, leaf, weights)]


def check(shape: tuple[int, ...], dtype: torch.dtype, size: float = 1.0, step: float = 3 / 16) -> None:
    z, slices = make(shape, dtype, size)
    wide = accumulator(z)
    kernel = run(characteristic_sums, z, slices, dtype, shape[-1], step)
    assert kernel[0].dtype == wide and kernel[1].dtype == dtype
    plain = roundings(run, reference.characteristic_sums, z, slices, wide, shape[-1], step)
    truth = run(reference.characteristic_sums, z, slices, torch.float64, shape[-1], step)
    # A sine that vanishes is the difference of products that do not; so is the gradient's sum over the knots.
    floors = (1.0, step * shape[-1])
    for what, k, p, t, floor in zip(("sums", "dz"), kernel, plain, truth, floors, strict=True):
        within_budget(what, k, p.to(k.dtype), t, dtype if what == "dz" else wide, floor)


@pytest.mark.levels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(shape, dtype)


@pytest.mark.levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e-4, 50.0, 3e4])
def test_small_and_large_projections(size: float, dtype: torch.dtype) -> None:
    """Whole turns leave the angle as it is, whatever their number; errors are those of a rounded projection."""
    check((2, 40, 12, 35, 16), dtype, size)


@pytest.mark.levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_angles_of_any_size(dtype: torch.dtype) -> None:
    """One feature, one slice: the projection is the number itself, and 2/π is the only rounding."""
    for exponent in (0, 10, 20, 30, 45, 80, 120):
        x = torch.tensor([1.0, 1.1, -1.7, 1.9], dtype=dtype).mul(2.0**exponent).view(1, -1, 1)
        sums = torch.stack([characteristic_sums(row.view(1, 1, 1), x.new_ones(1, 1), 1, 1.0) for row in x.flatten()])
        assert ((sums.abs() <= 1 + 1e-6) & sums.isfinite()).all()
        torch.testing.assert_close(sums.square().sum((1, 2, 3, 4)), torch.ones(4, dtype=dtype))
        if exponent == 0:
            right = torch.stack([x.cos().flatten(), x.sin().flatten()], 1)
            torch.testing.assert_close(sums.flatten(1), right)


@pytest.mark.levels
def test_nan_and_infinity_stay_in_their_view() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        z, slices = make((3, 40, 5, 37, 16), torch.float32)
        z[1, 7, 2] = bad
        z.requires_grad_()
        sums = characteristic_sums(z, slices, 16, 3 / 16)
        assert sums[:, 1].isnan().all() and sums[:, [0, 2]].isfinite().all()
        (grad,) = torch.autograd.grad(sums.sum(), z)
        assert grad[1, 7].isnan().all() and grad[[0, 2]].isfinite().all()
        assert grad[1, 6].isfinite().all()  # the gradient of the others' sines knows nothing of this row


def test_same_bits_twice_and_any_strides() -> None:
    z, slices = make((2, 300, 30, 130, 16), torch.float32)
    one, two = (run(characteristic_sums, z, slices, torch.float32, 16, 0.2) for _ in range(2))
    strided = run(characteristic_sums, z.transpose(0, 1).contiguous().transpose(0, 1), slices, torch.float32, 16, 0.2)
    transposed = run(characteristic_sums, z, slices.T.contiguous().T, torch.float32, 16, 0.2)
    for other in (two, strided, transposed):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_derivatives_opcheck_and_compile() -> None:
    z, slices = make((2, 5, 3, 4, 9), torch.float64)
    z.requires_grad_()
    torch.autograd.gradcheck(lambda z: characteristic_sums(z, slices, 9, 0.3), z)
    torch.autograd.gradgradcheck(lambda z: characteristic_sums(z, slices, 9, 0.3), z)
    torch.library.opcheck(torch.ops.sslfast.characteristic_sums.default, (z, slices, 9, 0.3))
    step = torch.compile(characteristic_sums, fullgraph=True, backend="aot_eager")
    found, expected = (run(f, z.detach(), slices, torch.float64, 9, 0.3) for f in (step, characteristic_sums))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_does_not_round_projections() -> None:
    z, slices = make((2, 40, 30, 33, 16), torch.float32)
    plain = run(characteristic_sums, z, slices, torch.float32, 16, 0.2)[0]
    for backend in (None, "reference"):
        with torch.autocast("cpu", dtype=torch.bfloat16), sslfast.use_backend(backend):
            found = characteristic_sums(z, slices, 16, 0.2)
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


def test_forward_mode_is_the_references() -> None:
    z, slices = make((1, 6, 3, 4, 5), torch.float64)
    tangent = torch.randn_like(z)
    _, found = torch.func.jvp(lambda z: characteristic_sums(z, slices, 5, 0.3), (z,), (tangent,))
    _, expected = torch.func.jvp(lambda z: reference.characteristic_sums(z, slices, 5, 0.3), (z,), (tangent,))
    torch.testing.assert_close(found, expected)
