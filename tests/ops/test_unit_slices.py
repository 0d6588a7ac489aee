"""unit_slices: the same directions on every backend, keyed by seed and step; uniform on the sphere."""

from __future__ import annotations

import pytest
import torch

import sslfast
from sslfast import _native, reference
from sslfast.ops.unit_slices import MOST_FEATURES, unit_slices

pytestmark = pytest.mark.sanitize

SHAPES = [(1, 1), (3, 5), (64, 256), (130, 67), (2, 100), (1029, 9)]
SEEDS = [0, -1, 123456789012345]


@pytest.mark.levels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape: tuple[int, int]) -> None:
    for seed in SEEDS:
        for step in (0, 7, 2**32 + 7):
            found = unit_slices(torch.tensor(step), seed, *shape)
            right = reference.unit_slices(torch.tensor(step), seed, *shape)
            assert found.dtype == torch.float32 and right.dtype == torch.float64
            torch.testing.assert_close(found.double(), right, rtol=1e-6, atol=3e-7)


@pytest.mark.skipif(_native.why_no_triton(torch.device("cpu")) is not None, reason="Triton cannot run here")
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_triton_draws_the_same(shape: tuple[int, int]) -> None:
    step = torch.tensor(2**31 + 5)
    for seed in SEEDS:
        with sslfast.use_backend("triton"):
            found = unit_slices(step, seed, *shape)
        torch.testing.assert_close(found, unit_slices(step, seed, *shape), rtol=1e-6, atol=3e-7)


def test_unit_columns_of_all_directions() -> None:
    a = unit_slices(torch.tensor(3), 5, 16, 20000)
    torch.testing.assert_close(a.norm(dim=0), torch.ones(20000))
    assert a.mean(1).abs().max() < 5 * 0.25 / 20000**0.5
    assert (16 * (a @ a.T) / 20000 - torch.eye(16)).abs().max() < 0.06
    assert (a.pow(4).mean() * 16 * 18 / 3 - 1).abs() < 0.02  # of a uniform direction E a⁴ = 3/(D(D + 2))


def test_keyed_by_seed_step_and_column_alone() -> None:
    draw = lambda step, seed, count: unit_slices(torch.tensor(step), seed, 8, count)  # noqa: E731
    first = draw(0, 0, 40)
    assert torch.equal(first, draw(0, 0, 40)) and torch.equal(first[:, :13], draw(0, 0, 13))
    for other in (draw(1, 0, 40), draw(0, 1, 40), draw(0, 2**32, 40)):
        assert not (first == other).any()
    assert first.unique().numel() == first.numel()


def test_operator() -> None:
    for name in ("unit_slices", "unit_slices_triton"):
        if name == "unit_slices" or _native.why_no_triton(torch.device("cpu")) is None:
            torch.library.opcheck(getattr(torch.ops.sslfast, name).default, (torch.tensor(1), 2, 6, 5))
    with pytest.raises(RuntimeError, match=r"features must be 1 to 2\^18"):
        unit_slices(torch.tensor(0), 0, MOST_FEATURES + 1, 1)
    compiled = torch.compile(lambda step: unit_slices(step, 1, 6, 5), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.tensor(4)), unit_slices(torch.tensor(4), 1, 6, 5))


def test_the_reference_draws_the_same_directions() -> None:
    found = []
    for backend in ("cpu", "reference"):
        with sslfast.use_backend(backend):
            found.append(unit_slices(torch.tensor(3), 7, 10, 33).double())
    torch.testing.assert_close(*found, rtol=0, atol=3e-7)
