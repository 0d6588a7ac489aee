"""What the tests of the token operations share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import sslfast
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


def strided_tokens(base: Tensor) -> dict[str, Tensor]:
    """Tokens [images, tokens, features] as others leave them, of ``base`` [5, 39, 24]."""
    return {
        "from a convolution": base.transpose(1, 2),
        "without the class token": base[:, 1:],
        "every second feature": base[..., ::2],
        "one image": base[:1].expand(5, -1, -1),
        "not aligned": base.flatten()[1:].narrow(0, 0, 5 * 900).view(5, 30, 30),
    }


def check_strides(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor, name: str) -> None:
    """Bits are those of contiguous inputs, and of contiguous gradients of the value."""
    leaves = [t.detach().requires_grad_() for t in inputs]  # with their strides
    value, dense = function(*leaves), function(*(t.contiguous() for t in leaves))
    assert value.is_contiguous() and torch.equal(value, dense), name
    expected = torch.autograd.grad(dense, leaves, grad.contiguous(), retain_graph=True)
    assert_same(torch.autograd.grad(value, leaves, grad, retain_graph=True), expected)
    expected = torch.autograd.grad(dense, leaves, torch.ones_like(dense))
    assert_same(torch.autograd.grad(value.sum(), leaves), expected)  # a gradient whose strides are 0


def check_repeats(function: Callable[..., Tensor], inputs: Inputs) -> None:
    """The same bits in the second run, whose number of threads is another."""
    first = value_and_gradients(function, inputs)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        second = value_and_gradients(function, inputs)
    finally:
        torch.set_num_threads(threads)
    assert_same(first, second)


def check_twice_differentiable(function: Callable[..., Tensor], inputs: Inputs, device: str) -> None:
    """First and second derivatives by finite differences."""
    leaves = [None if t is None else t.to(device).requires_grad_() for t in inputs]
    with sslfast.use_backend(device):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


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
