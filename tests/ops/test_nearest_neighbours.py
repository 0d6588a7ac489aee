"""Nearest neighbours on the CPU: against float64 truth, ties and NaN, contracts, wrong input."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch

import sslfast
from helpers import roundings, within_budget
from neighbour_common import CASES, DTYPES, check_gradients, gradients, learning, rows, whole_rows, wide
from sslfast import reference
from sslfast.ops.nearest_neighbours import neighbours_of

pytestmark = pytest.mark.sanitize


@pytest.mark.levels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_similarities(case: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    *size, count = case
    q, k = rows(*size, dtype)
    similarity, index = sslfast.nearest_neighbours(q, k, count)
    assert similarity.dtype == wide(q) and index.dtype == torch.int64
    given = [None if t is None else t.to(wide(q)) for t in (q, k)]
    plain = roundings(reference.nearest_neighbours, *given, count)[0]
    exact = [None if t is None else t.double() for t in (q, k)]
    truth = reference.nearest_neighbours(*exact, count)[0]
    within_budget("similarity", similarity, plain, truth, dtype if dtype == torch.float64 else torch.float32)
    # They are those of the columns that are named, in descending order, each named once.
    at = reference.neighbour_similarity(*exact, index)
    within_budget("of the index", at, plain, truth, dtype if dtype == torch.float64 else torch.float32)
    assert (similarity.diff(dim=1) <= 0).all()
    assert all(len(set(row)) == count for row in index.tolist())


@pytest.mark.levels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_of_equals_the_smaller_index_comes_first(case: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    *size, count = case
    q, k = whole_rows(*size, dtype)
    found = sslfast.nearest_neighbours(q, k, count)
    with sslfast.use_backend("reference"):
        expected = sslfast.nearest_neighbours(q, k, count)
    assert torch.equal(found.similarity, expected.similarity) and torch.equal(found.index, expected.index)


@pytest.mark.levels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_reach_both_ends(case: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    *size, count = case
    q, k = rows(*size, dtype)
    index = sslfast.nearest_neighbours(q, k, count).index
    check_gradients(
        lambda q, k: sslfast.nearest_neighbours(q, k, count).similarity,
        partial(reference.neighbour_similarity, index=index),
        q,
        k,
    )


@pytest.mark.levels
@pytest.mark.parametrize("size", [(60, 0, 9), (300, 0, 5), (40, 90, 9), (7, 5000, 9)], ids=str)
def test_ids_leave_pairs_out(size: tuple[int, int, int]) -> None:
    """Also a row whose every pair is left out, and one with fewer columns than are asked for."""
    q, k = whole_rows(*size)
    row_ids = torch.arange(len(q)) % 5
    col_ids = None if k is None else torch.where(torch.arange(len(k)) < 3, 1, 0)
    count = len(q) - 1 if k is None else 5
    for dtype in (torch.int64, torch.int32):
        ids = [None if t is None else t.to(dtype) for t in (row_ids, col_ids)]
        found = sslfast.nearest_neighbours(q, k, count, row_ids=ids[0], col_ids=ids[1])
        with sslfast.use_backend("reference"):
            expected = sslfast.nearest_neighbours(q, k, count, row_ids=ids[0], col_ids=ids[1])
        assert torch.equal(found.similarity, expected.similarity) and torch.equal(found.index, expected.index)
    assert (found.index < 0).any() and (found.similarity[found.index < 0] == -torch.inf).all()
    function = lambda q, k: sslfast.nearest_neighbours(q, k, count, row_ids=row_ids, col_ids=col_ids).similarity  # noqa: E731
    exact = [None if t is None else t.double() for t in (q, k)]
    truth = gradients(partial(reference.neighbour_similarity, index=found.index), *exact)
    for mine, true in zip(gradients(function, *exact), truth, strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.levels
@pytest.mark.parametrize("value", [0.0, float("nan"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(300, 0, 5), (40, 290, 9), (7, 5000, 9)], ids=str)
def test_a_bias_for_each_column(size: tuple[int, int, int], dtype: torch.dtype, value: float) -> None:
    """Of rows against themselves also for each row. Whole numbers, and one that is none."""
    q, k = whole_rows(*size, dtype)
    bias = torch.randint(-3, 4, (len(q if k is None else k),)).to(wide(q))
    bias[100] += value
    found = neighbours_of(q, k, 6, bias=bias)
    with sslfast.use_backend("reference"):
        expected = neighbours_of(q, k, 6, bias=bias)
    torch.testing.assert_close(found.similarity, expected.similarity, rtol=0.0, atol=0.0, equal_nan=True)
    assert torch.equal(found.index, expected.index)


def test_no_row_is_its_own_neighbour_whatever_its_similarity() -> None:
    """Identical rows find each other; opposite ones too, where every cosine is −1."""
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert sslfast.nearest_neighbours(z).index[:, 0].tolist() == [1, 0, 0]
    opposite = torch.tensor([[3.0, 0.0], [-3.0, 0.0]])
    assert sslfast.nearest_neighbours(opposite).index[:, 0].tolist() == [1, 0]
    assert sslfast.nearest_neighbours(torch.zeros(3, 4), None, 2).index.tolist() == [[1, 2], [0, 2], [0, 1]]


@pytest.mark.levels
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("n", [0, 350])
def test_nan_and_inf_flows_through(value: float, n: int) -> None:
    """NaN is the largest, as in torch.topk; −inf counts as none."""
    q, k = whole_rows(401, n, 20)
    for x in (q, k):
        if x is not None:
            x[5, 3], x[300, 7], x[301] = value, value, 2.0
    for count in (1, 4, 70):
        found = sslfast.nearest_neighbours(q, k, count)
        with sslfast.use_backend("reference"):
            expected = sslfast.nearest_neighbours(q, k, count)
        torch.testing.assert_close(found.similarity, expected.similarity, equal_nan=True)
        assert torch.equal(found.index, expected.index)


def test_rows_are_normalised_if_asked() -> None:
    q, k = rows(50, 80, 12)
    found = sslfast.nearest_neighbours(q, k, 3, normalize=True)
    cosines = torch.nn.functional.cosine_similarity(q[:, None], k, dim=2)
    torch.testing.assert_close(found.similarity, cosines.topk(3).values)
    assert torch.equal(found.index, cosines.topk(3).indices)
    function = lambda q, k: sslfast.nearest_neighbours(q, k, 3, normalize=True).similarity  # noqa: E731
    formula = lambda q, k: torch.nn.functional.cosine_similarity(q[:, None], k, dim=2).topk(3).values  # noqa: E731
    for mine, true in zip(gradients(function, q, k), gradients(formula, q, k), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("needed", [(True, False), (False, True), (True, True)])
def test_requires_grad_subsets(needed: tuple[bool, bool]) -> None:
    q, k = rows(40, 30, 7)
    full = gradients(lambda q, k: sslfast.nearest_neighbours(q, k, 2).similarity, q, k)
    weights = torch.linspace(-1, 2, 80).view(40, 2)
    leaves = [t.clone().requires_grad_(wanted) for t, wanted in zip((q, k), needed, strict=True)]
    (sslfast.nearest_neighbours(*leaves, 2).similarity * weights).sum().backward()
    for leaf, gradient, wanted in zip(leaves, full, needed, strict=True):
        assert (leaf.grad is not None) == wanted and (not wanted or torch.equal(leaf.grad, gradient))


def test_strides_and_autocast() -> None:
    q, k = rows(90, 70, 11)
    expected = sslfast.nearest_neighbours(q, k, 4)
    wide_q = torch.stack([q, q], dim=2)[..., 1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sslfast.nearest_neighbours(wide_q, k.T.contiguous().T, 4)
    assert torch.equal(found.similarity, expected.similarity) and torch.equal(found.index, expected.index)


def test_same_bits_every_time_and_on_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            q, k = rows(1500, 0, 24)
            bank = torch.randn(5000, 24)
            results.append(
                [
                    *sslfast.nearest_neighbours(q, None, 3),
                    *sslfast.nearest_neighbours(q[:30], bank, 40),
                    *gradients(lambda q, k: sslfast.nearest_neighbours(q, None, 3).similarity, q, k),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_operator_contracts() -> None:
    q, k = learning(*rows(20, 30, 6))
    ids = torch.arange(20), torch.arange(30)
    bias = torch.linspace(-1, 1, 30)
    for given in ((q, None, bias[:20], None, None, 3), (q, k, bias, *ids, 2), (q.double(), k.double(), *[None] * 3, 1)):
        torch.library.opcheck(torch.ops.sslfast.nearest_neighbours, given)


def test_gradcheck_of_the_kernel_twice() -> None:
    q, k = learning(*rows(7, 9, 5, torch.float64))
    for function, inputs in (
        (lambda q, k: sslfast.nearest_neighbours(q, k, 2).similarity, (q, k)),
        (lambda q: sslfast.nearest_neighbours(q, None, 2).similarity, (q,)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_compiles_without_graph_breaks() -> None:
    q, k = rows(40, 60, 8)
    function = lambda q, k: 2 * sslfast.nearest_neighbours(1.5 * q, k, 3).similarity  # noqa: E731
    step = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for mine, true in zip(gradients(step, q, k), gradients(function, q, k), strict=True):
        torch.testing.assert_close(mine, true)
    torch.testing.assert_close(step(q[:17], k), function(q[:17], k))


def test_operators_check_what_they_are_given() -> None:
    q, k = rows(6, 9, 4)
    with pytest.raises(RuntimeError, match="count must be positive, got 0"):
        torch.ops.sslfast.nearest_neighbours(q, k, None, None, None, 0)
    with pytest.raises(RuntimeError, match="row_ids and col_ids must be given together"):
        torch.ops.sslfast.nearest_neighbours(q, k, None, torch.arange(6), None, 1)
    with pytest.raises(RuntimeError, match="bias"):
        torch.ops.sslfast.nearest_neighbours(q, k, torch.zeros(6), None, None, 1)


Z = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Z, None, 4), {}, ValueError, r"count must be a whole number from 1 to the 3 other rows of q, got 4"),
        ((Z[:1],), {}, ValueError, r"count must be .* from 1 to the 0 other rows of q, got 1"),
        ((Z, Z[:2], 3), {}, ValueError, r"count must be .* from 1 to the 2 rows of k, got 3"),
        ((Z, None, 0), {}, ValueError, r"count must be .* got 0"),
        ((Z, None, 1.5), {}, ValueError, r"count must be .* got 1.5"),
        ((Z, torch.ones(4, 2)), {}, ValueError, r"q and k must have the same width, got 3 and 2"),
        ((Z, Z.double()), {}, TypeError, r"same dtype.*float32 and.*float64"),
        ((Z[:0], Z), {}, ValueError, r"q must have at least one row"),
        ((torch.ones(4),), {}, ValueError, r"q must be two-dimensional"),
        ((Z,), {"metric": "cosine"}, ValueError, r"metric must be one of 'dot', 'euclidean', got 'cosine'"),
        ((Z.long(),), {}, TypeError, r"q must be float32"),
        ((Z, Z), {"row_ids": torch.arange(4)}, ValueError, r"row_ids and col_ids must be given together"),
        ((Z,), {"col_ids": torch.arange(4)}, ValueError, r"col_ids belong to k, and k is None"),
        ((Z,), {"row_ids": torch.arange(3)}, ValueError, r"row_ids must have shape \(4,\), got \(3,\)"),
        ((Z,), {"row_ids": torch.ones(4)}, TypeError, r"row_ids must hold integers"),
    ],
)
def test_wrong_input(arguments, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sslfast.nearest_neighbours(*arguments, **options)


def test_memory_does_not_grow_with_the_matrix() -> None:
    """Peak resident memory against a bank of 200,000 rows, packed a few at a time; the matrix would take 780 MiB."""
    code = """
import pathlib, torch, sslfast
def status(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])
def search(n):
    q, bank = torch.randn(1024, 16), torch.randn(n, 16)
    start = status("VmRSS:")
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    sslfast.nearest_neighbours(q, bank, 20)
    return (status("VmHWM:") - start) / 1024
search(64)
print(search(200_000))
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads the peak resident set from /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 16, f"{done.stdout.strip()} MiB"
