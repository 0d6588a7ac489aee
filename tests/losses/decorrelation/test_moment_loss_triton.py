"""Losses that the Triton kernels of second_moment compute whole: values and gradients, against the sums in parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sslfast
from helpers import check_loss, reference_moment, two_views, value_and_gradients, within_budget
from sslfast.ops._second_moment_operators import loss_by_reference
from sslfast.ops.moment_losses import Loss
from sslfast.ops.types import MomentOptions
from triton_common import DEVICE, MARKS

op = sslfast.ops.second_moment
pytestmark = MARKS

LossOfViews = Callable[[Tensor, Tensor], Tensor]
# What each loss adds up can be larger than what is left of it.
LOSSES: dict[str, tuple[LossOfViews, float]] = {
    "barlow_twins": (lambda a, b: sslfast.barlow_twins(a, b, 0.02, scale_loss=0.5), 1.0),
    "vicreg": (sslfast.vicreg, 1.0),
    "vicreg, sum": (lambda a, b: sslfast.vicreg(a, b, 5.0, 10.0, 2.0, eps=0.1, variance_reduction="sum"), 1.0),
    "vibcreg": (sslfast.vibcreg, 25.0),
    "covariance_loss": (lambda a, b: sslfast.covariance_loss(a), 1.0),
    "spectral_contrastive": (lambda a, b: sslfast.spectral_contrastive(a, b, 3.0), 1.0),
    "spectral_contrastive, any norm": (lambda a, b: sslfast.spectral_contrastive(0.3 * a, b, None), 10.0),
}
# (rows, columns): both forms by "auto", ragged, one column, two rows, several tiles.
SHAPES = [(64, 64), (33, 20), (20, 90), (2, 5), (40, 1), (150, 70)]


def by(backend: str, loss: LossOfViews) -> LossOfViews:
    def function(*views: Tensor) -> Tensor:
        with sslfast.use_backend(backend):
            return loss(*(views if len(views) == 2 else (*views, *views)))

    return function


def check(name: str, views: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss from one operator, by the error budget of the same loss from the reference's sums."""
    loss, floor = LOSSES[name]
    calls: list[Loss] = []
    launch = op._triton
    monkeypatch.setattr(op, "_triton", lambda *given: calls.append(given[-1]) or launch(*given))
    given = tuple(x.to(DEVICE) for x in (views[:1] if name == "covariance_loss" else views))
    # Two rows that are normalised leave of a gradient what is much smaller than its terms.
    terms = 2 if len(views[0]) == 2 else None
    check_loss(by("triton", loss), by("reference", loss), given, floor=floor, terms=terms)
    assert len(calls) == 1 and calls[0].off > 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    check(name, two_views(shape, torch.float32), monkeypatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_16_bit(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check(name, two_views((50, 90), dtype), monkeypatch)


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("penalty", ["none", "identity", "hinge", "trace"])
@pytest.mark.parametrize(("views", "cross"), [(1, False), (2, False), (2, True)])
def test_every_penalty_of_every_matrix(views: int, cross: bool, penalty: str, form: str) -> None:
    """Also those that no loss asks for, with gradients of the sums beside that of the loss."""
    loss = Loss(off=0.01, distance=0.3 if views == 2 and not cross else 0.0, columns=0.7, penalty=penalty, floor=0.01)
    inputs = [x.to(DEVICE) for x in two_views((30, 33), torch.float32)[:views]]
    options = MomentOptions(cross, scale="norm", form=form)
    weights = torch.linspace(-1.0, 1.0, 33, device=DEVICE)

    def kernel(*given: Tensor) -> Tensor:
        found, off, diagonal, distance, *_ = op._triton(given[0], (*given, None)[1], options, loss)
        return found + off.sum() + (diagonal * weights).sum() + 0.1 * distance

    def parts(*given: Tensor) -> Tensor:
        other = given[1] if views == 2 else None
        moment = reference_moment(given[0], other, cross=cross, scale="norm", eps=1e-5)
        sums = moment.off_diagonal.sum() + (moment.diagonal * weights.to(moment.diagonal)).sum() + 0.1 * moment.distance
        return loss_by_reference(given[0], other, options, loss) + sums

    found, plain = value_and_gradients(kernel, *inputs), value_and_gradients(parts, *inputs)
    truth = value_and_gradients(parts, *(x.double() for x in inputs))
    for what, *values in zip(("loss", "da", "db"), found, plain, truth, strict=False):
        within_budget(what, *values, torch.float32, floor=1.0 if what == "loss" else 1e-2)


@pytest.mark.parametrize("name", ["vicreg", "vibcreg"])
def test_columns_that_are_constant_or_wide(name: str) -> None:
    """A hinge that is not reached has no gradient, and a constant column a finite one."""
    a, b = (x.to(DEVICE) for x in two_views((40, 8), torch.float32))
    a[:, 1] = 2.0
    a[:, 5] *= 30
    for view in (a, b):
        view.requires_grad_()
    loss = LOSSES[name][0]
    expected = torch.autograd.grad(by("reference", loss)(a.double(), b.double()), (a, b))
    found = torch.autograd.grad(by("triton", loss)(a, b), (a, b))
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-4)


def test_a_loss_that_is_nan() -> None:
    a, b = (x.to(DEVICE) for x in two_views((20, 9), torch.float32))
    a[3, 4] = float("nan")
    assert all(by("triton", loss)(a, b).isnan() for loss, _ in LOSSES.values())


def test_rows_of_length_one_are_shortened_as_by_clamp() -> None:
    """Where a row is exactly as long as allowed, its length has a gradient."""
    a = torch.eye(6, device=DEVICE).requires_grad_()
    b = torch.eye(6, device=DEVICE).roll(1, 0)
    loss: LossOfViews = sslfast.spectral_contrastive
    (found,), (expected,) = (torch.autograd.grad(by(name, loss)(a, b), a) for name in ("triton", "reference"))
    torch.testing.assert_close(found, expected)


def test_places_between_rows_and_features() -> None:
    """Views of strided rows, as lightly's."""
    a, b = (x.to(DEVICE) for x in two_views((12, 3, 10), torch.float32))
    found, expected = (value_and_gradients(by(name, sslfast.vicreg), a, b) for name in ("triton", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg", "spectral_contrastive"])
def test_second_derivatives(name: str) -> None:
    a, b = (x.to(DEVICE).requires_grad_() for x in two_views((9, 7), torch.float32))
    grads = []
    for backend in ("triton", "reference"):
        first = torch.autograd.grad(by(backend, LOSSES[name][0])(a, b), (a, b), create_graph=True)
        grads.append(torch.autograd.grad(sum(g.square().sum() for g in first), (a, b)))
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


def test_same_bits_inside_an_autocast_region() -> None:
    """Of float32 inputs, whose products an autocast region would round."""
    views = [x.to(DEVICE) for x in two_views((40, 60), torch.float32)]

    def step() -> list[Tensor]:
        return value_and_gradients(by("triton", sslfast.barlow_twins), *views)

    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        inside = step()
    assert all(torch.equal(x, y) for x, y in zip(inside, step(), strict=True))


@pytest.mark.parametrize("grad", [False, True])
def test_compiled(grad: bool) -> None:
    views = [x.to(DEVICE).requires_grad_(grad) for x in two_views((12, 20), torch.float32)]

    def step(*given: Any) -> Tensor:
        return sslfast.vicreg(*given)

    with sslfast.use_backend("triton"):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        found, expected = compiled(*views), step(*views)
    assert torch.equal(found, expected)
    if grad:
        for mine, true in zip(torch.autograd.grad(found, views), torch.autograd.grad(expected, views), strict=True):
            assert torch.equal(mine, true)
