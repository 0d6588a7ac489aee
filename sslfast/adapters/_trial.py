"""Trials: whether a package's method gives the numbers and gradients of sslfast's form of it, for small inputs."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._serve import Unserved

Fast = Callable[..., Any]


def shaken(model: Any) -> Any:
    """In float64, with random numbers in every parameter: what is zero at the start hides what is done with it."""
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def same(original: Fast, fast: Fast, model: nn.Module, calls: Sequence[tuple[Any, ...]]) -> bool:
    """Both give the same numbers, and the same gradients of all parameters and inputs, from the same random numbers.

    In training and in evaluation: a method may ask which one it is.
    """
    for training, call in itertools.product((True, False), calls):
        model.train(training)
        found = []
        for function in (original, fast):
            seed()
            try:
                result = function(model, *call)
            except Exception:
                return False
            if isinstance(result, Unserved):
                return False
            found.append(_numbers(result, [*model.parameters(), *(t for t in call if isinstance(t, Tensor))]))
        if not all(
            a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-11)
            for a, b in zip(*found, strict=True)
        ):
            return False
    return True


def seed() -> None:
    """The trials' random numbers; torch.manual_seed would seed every GPU too."""
    torch.default_generator.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@contextlib.contextmanager
def random_numbers_kept() -> Iterator[None]:
    """After the block the generators of torch (the CPU's), ``random`` and NumPy are where they were before."""
    states = torch.default_generator.get_state(), random.getstate(), np.random.get_state()
    try:
        # A default device that is a GPU would build the small models there, from its random numbers.
        with torch.device("cpu"):
            yield
    finally:
        torch.default_generator.set_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def _numbers(result: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    tensors = [t for t in (result if isinstance(result, tuple) else [getattr(result, "logits", result)])]
    learned = [t for t in inputs if t.requires_grad]
    weighted = [(t.double() * torch.linspace(1, 2, t.numel()).view(t.shape)).sum() for t in tensors if t.requires_grad]
    if not weighted:
        return tensors
    return [*tensors, *torch.autograd.grad(sum(weighted), learned, materialize_grads=True, allow_unused=True)]
