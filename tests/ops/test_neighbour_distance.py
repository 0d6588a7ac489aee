"""Distances to given neighbours on the CPU: against float64 truth, no neighbour, contracts, wrong input."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from helpers import within_budget
from neighbour_common import CASES, DTYPES, check_gradients, learning, rows, wide
from sslfast import reference
from sslfast.ops.neighbour_distance import neighbour_distance

pytestmark = pytest.mark.sanitize


@pytest.mark.levels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_distances(case: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    *size, count = case
    q, k = rows(*size, dtype)
    index = torch.randint(-1, len(q if k is None else k), (len(q), count))
    q[0] = (q if k is None else k)[index[0, 0].clamp(min=0)]  # identical rows
    given = [None if t is None else t.to(wide(q)) for t in (q, k)]
    plain = reference.neighbour_distance(*given, index, 1e-8)
    truth = reference.neighbour_distance(*(None if t is None else t.double() for t in (q, k)), index, 1e-8)
    found = neighbour_distance(q, k, index)
    assert (found == float("inf")).equal(index < 0)
    finite = [t.masked_fill(index < 0, 0.0) for t in (found, plain, truth)]
    within_budget("distance", *finite, dtype)
    if index[0, 0] >= 0:
        torch.testing.assert_close(found[0, 0].double(), truth[0, 0], rtol=1e-5, atol=0)


@pytest.mark.levels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_reach_both_ends(case: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    *size, count = case
    q, k = rows(*size, dtype)
    index = torch.randint(len(q if k is None else k), (len(q), count))
    if k is None:  # no row is at distance 0 from itself
        index = torch.where(index == torch.arange(len(q))[:, None], (index + 1) % len(q), index)
    formula = partial(reference.neighbour_distance, index=index, eps=1e-8)
    check_gradients(partial(neighbour_distance, index=index), formula, q, k)


def test_operator_contracts() -> None:
    q, k = learning(*rows(20, 30, 6))
    index = torch.randint(0, 20, (20, 2))
    torch.library.opcheck(torch.ops.sslfast.neighbour_distance, (q, k, index, 1e-8))
    torch.library.opcheck(torch.ops.sslfast.neighbour_distance, (q, None, index, 1e-8))
    grad = torch.randn(20, 2)
    for keys in (None, k.detach()):
        given = (grad, grad.abs(), index, q.detach(), keys, 1e-8, True, True)
        torch.library.opcheck(torch.ops.sslfast.neighbour_gradient, given)


def test_gradcheck_of_the_kernel_twice() -> None:
    q, k = learning(*rows(7, 9, 5, torch.float64))
    index = torch.randint(-1, 7, (7, 2))
    function = lambda q, k: neighbour_distance(q, k, index).masked_fill(index < 0, 0.0)  # noqa: E731
    assert torch.autograd.gradcheck(function, (q, k))
    assert torch.autograd.gradgradcheck(function, (q, k))


def test_the_operator_checks_what_it_is_given() -> None:
    q, k = rows(6, 9, 4)
    for index in (torch.full((6, 1), 9), torch.full((6, 1), -2)):
        with pytest.raises(RuntimeError, match=r"index must be from -1 to 8"):
            neighbour_distance(q, k, index)
    with pytest.raises(RuntimeError, match="index has an unexpected shape"):
        neighbour_distance(q, k, torch.zeros(5, 1, dtype=torch.int64))
