"""Contracts of the losses of two views that Barlow Twins, VICReg and VIbCReg share."""

from __future__ import annotations

import pytest
import torch

import sslfast
from benchmarks import Unavailable, peers
from helpers import GRAD_LOSS, same_value_and_gradients, two_views, value_and_gradients

LOSSES = {
    "barlow_twins": (sslfast.barlow_twins, sslfast.BarlowTwinsLoss),
    "vicreg": (sslfast.vicreg, sslfast.VICRegLoss),
    "vibcreg": (sslfast.vibcreg, sslfast.VIbCRegLoss),
}
TERMS = {
    "invariance": sslfast.invariance_loss,
    "variance": sslfast.variance_loss,
    "covariance": sslfast.covariance_loss,
}

losses = pytest.mark.parametrize("loss", [function for function, _ in LOSSES.values()], ids=LOSSES)


@losses
@pytest.mark.parametrize("shape", [(6, 3), (4, 6)], ids=str)  # by either form
def test_double_backward(loss, shape: tuple[int, int]) -> None:
    inputs = [z.requires_grad_() for z in two_views(shape)]
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_double_backward_of_a_term() -> None:
    assert torch.autograd.gradgradcheck(sslfast.variance_loss, [two_views((6, 3))[0].requires_grad_()])


@pytest.mark.parametrize("shape", [(64, 20), (12, 40)], ids=str)
@pytest.mark.parametrize(
    ("name", "file", "rounding"), [("barlow_twins", "barlow_twins_loss", 1e-4), ("vicreg", "vicreg_loss", 1e-5)]
)
def test_constant_columns(name: str, file: str, rounding: float, shape: tuple[int, int]) -> None:
    """As lightly's class in float64."""
    function, module = LOSSES[name]
    try:
        theirs = peers.lightly_loss(file, module.__name__)
    except Unavailable as reason:
        pytest.skip(f"lightly 1.6.0 cannot be imported: {reason}")
    z_a, z_b = two_views(shape, torch.float32)
    z_a[:, 3] = 0.1  # whose mean is not 0.1 after rounding
    z_b[:, 3:5] = -7.0
    kernel = value_and_gradients(function, z_a, z_b)
    for k, t in zip(kernel, value_and_gradients(theirs, z_a.double(), z_b.double()), strict=True):
        torch.testing.assert_close(k, t.float(), rtol=1e-4, atol=rounding * t.abs().max().item())


@losses
def test_one_view_learns(loss) -> None:
    z_a, z_b = two_views((20, 50))
    both = value_and_gradients(loss, z_a, z_b)
    for i in (0, 1):
        inputs = [z.clone().requires_grad_(j == i) for j, z in enumerate((z_a, z_b))]
        loss(*inputs).backward(torch.tensor(GRAD_LOSS, dtype=torch.float64))
        torch.testing.assert_close(inputs[i].grad, both[1 + i])
        assert inputs[1 - i].grad is None


def autocast(function):
    return torch.autocast("cpu", dtype=torch.bfloat16)(function)


@losses
def test_autocast_keeps_single_precision(loss) -> None:
    z_a, z_b = two_views((40, 24), torch.float32)
    same_value_and_gradients(autocast(loss), loss, z_a, z_b)
    torch.testing.assert_close(autocast(loss)(z_a.bfloat16(), z_b), loss(z_a.bfloat16().float(), z_b))


@pytest.mark.parametrize("name", TERMS)
def test_autocast_keeps_single_precision_of_the_terms(name: str) -> None:
    views, term = two_views((40, 24), torch.float32), TERMS[name]
    given = views if name == "invariance" else views[:1]
    same_value_and_gradients(autocast(term), term, *given)
    if name == "invariance":
        z_a, z_b = views
        torch.testing.assert_close(autocast(term)(z_a.bfloat16(), z_b), term(z_a.bfloat16().float(), z_b))


@pytest.mark.parametrize(
    ("name", "shape"),
    [*((name, shape) for name in LOSSES for shape in ((40, 16), (16, 40))), ("vicreg", (16, 2, 20))],
    ids=str,
)
def test_compile_without_graph_breaks(name: str, shape: tuple[int, ...]) -> None:
    function, module = LOSSES[name]
    step = torch.compile(module(), fullgraph=True, backend="aot_eager")
    same_value_and_gradients(step, function, *two_views(shape, torch.float32))


ONES = torch.ones(4, 3)
WRONG = [
    (ONES, torch.ones(5, 3), {}, ValueError, r"z_a and z_b .*same shape, got \(4, 3\) and \(5, 3\)"),
    (ONES, torch.ones(4, 2), {}, ValueError, r"z_a and z_b .*same shape, got \(4, 3\) and \(4, 2\)"),
    (torch.ones(1, 3), torch.ones(1, 3), {}, ValueError, "z_a must have at least two rows"),
    (ONES.int(), ONES, {}, TypeError, "z_a .*float32.*int32"),
    (ONES, ONES.half(), {}, TypeError, "z_a and z_b .*same dtype"),
    (ONES, [1.0], {}, TypeError, "z_b must be a torch.Tensor, got list"),
    (ONES, ONES, {"eps": 0.0}, ValueError, "eps must be positive, got 0"),
    (ONES, ONES, {"form": "gram"}, ValueError, "form .*'dual'.*'gram'"),
]
WRONG_FOR = {
    "barlow_twins": [
        (ONES, torch.ones(4, 3, 1), {}, ValueError, r"z_b .*two-dimensional.*\(4, 3, 1\)"),
        (ONES, ONES, {"statistics": "rank"}, ValueError, "statistics .*'local'.*'rank'"),
    ],
    "vicreg": [
        (torch.ones(4, 2, 3), ONES, {}, ValueError, "z_a and z_b .*same shape"),
        (torch.ones(4), torch.ones(4), {}, ValueError, r"z_a .*two-dimensional.*\(4,\)"),
        (torch.ones(4, 0, 3), torch.ones(4, 0, 3), {}, ValueError, r"z_a .*at least one.*\(4, 0, 3\)"),
        (ONES, ONES, {"eps": -1.0}, ValueError, "eps must be positive, got -1"),
        (ONES, ONES, {"variance_reduction": "none"}, ValueError, "reduction .*'sum'.*'none'"),
        (ONES, ONES, {"invariance": "mean"}, ValueError, "invariance .*'local'.*'mean'"),
    ],
    "vibcreg": [],
}


@pytest.mark.parametrize(
    ("name", "z_a", "z_b", "options", "error", "message"),
    [(name, *case) for name in LOSSES for case in (*WRONG, *WRONG_FOR[name])],
)
def test_wrong_input(name: str, z_a, z_b, options: dict, error: type[Exception], message: str) -> None:
    function, module = LOSSES[name]
    with pytest.raises(error, match=message):
        function(z_a, z_b, **options)
    if options:
        with pytest.raises(error, match=message):
            module(**options)


def test_wrong_input_of_the_terms() -> None:
    one = torch.ones(1, 3)
    for function in (sslfast.variance_loss, sslfast.covariance_loss):
        with pytest.raises(ValueError, match="x must have at least two rows"):
            function(one)
    with pytest.raises(ValueError, match="x and y must have the same shape"):
        sslfast.invariance_loss(one, torch.ones(2, 3))
    with pytest.raises(ValueError, match="eps must be positive, got 0"):
        sslfast.variance_loss(torch.ones(2, 3), 0.0)
