"""Nearest neighbours by Euclidean distance on the CPU: against float64 truth, ties, cancellation, NaN, gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import sslfast
from helpers import roundings, within_budget
from neighbour_common import CASES, DTYPES, check_gradients, rows, whole_rows, wide
from sslfast import reference

pytestmark = pytest.mark.sanitize
by_distance = partial(sslfast.nearest_neighbours, metric="euclidean")


def squares(q: Tensor, k: Tensor | None) -> Tensor:
    """−‖q_i − k_j‖² [M, N]; of rows among themselves −∞ on the diagonal."""
    s = -(q[:, None] - (q if k is None else k)).square().sum(2)
    return s if k is not None else s.masked_fill(torch.eye(len(q), dtype=torch.bool), -torch.inf)


def at(q: Tensor, k: Tensor | None, index: Tensor) -> Tensor:
    """−‖q_i − k_n‖² of given neighbours."""
    return -reference.neighbour_distance(q, k, index, 0.0).square()


@pytest.mark.levels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_distances(case: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    *size, count = case
    q, k = rows(*size, dtype)
    found = by_distance(q, k, count)
    assert found.similarity.dtype == wide(q) and found.index.dtype == torch.int64
    exact = [None if t is None else t.double() for t in (q, k)]
    truth = squares(*exact).topk(count, dim=1).values
    plain = roundings(at, *[None if t is None else t.to(wide(q)) for t in (q, k)], found.index)
    kind = dtype if dtype == torch.float64 else torch.float32
    within_budget("similarity", found.similarity, plain, truth, kind, 3.0)
    within_budget("of the index", at(*exact, found.index), plain, truth, kind, 3.0)
    assert (found.similarity.diff(dim=1) <= 0).all()
    assert all(len(set(row)) == count for row in found.index.tolist())


@pytest.mark.levels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_of_equals_the_smaller_index_comes_first(case: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Small whole numbers: distances are exact, and many are equal; their square roots, squared, may differ."""
    *size, count = case
    q, k = whole_rows(*size, dtype)
    found = by_distance(q, k, count)
    ordered, index = squares(*[None if t is None else t.to(wide(q)) for t in (q, k)]).sort(
        dim=1, descending=True, stable=True
    )
    torch.testing.assert_close(found.similarity, ordered[:, :count])
    assert torch.equal(found.index, index[:, :count])
    with sslfast.use_backend("reference"):
        expected = by_distance(q, k, count)
    assert torch.equal(found.similarity, expected.similarity) and torch.equal(found.index, expected.index)


def test_near_rows_far_from_the_origin_do_not_cancel() -> None:
    """The identity ‖q‖² − 2·q·k + ‖k‖² leaves no digit of distances of 1e-3 at norms of 100."""
    k = 100 + torch.arange(8.0)[:, None] * torch.ones(8, 4)
    q = k.flip(0) + 1e-3
    found = by_distance(q, k)
    assert found.index[:, 0].tolist() == list(range(7, -1, -1))
    truth = at(q.double(), k.double(), found.index)
    torch.testing.assert_close(found.similarity, truth.float(), rtol=1e-6, atol=0.0)
    assert (by_distance(k, k).similarity == 0).all()  # a row and itself


@pytest.mark.levels
@pytest.mark.parametrize("n", [0, 350])
def test_nan_and_inf_flow_through(n: int) -> None:
    """A row with NaN is the nearest; one infinitely far, or too far for the dtype, is none."""
    for value in (float("nan"), float("inf"), 1e30):
        q, k = whole_rows(401, n, 20)
        columns = q if k is None else k
        columns[5, 3] = columns[300, 7] = value
        for count in (1, 4, 70):
            found = by_distance(q, k, count)
            with sslfast.use_backend("reference"):
                expected = by_distance(q, k, count)
            torch.testing.assert_close(found.similarity, expected.similarity, equal_nan=True)
            assert torch.equal(found.index, expected.index)
        if value != value:
            assert (found.index[:5, 0] == 5).all() and found.similarity[:5, 0].isnan().all()
        if value == 1e30:
            assert not ((found.index[:5] == 5) | (found.index[:5] == 300)).any()


@pytest.mark.levels
@pytest.mark.parametrize("size", [(60, 0, 9), (40, 90, 9)], ids=str)
def test_ids_leave_pairs_out(size: tuple[int, int, int]) -> None:
    q, k = whole_rows(*size)
    row_ids = torch.arange(len(q)) % 5
    col_ids = row_ids if k is None else torch.where(torch.arange(len(k)) < 87, 1, 0)
    found = by_distance(q, k, 12, row_ids=row_ids, col_ids=None if k is None else col_ids)
    truth = squares(q, k).masked_fill(row_ids[:, None] == col_ids, -torch.inf)
    ordered, index = truth.sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(found.similarity, ordered[:, :12])
    assert torch.equal(found.index, index[:, :12].masked_fill(ordered[:, :12].isinf(), -1))
    assert k is None or (found.index < 0).any()


@pytest.mark.levels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(60, 0, 13, 3), (40, 90, 9, 2), (1, 7, 5, 7)], ids=str)
def test_gradients_reach_both_ends(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    *shape, count = size
    q, k = rows(*shape, dtype)
    index = by_distance(q, k, count).index
    check_gradients(lambda q, k: by_distance(q, k, count).similarity, partial(at, index=index), q, k)


def test_of_equal_rows_the_gradient_is_zero_and_gradcheck_twice() -> None:
    q = torch.ones(3, 4, requires_grad=True)
    by_distance(q, torch.ones(2, 4)).similarity.sum().backward()
    assert (q.grad == 0).all()
    q, k = (t.requires_grad_() for t in rows(7, 9, 5, torch.float64))
    for function, inputs in (
        (lambda q, k: by_distance(q, k, 2).similarity, (q, k)),
        (lambda q: by_distance(q, None, 2).similarity, (q,)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_compiles_and_takes_any_strides_in_autocast() -> None:
    q, k = rows(40, 60, 8)
    expected = by_distance(q, k, 3)
    step = torch.compile(by_distance, fullgraph=True, backend="aot_eager", dynamic=True)
    wide_q = torch.stack([q, q], dim=2)[..., 1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for found in (step(q, k, 3), by_distance(wide_q, k.T.contiguous().T, 3)):
            assert torch.equal(found.similarity, expected.similarity) and torch.equal(found.index, expected.index)
