"""The Triton kernels of nearest neighbours and of their distances, through the interpreter where there is no GPU."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch
from torch import Tensor

import sslfast
from helpers import roundings, within_budget
from sslfast import _native, reference
from sslfast.ops.koleo import koleo
from sslfast.ops.nearest_neighbours import neighbours_of
from sslfast.ops.neighbour_distance import neighbour_distance

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = _native.why_no_triton(DEVICE)
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON))]
if torch.cuda.is_available():  # else these tests run in the interpreter
    pytestmark.append(pytest.mark.gpu)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (rows, columns or 0 for the rows themselves, features, count): one row, one column, two products, several chunks.
CASES = [(40, 0, 8, 1), (70, 0, 13, 5), (1, 9, 5, 9), (3, 1, 4, 1), (33, 97, 130, 1), (20, 70, 300, 7), (2, 0, 600, 1)]


def rows(m: int, n: int, d: int, dtype: torch.dtype, whole: bool) -> tuple[Tensor, Tensor | None]:
    """Small whole numbers, whose sums are exact and often equal; or any."""
    draw = (lambda *s: torch.randint(-2, 3, s).float()) if whole else torch.randn
    return draw(m, d).to(DEVICE, dtype), draw(n, d).to(DEVICE, dtype) if n else None


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_neighbours(case: tuple[int, int, int, int], dtype: torch.dtype, ids: bool, metric: str) -> None:
    *size, count = case
    q, k = rows(*size, dtype, whole=True)
    row_ids = torch.arange(len(q), device=DEVICE) % 4 if ids else None
    col_ids = torch.arange(len(k), device=DEVICE) % 3 if ids and k is not None else None
    results = []
    for backend in ("triton", "reference"):
        with sslfast.use_backend(backend):
            results.append(sslfast.nearest_neighbours(q, k, count, metric=metric, row_ids=row_ids, col_ids=col_ids))
    found, expected = results
    torch.testing.assert_close(found.similarity, expected.similarity, rtol=0.0 if metric == "dot" else 1e-6, atol=0.0)
    assert torch.equal(found.index, expected.index)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_similarities_and_gradients(case: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    *size, count = case
    q, k = rows(*size, dtype, whole=False)
    with sslfast.use_backend("triton"):
        found = sslfast.nearest_neighbours(q, k, count)
    truth = reference.nearest_neighbours(q.double(), None if k is None else k.double(), count)[0]
    plain = reference.nearest_neighbours(q.float(), None if k is None else k.float(), count)[0]
    within_budget("similarity", found.similarity, plain, truth, torch.float32, 1.0)
    index = found.index
    for name, function, formula in (
        ("similarity", lambda q, k: sslfast.nearest_neighbours(q, k, count).similarity, reference.neighbour_similarity),
        ("distance", partial(neighbour_distance, index=index), partial(reference.neighbour_distance, eps=1e-8)),
    ):
        with sslfast.use_backend("triton"):
            kernel = value_and_gradients(function, q, k)
        formula = partial(formula, index=index)
        single = roundings(value_and_gradients, formula, q.float(), None if k is None else k.float())
        exact = value_and_gradients(formula, q.double(), None if k is None else k.double())
        for what, mine, one, true in zip(("value", "dq", "dk"), kernel, single, exact, strict=False):
            budget = torch.float32 if what == "value" else dtype
            within_budget(f"{what} of {name}", mine, one.to(mine.dtype), true, budget, 1.0)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("n", [0, 70])
def test_a_bias_for_each_column(n: int, count: int) -> None:
    q, k = rows(50, n, 9, torch.float32, whole=True)
    bias = torch.randint(-3, 4, (len(q if k is None else k),), device=DEVICE).float()
    results = []
    for backend in ("triton", "reference"):
        with sslfast.use_backend(backend):
            results.append(neighbours_of(q, k, count, bias=bias))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def value_and_gradients(function, *tensors: Tensor | None) -> list[Tensor]:
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    found = function(*leaves)
    weights = torch.linspace(-1, 2, found.numel(), dtype=found.dtype, device=found.device).view_as(found)
    return [found, *torch.autograd.grad((found * weights).sum(), [t for t in leaves if t is not None])]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -0.0])
def test_nan_inf_and_negative_zero(value: float) -> None:
    q, k = rows(30, 40, 9, torch.float32, whole=True)
    q[5, 3], k[17, 2], k[20] = value, value, 0.0
    for count in (1, 6):
        for keys in (k, None):
            results = []
            for backend in ("triton", "reference"):
                with sslfast.use_backend(backend):
                    results.append(sslfast.nearest_neighbours(q, keys, count))
            torch.testing.assert_close(results[0].similarity, results[1].similarity, equal_nan=True)
            assert torch.equal(results[0].index, results[1].index)


def test_bands_and_runs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = importlib.import_module("sslfast.kernels.nearest_neighbours")
    q, k = rows(150, 170, 9, torch.float32, whole=True)
    results = []
    for band_bytes, programs in ((1, 1), (2**28, 8), (2**28, 100)):
        monkeypatch.setattr(kernel, "BAND_BYTES", band_bytes)
        monkeypatch.setattr(kernel, "PROGRAMS", programs)
        monkeypatch.setattr(kernel, "multiprocessors", lambda z: 1)
        with sslfast.use_backend("triton"):
            results.append([*sslfast.nearest_neighbours(q, k, 4), *sslfast.nearest_neighbours(q, k)])
            results[-1] += sslfast.nearest_neighbours(q, k, metric="euclidean")
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_koleo(dtype: torch.dtype, topk: int) -> None:
    x = rows(70, 0, 40, dtype, whole=False)[0]
    with sslfast.use_backend("triton"):
        kernel = value_and_gradients(partial(koleo, topk=topk, eps=1e-8), x)
    single = roundings(value_and_gradients, partial(reference.koleo, topk=topk), x.float())
    exact = value_and_gradients(partial(reference.koleo, topk=topk), x.double())
    for what, mine, one, true in zip(("loss", "dx"), kernel, single, exact, strict=True):
        budget = torch.float32 if what == "loss" else dtype
        within_budget(what, mine, one.to(mine.dtype), true, budget, 1.0 if what == "loss" else 1 / x.numel())


def test_identical_rows_are_as_far_apart_as_the_bound_makes_them() -> None:
    """‖0 + eps‖ = √D·eps, on the kernel as in the formula: the loss of duplicates hangs on it."""
    q = torch.randn(5, 33)
    index = torch.tensor([[1], [0], [-1], [4], [3]])
    q[1], q[4] = q[0], q[3]
    with sslfast.use_backend("triton"):
        found = neighbour_distance(q, None, index)
    torch.testing.assert_close(found, reference.neighbour_distance(q, None, index, 1e-8), rtol=1e-5, atol=0)
    assert found[2] == torch.inf and found[0] < 1e-7
