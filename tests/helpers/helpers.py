"""What tests of operations share: the error budget, the grid of shapes, levels; and tests of losses of two views."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sslfast
from roundings import Rounded, every_rounding, roundings
from sslfast import reference

# Tolerance on top of twice the reference's own error, relative to the largest entry of the truth (or the norm).
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}

# (rows, features): aligned to the tiles, ragged, prime, tiny, one row, one feature, more than one tile in both.
SHAPES = [(64, 64), (100, 48), (127, 61), (3, 5), (1, 8), (33, 1), (200, 130), (301, 257)]


def at_levels(values: Iterable[Any], chosen: Sequence[Any]) -> list[Any]:
    """The values of a parameter; tests of the chosen ones are marked ``levels``."""
    return [pytest.param(value, marks=pytest.mark.levels) if value in chosen else value for value in values]


def run_with(environment: dict[str, str], files: Sequence[str | Path], chosen: str, marked: str) -> None:
    """Tests of other files, or of this one again, in a process of their own with other variables."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-m", marked, "-k", chosen]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def reference_moment(*args: Any, **kwargs: Any) -> sslfast.SecondMoment:
    """The reference's second moment, its results by name."""
    return sslfast.SecondMoment(*reference.second_moment(*args, **kwargs))


def within_budget(
    name: str, kernel: Tensor, reference: Tensor | Rounded, truth: Tensor, dtype: torch.dtype, floor: float = 1e-6
) -> None:
    """Assert ``err(kernel) ≤ 2·err(reference) + tolerance``, by the largest entry and by the norm; NaN fails.

    Args:
        kernel: what the kernel gave, in ``dtype`` or wider.
        reference: what plain PyTorch gave in ``dtype``. Of :func:`roundings` its error is the largest of many. Of one
            tensor it is what this processor's roundings left, which may be next to nothing: then ``floor`` alone has to
            suffice.
        truth: the reference in float64.
        floor: the size of one entry's terms before they cancel, where that can be more than what is left of them: the
            tolerance is relative to the larger of the two.
    """
    assert kernel.shape == truth.shape, f"{name}: shape {tuple(kernel.shape)}, expected {tuple(truth.shape)}"
    kernel, truth = (t.detach().double().cpu() for t in (kernel, truth))
    norm_floor = floor * truth.numel() ** 0.5
    for how, size, least in (("largest entry", _largest, floor), ("norm", torch.linalg.vector_norm, norm_floor)):
        err, lost = size(kernel - truth).item(), 0.0
        tolerance = TOLERANCE[dtype] * max(size(truth).item(), least)
        for factor, rounding in every_rounding(reference):  # another only while the last allow too little
            lost = max(lost, factor * size(rounding.detach().double().cpu() - truth).item())
            if err <= lost + tolerance:
                break
        else:
            raise AssertionError(
                f"{name}: error {err:.3e} by {how}, allowed {lost + tolerance:.3e} (the reference's counts {lost:.3e})"
            )


def _largest(t: Tensor) -> Tensor:
    return t.abs().max()


def same_nonfinite(name: str, kernel: Tensor, reference: Tensor) -> None:
    """NaN and Inf appear in the same places, finite entries agree to 1e-4."""
    torch.testing.assert_close(kernel, reference, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda m: f"{name}: {m}")


# --------------------------------------------------------- losses of two views, each [N, D], or [N, ..., D] with places

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GRAD_LOSS = 3.0  # not 1: a backward that forgets it fails
# Both forms by "auto", tall and wide, ragged, one feature, two rows.
VIEW_SHAPES = [(64, 64), (101, 30), (17, 90), (40, 200), (2, 5), (33, 1), (3, 2)]


def two_views(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float64, largest: float = 1.6, noise: float = 0.3
) -> tuple[Tensor, Tensor]:
    """Related views whose columns have different means, and deviations from 0.2 to ``largest``; of ``dtype``."""
    d = shape[-1]
    z_a = torch.randn(shape, dtype=torch.float64) * torch.linspace(0.2, largest, d) + torch.linspace(-2, 4, d)
    return z_a.to(dtype), (z_a + noise * torch.randn(shape, dtype=torch.float64)).to(dtype)


def value_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The loss and GRAD_LOSS times its gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.full_like(loss, GRAD_LOSS))]


def check_loss(
    function: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    floor: float = 1.0,
    terms: int | None = None,
) -> None:
    """Value and gradients of a loss within the budget of its plain formula; dtypes are those of sums and of inputs.

    Args:
        floor: the size of the loss's terms before they cancel.
        terms: what a gradient's terms are divided by; by default the entries of a view.
    """
    dtype = inputs[0].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kernel = value_and_gradients(function, *inputs)
    single = roundings(value_and_gradients, formula, *(z.to(wide) for z in inputs))
    truth = value_and_gradients(formula, *(z.double() for z in inputs))
    assert kernel[0].dtype == wide and all(k.dtype == dtype for k in kernel[1:])
    names = ("loss", "dz_a", "dz_b")[: len(kernel)]
    for name, k, s, t in zip(names, kernel, single, truth, strict=True):
        size = floor if name == "loss" else floor * GRAD_LOSS / (terms or inputs[0].numel())
        within_budget(name, k, s.to(k.dtype), t, dtype, size)


def same_value_and_gradients(function: Callable[..., Tensor], other: Callable[..., Tensor], *inputs: Tensor) -> None:
    found, expected = (value_and_gradients(f, *inputs) for f in (function, other))
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true)


class Sizes(TorchDispatchMode):
    """``largest``: the numbers of the largest tensor that an operator has returned inside."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.numel())
        return out
