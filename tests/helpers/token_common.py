"""What the tests of the token operations share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from helpers import within_budget

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

Inputs = Sequence[Tensor | None]


def name_of(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def numbers(*shape: int) -> Tensor:
    """Float64 numbers that every dtype holds, so that all of them see the same."""
    return torch.randn(shape).to(torch.bfloat16).double()


def as_type(inputs: Inputs, *how: object) -> list[Tensor | None]:
    return [None if t is None else t.to(*how) for t in inputs]


def value_and_gradients(function: Callable[..., Tensor], inputs: Inputs, seed: int = 1) -> list[Tensor]:
    """The value, and gradients of those inputs that are tensors, for a random gradient of the value."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]  # with the strides that they have
    value = function(*leaves)
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(value.shape, generator=generator).to(torch.bfloat16).to(value)
    return [value.detach(), *torch.autograd.grad(value, [t for t in leaves if t is not None], grad)]


def check(function: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: Inputs, dtype: torch.dtype) -> None:
    """The value has the plain formula's bits in ``dtype``, gradients are within the budget; ``inputs`` are float64."""
    given = as_type(inputs, dtype)
    found, expected = value_and_gradients(function, given), value_and_gradients(plain, given)
    truth = value_and_gradients(plain, inputs)
    assert torch.equal(found[0], expected[0])
    for i, (mine, its, true) in enumerate(zip(found, expected, truth, strict=True)):
        assert mine.dtype == dtype
        if true.numel():
            # 16-bit sums are float32 here: the error is one rounding, whatever the formula's own is.
            its = true.to(dtype) if dtype in (torch.bfloat16, torch.float16) else its
            within_budget(f"result {i}", mine, its, true, dtype)


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for mine, its in zip(found, expected, strict=True):
        assert torch.equal(mine, its)


def check_subsets(function: Callable[..., Tensor], inputs: Inputs) -> None:
    """Gradients of one or two inputs alone are those of all of them."""
    given = [i for i, t in enumerate(inputs) if t is not None]
    expected = dict(zip(given, value_and_gradients(function, inputs)[1:], strict=True))
    for wanted in itertools.chain.from_iterable(itertools.combinations(given, n) for n in (1, 2)):

        def partial(*some: Tensor, wanted: tuple[int, ...] = wanted) -> Tensor:
            mixed = dict(zip(wanted, some, strict=True))
            return function(*(mixed.get(i, t) for i, t in enumerate(inputs)))

        found = value_and_gradients(partial, [inputs[i] for i in wanted])[1:]
        assert_same(found, [expected[i] for i in wanted])
