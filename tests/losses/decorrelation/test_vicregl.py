"""VICRegL against lightly's and against the formula, with and without local views; wrong input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import Unavailable, peers
from sslfast.losses.decorrelation.vicregl import VICRegLLoss, vicregl

GRAD_LOSS = 3.0  # not 1: a backward that forgets it fails
# (global views, local views, rows, global features, local features, global grid, local grid)
CASES = [
    (2, 0, 6, 10, 7, (3, 3), None),
    (2, 3, 5, 4, 9, (4, 3), (2, 2)),
    (3, 2, 4, 6, 3, (3, 2), (2, 1)),  # an odd number of views
    (1, 1, 2, 3, 2, (2, 2), (1, 1)),  # one global view, and a single local feature
]
OPTIONS = {"lambda_param": 20.0, "mu_param": 15.0, "nu_param": 2.0, "alpha": 0.6, "eps": 1e-3}


def lightly(**options):
    try:
        return peers.lightly_loss("vicregl_loss", "VICRegLLoss", **options)
    except Unavailable as reason:
        pytest.skip(f"lightly 1.6.0 cannot be imported: {reason}")


class Views:
    """Random views; ``features`` are the tensors that learn, ``call`` puts them in their places."""

    def __init__(self, shape: tuple, dtype: torch.dtype) -> None:
        self.globals, self.locals, n, d, c, global_grid, local_grid = shape
        shared = torch.randn(n, d)
        self.features: list[Tensor] = []
        self.grids: list[Tensor] = []
        for grid in [global_grid] * self.globals + [local_grid] * self.locals:
            # Neither collapsed nor spread: some of the hinges at standard deviation 1 are active.
            self.features += [(shared + 0.5 * torch.randn(n, d)).to(dtype), torch.randn(n, *grid, c).to(dtype)]
            self.grids.append(torch.rand(n, *grid, 2).to(dtype))

    def call(self, function, *features: Tensor) -> Tensor:
        views = list(zip(features[::2], features[1::2], strict=True))
        first, grids = self.globals, [grid.to(features[0].dtype) for grid in self.grids]
        local = (views[first:], grids[first:]) if self.locals else (None, None)
        return function(views[:first], grids[:first], *local).reshape(())

    def value_and_gradients(self, function, dtype: torch.dtype | None = None) -> list[Tensor]:
        leaves = [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in self.features]
        loss = self.call(function, *leaves)
        return [loss.detach(), *torch.autograd.grad(GRAD_LOSS * loss, leaves)]


def plain(features, grids, local_features=None, local_grids=None, num_matches=(20, 4)) -> Tensor:
    """Pair by pair and match by match, with D × D covariances."""
    w = OPTIONS
    first = len(features)
    views = [(*view, grid) for view, grid in zip(features, grids, strict=True)]
    views += [(*view, grid) for view, grid in zip(local_features or [], local_grids or [], strict=True)]

    def spread(x: Tensor, nu: float) -> Tensor:
        x = x - x.mean(0)
        covariance = x.T @ x / (len(x) - 1)
        off = covariance - covariance.diagonal().diag()
        hinge = F.relu(1 - (covariance.diagonal() + w["eps"]).sqrt()).mean()
        return w["mu_param"] * hinge + nu * off.square().sum() / len(covariance)

    def matched(x: Tensor, y: Tensor, place_x: Tensor, place_y: Tensor, count: int) -> Tensor:
        """VICReg of the ``count`` rows of x [N, P, C] nearest to one of y's."""
        count = min(count, x.shape[1])
        pairs = [[], []]
        for i in range(len(x)):
            distance = (place_x[i].unsqueeze(1) - place_y[i].unsqueeze(0)).square().sum(2).detach()  # [P, Q]
            chosen = distance.amin(1).argsort()[:count]
            pairs[0].append(x[i, chosen])
            pairs[1].append(y[i, distance.argmin(1)[chosen]])
        a, b = (torch.stack(side) for side in pairs)  # [N, count, C]
        nu = w["nu_param"] / 2
        both = [(spread(a[:, m], 2 * nu) + spread(b[:, m], 2 * nu)) / 2 for m in range(count)]
        return w["lambda_param"] * (a - b).square().mean() + torch.stack(both).mean()

    whole, part, count = 0.0, 0.0, 0
    for i in range(first):
        for j in range(len(views)):
            if i == j:
                continue
            (x, x_local, x_grid), (y, y_local, y_grid) = views[i], views[j]
            x_local, y_local, x_grid, y_grid = (t.flatten(1, 2) for t in (x_local, y_local, x_grid, y_grid))
            whole = whole + w["lambda_param"] * (x - y).square().mean()
            for place_x, place_y in ((x_local, y_local), (x_grid, y_grid)):
                part = part + 0.5 * matched(x_local, y_local, place_x, place_y, num_matches[0])
                part = part + 0.5 * matched(y_local, x_local, place_y, place_x, num_matches[1])
            count += 1
    spreads = torch.stack([spread(x, w["nu_param"]) for x, _, _ in views]).mean()
    return w["alpha"] * (whole / count + spreads) + (1 - w["alpha"]) * part / count


@pytest.mark.parametrize("num_matches", [(20, 4), (2, 3), (None, -1)], ids=str)
@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_lightly(dtype: torch.dtype, shape: tuple, num_matches: tuple) -> None:
    views = Views(shape, dtype)
    kernel = views.value_and_gradients(VICRegLLoss(**OPTIONS, num_matches=num_matches))
    expected = views.value_and_gradients(lightly(**OPTIONS, num_matches=num_matches))
    tolerance = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    for a, b in zip(kernel, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("shape", CASES, ids=str)
def test_formula(shape: tuple) -> None:
    views = Views(shape, torch.float64)
    kernel = views.value_and_gradients(lambda *v: vicregl(*v, **OPTIONS, num_matches=(3, 2)))
    expected = views.value_and_gradients(lambda *v: plain(*v, num_matches=(3, 2)))
    for a, b in zip(kernel, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_views_on_one_grid() -> None:
    """All places are at distance zero: which are taken is lightly's choice too."""
    views = Views((2, 0, 4, 5, 6, (7, 7), None), torch.float64)
    views.grids = [views.grids[0]] * 2
    kernel = views.value_and_gradients(VICRegLLoss(**OPTIONS))
    for a, b in zip(kernel, views.value_and_gradients(lightly(**OPTIONS)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(dtype: torch.dtype) -> None:
    """Squares of differences and covariances that float16 cannot hold."""
    views = Views(CASES[1], dtype)
    views.features = [30 * t for t in views.features]
    function = lambda *v: vicregl(*v, **OPTIONS, num_matches=(3, 2))  # noqa: E731
    found, truth = views.value_and_gradients(function), views.value_and_gradients(plain_three_two, torch.float64)
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype and truth[0] > 65504
    torch.testing.assert_close(found[0].double(), truth[0], rtol=1e-5, atol=0.0)
    for a, b in zip(found[1:], truth[1:], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=2e-2 * b.abs().max().item())


def plain_three_two(*views) -> Tensor:
    return plain(*views, num_matches=(3, 2))


def test_compile_without_graph_breaks() -> None:
    views = Views(CASES[0], torch.float32)
    step = torch.compile(lambda *v: vicregl(*v, num_matches=(2, 1)), fullgraph=True, backend="aot_eager")
    expected = views.value_and_gradients(lambda *v: vicregl(*v, num_matches=(2, 1)))
    for a, b in zip(views.value_and_gradients(step), expected, strict=True):
        torch.testing.assert_close(a, b)


def view(n: int = 4, d: int = 3, h: int = 2, c: int = 5) -> tuple[Tensor, Tensor]:
    return torch.ones(n, d), torch.ones(n, h, 2, c)


GRID = torch.ones(4, 2, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([view()], [GRID] * 2), r"global_view_features and global_view_grids .*same length, got 1 and 2"),
        (([view()] * 2, [GRID] * 2, [view()]), r"local_view_features and local_view_grids must be given together"),
        (([view()] * 2, [GRID] * 2, None, [GRID]), r"local_view_grids and local_view_features must be given together"),
        (([view()] * 2, [GRID] * 2, [view()], []), r"local_view_features and local_view_grids .*got 1 and 0"),
        (([view()], [GRID]), r"needs a global view and another one, got 1 global and 0 local"),
        (([view(), view(d=2)], [GRID] * 2), r"global features .*same shape"),
        (([view(), view(c=2)], [GRID] * 2), r"local feature of .*same shape"),
        (([view(), view(h=3)], [GRID] * 2), r"global_view_grids\[1\] must have shape \(4, 3, 2, 2\)"),
        (([view(n=1)] * 2, [GRID[:1]] * 2), r"at least two rows, got 1"),
    ],
)
def test_wrong_input(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vicregl(*arguments)


@pytest.mark.parametrize("num_matches", [(0, 4), (20,), 20, (20, -2), (20, 4.0)], ids=str)
def test_wrong_num_matches(num_matches) -> None:
    with pytest.raises(ValueError, match=r"num_matches must be two positive integers"):
        VICRegLLoss(num_matches=num_matches)


def test_wrong_choice() -> None:
    with pytest.raises(ValueError, match="invariance .*'local'.*'mean'"):
        VICRegLLoss(invariance="mean")


def test_inputs_of_the_wrong_kind() -> None:
    whole, local, grid = torch.randn(4, 3), torch.randn(4, 2, 2, 5), torch.rand(4, 2, 2, 2)
    with pytest.raises(TypeError, match=r"global_view_features\[1\] must be a pair of tensors"):
        vicregl([(whole, local), (whole,)], [grid, grid])
    with pytest.raises(TypeError, match=r"global_view_features\[0\]\[1\] must be float32.*int64"):
        vicregl([(whole, local.long()), (whole, local)], [grid, grid])


def test_mixed_dtypes_under_autocast() -> None:
    whole, local, grid = torch.randn(4, 3), torch.randn(4, 2, 2, 5), torch.rand(4, 2, 2, 2)
    half = (whole.bfloat16(), local.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = vicregl([(whole, local), half], [grid, grid])
    wide = vicregl([(whole, local), tuple(t.float() for t in half)], [grid, grid])
    torch.testing.assert_close(loss, wide)
