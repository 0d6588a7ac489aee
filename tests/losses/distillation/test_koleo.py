"""KoLeo against DINOv2's formula and lightly's class; duplicates, opposite rows, groups; contracts; wrong input."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from benchmarks import Unavailable, peers
from helpers import (
    DTYPES,
    GRAD_LOSS,
    SHAPES,
    check_loss,
    same_value_and_gradients,
    value_and_gradients,
)

pytestmark = pytest.mark.sanitize


def formula(x: Tensor, topk: int = 1, eps: float = 1e-8) -> Tensor:
    """DINOv2's, with −2 in place of a row's similarity with itself, and DINOv3's several neighbours."""
    unit = F.normalize(x, eps=eps)
    with torch.no_grad():
        index = (unit @ unit.T).fill_diagonal_(-2).topk(topk).indices
    distance = F.pairwise_distance(unit.repeat_interleave(topk, 0), unit[index.flatten()], 2, eps)
    return -torch.log(distance + eps).mean()


def rows(n: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of norms from 0.1 to 10; in one feature there are only two unit rows."""
    return (torch.randn(n, d, dtype=torch.float64) * torch.logspace(-1, 1, n, dtype=torch.float64)[:, None]).to(dtype)


@pytest.mark.levels
@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [s for s in (*SHAPES, (1500, 20)) if s[0] > 2 and s[1] > 1], ids=str)
def test_value_and_gradient(shape: tuple[int, int], dtype: torch.dtype, topk: int) -> None:
    """The gradient of a row is of the size of what the distances are divided by: 1/(N·norm·distance)."""
    x = rows(*shape, dtype)
    x = (x.double() / x.double().norm(dim=1, keepdim=True)).to(dtype) * 2
    check_loss(partial(sslfast.koleo, topk=topk), partial(formula, topk=topk), (x,), terms=shape[0])


@pytest.mark.parametrize("shape", [(64, 32), (7, 40), (301, 17), (2, 3)], ids=str)
def test_equals_lightly(shape: tuple[int, int]) -> None:
    try:
        theirs = peers.lightly_loss("koleo_loss", "KoLeoLoss")
    except Unavailable as reason:
        pytest.skip(f"lightly 1.6.0 cannot be imported: {reason}")
    same_value_and_gradients(sslfast.KoLeoLoss(), theirs, rows(*shape, torch.float64))


def test_opposite_rows_are_each_others_neighbours() -> None:
    """DINOv2's −1 on the diagonal ties with their similarity: each is then its own neighbour, at distance 0."""
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    torch.testing.assert_close(sslfast.koleo(x), torch.tensor(-math.log(2.0)))
    torch.testing.assert_close(sslfast.koleo(3 * x.double()), torch.tensor(-math.log(2.0)).double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_duplicates_are_finite(dtype: torch.dtype) -> None:
    """Their terms are the formula's, and their gradients cancel: each is the other's neighbour."""
    x = torch.randn(64, 384).to(dtype)
    x[1] = x[0]
    loss, gradient = value_and_gradients(sslfast.koleo, x)
    expected, true = value_and_gradients(formula, x.double())
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert gradient.double().norm() <= 1.1 * true.norm() + 1e-3 and true.norm() < 1


def test_three_duplicates_have_the_formulas_gradient() -> None:
    x = torch.randn(64, 384, dtype=torch.float64)
    x[1] = x[2] = x[0]
    (loss, gradient), (expected, true) = (value_and_gradients(f, x) for f in (sslfast.koleo, formula))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, true, rtol=1e-5, atol=1e-6)
    assert gradient.isfinite().all() and gradient.norm() > 1  # at most 1/(N·√D·eps) a pair, not clipped
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert all(t.isfinite().all() for t in value_and_gradients(sslfast.koleo, x.to(dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_and_zero_rows(dtype: torch.dtype) -> None:
    """Of norm 1e-5, whose square float16 does not know, and of zeros, which stay zeros at distance 1 from unit rows.

    What reaches a row of zeros is divided by eps, as by F.normalize: more than float16 holds.
    """
    x = torch.randn(6, 8).to(dtype)
    x[1] = (1e-5 * F.normalize(x[1].float(), dim=0)).to(dtype)
    x[3] = 0
    found, expected = value_and_gradients(sslfast.koleo, x), value_and_gradients(formula, x.double())
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=1e-6)
    assert found[1][torch.arange(6) != 3].isfinite().all() and not found[1].isnan().any()


def test_nan_and_inf_are_in_the_loss() -> None:
    for value in (float("nan"), float("inf")):
        x = rows(30, 8)
        x[4, 2] = value
        loss, gradient = value_and_gradients(sslfast.koleo, x)
        assert loss.isnan() and value_and_gradients(formula, x)[0].isnan() and gradient.isnan().any()


@pytest.mark.parametrize(("topk", "size"), [(1, 2), (1, 5), (3, 5), (2, 10)])
def test_groups(topk: int, size: int) -> None:
    """Each group for itself, and the mean of all."""
    x = rows(30, 9, torch.float64)
    together = lambda x: sslfast.koleo(x, topk, loss_group_size=size)  # noqa: E731
    apart = lambda x: torch.stack([formula(part, topk) for part in x.split(size)]).mean()  # noqa: E731
    same_value_and_gradients(together, apart, x)
    same_value_and_gradients(sslfast.KoLeoLoss(topk, size), together, x)


def test_backends_agree_and_autocast_changes_nothing() -> None:
    x = rows(50, 20)
    expected = value_and_gradients(sslfast.koleo, x)
    with sslfast.use_backend("reference"):
        for a, b in zip(value_and_gradients(sslfast.koleo, x), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for options in ({}, {"loss_group_size": 25}):
            loss = sslfast.koleo(x, **options)
            assert loss.dtype == torch.float32
        assert torch.equal(sslfast.koleo(x), expected[0])


def test_strides_and_threads() -> None:
    x = rows(1500, 24)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3, 2):
            torch.set_num_threads(threads)
            results.append(value_and_gradients(lambda x: sslfast.koleo(x, 2), x))
    finally:
        torch.set_num_threads(before)
    results.append(value_and_gradients(lambda x: sslfast.koleo(torch.stack([x, x], 2)[..., 1], 2), x))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_operator_contracts() -> None:
    x = rows(20, 6).requires_grad_()
    torch.library.opcheck(torch.ops.sslfast.koleo, (x, 2, 1e-8))
    loss, *saved = (t.detach() for t in torch.ops.sslfast.koleo(x, 2, 1e-8))
    torch.library.opcheck(torch.ops.sslfast.koleo_backward, (loss, x.detach(), *saved, 1e-8))
    for place, name in ((0, "index"), (1, "inv_norm"), (2, "distance")):
        bad = list(saved)
        bad[place] = bad[place][:-1]
        with pytest.raises(RuntimeError, match=f"{name} has an unexpected shape"):
            torch.ops.sslfast.koleo_backward(loss, x.detach(), *bad, 1e-8)


def test_gradcheck_of_the_kernel_twice() -> None:
    x = rows(9, 5, torch.float64).requires_grad_()
    for function in (sslfast.koleo, lambda x: sslfast.koleo(x, 2, loss_group_size=3)):
        assert torch.autograd.gradcheck(function, (x,))
        assert torch.autograd.gradgradcheck(function, (x,))


def test_compiles_without_graph_breaks() -> None:
    x = rows(30, 8)
    for options in ({}, {"topk": 2, "loss_group_size": 10}):
        loss_fn = sslfast.KoLeoLoss(**options)
        step = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
        for a, b in zip(value_and_gradients(step, x), value_and_gradients(loss_fn, x), strict=True):
            torch.testing.assert_close(a, b)


def test_forward_mode_by_the_reference() -> None:
    x, tangent = rows(12, 5, torch.float64), torch.randn(12, 5, dtype=torch.float64)
    value, along = torch.func.jvp(sslfast.koleo, (x,), (tangent,))
    gradient = value_and_gradients(sslfast.koleo, x)[1] / GRAD_LOSS
    torch.testing.assert_close(value, sslfast.koleo(x))
    torch.testing.assert_close(along, (gradient * tangent).sum())


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.ones(1, 3), {}, ValueError, r"at least two rows, got 1: one row has no neighbour"),
        (torch.ones(4), {}, ValueError, r"x must be two-dimensional"),
        (torch.ones(4, 3).long(), {}, TypeError, r"x must be float32"),
        (torch.ones(4, 3), {"topk": 4}, ValueError, r"topk must be .* from 1 to the 3 other rows, got 4"),
        (torch.ones(4, 3), {"topk": 0}, ValueError, r"topk must be .* got 0"),
        (torch.ones(6, 3), {"loss_group_size": 4}, ValueError, r"must divide the number of rows, 6, got 4"),
        (torch.ones(6, 3), {"loss_group_size": 1}, ValueError, r"loss_group_size must be .* 2 to the 6 rows, got 1"),
        (torch.ones(6, 3), {"loss_group_size": 3, "topk": 3}, ValueError, r"the 2 other rows of a group, got 3"),
        (torch.ones(6, 3), {"eps": 0.0}, ValueError, r"eps must be a positive number, got 0.0"),
        (torch.ones(6, 3), {"eps": "1"}, ValueError, r"eps must be a positive number, got '1'"),
    ],
)
def test_wrong_input(x: Tensor, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sslfast.koleo(x, **options)
