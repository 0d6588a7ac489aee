"""A loss as a call of (rows, features), and the rows, in float64 on the CPU.

``waits`` says why a loss lets the host wait for the device, which no graph can capture: by what it promises, not by
accident. A loss with state is made anew for each call, so that two calls see the same state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Problem(NamedTuple):
    """``function(*learn, *scalars, *given)``; ``learn`` and floating-point ``given`` come in the dtype under test."""

    function: Callable[..., Any]
    learn: tuple[Tensor, ...]
    scalars: tuple[float, ...] = ()
    given: tuple[Tensor, ...] = ()


class Loss(NamedTuple):
    """One call. ``names``: public ones that it covers; ``make``: of rows and features; ``triton``: on such kernels."""

    name: str
    names: tuple[str, ...]
    make: Callable[[int, int], Problem]
    triton: bool = True
    waits: str = ""
    form: str = ""  # of the gradient, forced


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two(n: int, d: int, noise: float = 0.7) -> tuple[Tensor, Tensor]:
    """Views whose rows resemble each other."""
    z = rows(n, d)
    return z, z + noise * rows(n, d, seed=1)


def unit(n: int, d: int, seed: int = 0) -> Tensor:
    return F.normalize(rows(n, d, seed=seed), dim=1)


def labels(n: int, classes: int = 7) -> Tensor:
    return torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(3))


def of_two_views(name: str, function: Callable[..., Any], *scalars: float, **options: Any) -> Loss:
    return Loss(name, (name.partition(",")[0],), lambda n, d: Problem(function, two(n, d), scalars), **options)
