"""The error budget of helpers.py: it does not depend on one run's roundings, and still sees the fifth digit."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from conftest import TESTS
from helpers import run_with, within_budget
from roundings import DRAWS, every_rounding, roundings


def cancelling(kind: torch.dtype) -> Tensor:
    """A sum of 200 products of both signs, a hundredth of their size."""
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 200, generator=generator)
    b[-1] -= ((a.double() @ b.double() - 0.01) / a[-1]).float()
    return a.to(kind) @ b.to(kind)


def test_a_reference_that_lost_nothing_allows_what_it_could_have_lost() -> None:
    """Its own value is the truth's, by luck; another order of the same sum is wrong by more than the tolerance."""
    truth = cancelling(torch.float64)
    runs = iter([lambda: truth.float(), *[lambda: cancelling(torch.float32)] * DRAWS])
    plain = roundings(lambda: next(runs)())
    size = max(abs(x.double() - truth).item() for _, x in every_rounding(plain))
    assert 2e-7 < size < 1e-5  # the tolerance is 2e-8
    within_budget("sum", truth + size, plain, truth, torch.float32)
    for reference, error in ((truth.float(), size), (plain, 1.2 * size)):
        with pytest.raises(AssertionError, match="error .* by largest entry, allowed"):
            within_budget("sum", truth + error, reference, truth, torch.float32)


def softmax(kind: torch.dtype) -> list[Tensor]:
    z = torch.randn(60, 40, generator=torch.Generator().manual_seed(1)).to(kind).requires_grad_()
    loss = (0.1 * z @ z.T).logsumexp(1).mean()
    return [loss.detach(), *torch.autograd.grad(loss, z)]


def test_an_error_in_the_fifth_digit_is_seen() -> None:
    """Of the value, of the gradient, and of one entry of it."""
    plain, truth = roundings(softmax, torch.float32), softmax(torch.float64)
    for reference, right in zip(plain, truth, strict=True):
        within_budget("right", right.float(), reference, right, torch.float32)
        one = torch.zeros_like(right).flatten()
        one[right.abs().argmax()] = 1
        for wrong in (right * (1 + 2e-5), right * (1 + 2e-5 * one.view_as(right)), right * float("nan")):
            with pytest.raises(AssertionError, match="wrong: error"):
                within_budget("wrong", wrong, reference, right, torch.float32)
    with pytest.raises(AssertionError, match="shape"):
        within_budget("wrong", truth[1][:1], plain[1], truth[1], torch.float32)


def test_roundings_are_many_reproducible_and_made_on_demand() -> None:
    calls = []

    def run() -> dict[str, Tensor]:
        calls.append(1)
        return {"y": (1 + torch.rand(50)).cumsum(0).exp().log()}

    numbers = torch.get_rng_state()
    y = roundings(run)["y"]
    after = torch.get_rng_state()
    within_budget("y", y.draw(0), y, y.draw(0).double(), torch.float32)
    assert len(calls) == 1
    found = [t for _, t in every_rounding(y)]
    assert len(calls) == len(found) == 1 + DRAWS and len({tuple(t.tolist()) for t in found}) > DRAWS
    assert torch.equal(torch.get_rng_state(), after)  # so a draw here or there changes no number of the rest of a test
    torch.set_rng_state(numbers)
    again = [t for _, t in every_rounding(roundings(run)["y"])]
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    part = y[:3].double()
    assert part.draw(2).dtype == torch.float64 and torch.equal(part.draw(2), found[2][:3].double())


def test_what_is_moved() -> None:
    """Results, by 2u and its rounding, alike for all that read them; not zeros, infinities, 16-bit or whole numbers."""
    x = torch.tensor([1.0, -3.0, 0.0, float("inf"), float("nan")])
    for i in range(1, 1 + DRAWS):
        y = roundings(lambda: x + 0.0).draw(i)
        torch.testing.assert_close(y, x, rtol=1.5 * 2.0**-23, atol=0, equal_nan=True)
        assert (roundings(lambda: (z := x[:3] + 1) - z).draw(i) == 0).all()
        for exact in (x.half(), torch.arange(5)):
            assert torch.equal(roundings(lambda t=exact: (t * 1)[:4]).draw(i), exact[:4])
    written = torch.ones(4)
    assert roundings(lambda: written.mul_(2)).draw(1) is written and (written == 4).all()


def test_the_backward_is_moved_too() -> None:
    x = torch.linspace(1, 2, 50, requires_grad=True)
    plain = roundings(lambda: torch.autograd.grad(x.sum(), x)[0] * 1 + torch.autograd.grad((x * x).sum(), x)[0])
    assert len({tuple(t.tolist()) for _, t in every_rounding(plain)}) > DRAWS


LOSSES = "nt_xent second_moment similarity_lse similarity_logsigmoid clip sup_con dcl hypersphere moco info_nce ranking"


@pytest.mark.slow
def test_the_budgets_of_losses_hold_where_pytorch_sums_in_another_order() -> None:
    """Its kernels for a processor without vectors, MKL's for any, one thread: other roundings of every reference."""
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        pytest.skip("already inside a run of one level of PyTorch")
    environment = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"}
    files = [next(TESTS.rglob(f"test_{name}.py")) for name in LOSSES.split()]
    chosen = "gradients or rows or scale or single or itself or normalis"
    run_with(
        environment, files, f"({chosen}) and not (float64 or float16 or any_shape or compile)", "not (slow or gpu)"
    )
