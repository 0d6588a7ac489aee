"""second_moment on the CPU: sums and every gradient against the reference in float64, in both forms, and its contracts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sslfast
from helpers import within_budget
from sslfast import _native, reference
from sslfast.ops.second_moment import KEPT, dual_is_cheaper

# (rows, columns): aligned, ragged, prime, one row, one column, wider than a block of rows or of columns.
SHAPES = [(64, 64), (100, 48), (61, 127), (3, 5), (1, 8), (33, 1), (200, 450), (450, 200), (20, 1100), (1500, 33)]
KINDS = [  # (pair, cross, center, scale)
    (True, True, True, "variance"),  # Barlow Twins
    (True, False, True, "none"),  # VICReg
    (True, False, True, "norm"),  # VIbCReg
    (False, False, False, "norm"),  # FroSSL
    (True, True, False, "none"),  # spectral contrastive, transposed
    (False, False, True, "variance"),
]
Kind = tuple[bool, bool, bool, str]


def by(
    function: Callable[..., Any], a: Tensor, b: Tensor | None, kind: Kind, dtype: torch.dtype, **options: Any
) -> dict[str, Tensor]:
    """The three outputs and the gradients of a weighted sum of them, in ``dtype``."""
    _, cross, center, scale = kind
    inputs = [x.detach().to(dtype, copy=True).requires_grad_() for x in (a, b) if x is not None]
    given = inputs if len(inputs) == 2 else [*inputs, None]
    out = function(*given, cross=cross, center=center, scale=scale, eps=1e-5, **options)
    n, d = a.shape
    weights = torch.linspace(0.5, 1.5, out.diagonal.numel(), dtype=torch.float64).view_as(out.diagonal)
    size = float(reference.second_moment(a.double(), None, center=center, scale=scale).diagonal.abs().max()) or 1.0
    loss = (out.off_diagonal.double() * torch.tensor([1.3, 0.7])[: len(out.off_diagonal)]).sum() / size
    loss = loss + (weights * out.diagonal.double()).sum() + 0.3 * out.distance.double()
    grads = torch.autograd.grad(loss, inputs)
    return {**out._asdict(), **{f"d{name}": g for name, g in zip("ab", grads, strict=False)}}


def batches(n: int, d: int, kind: Kind, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    a = torch.randn(n, d) + torch.linspace(-2, 2, d)
    b = (0.6 * a + 0.8 * torch.randn(n, d)).to(dtype)
    return a.to(dtype), b if kind[0] else None


def check(a: Tensor, b: Tensor | None, kind: Kind, dtype: torch.dtype, **options: Any) -> None:
    mine = by(sslfast.second_moment, a, b, kind, dtype, **options)
    truth = by(reference.second_moment, a, b, kind, torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    plain = by(reference.second_moment, a, b, kind, wide)
    for name, right in truth.items():
        if name.startswith("d") and len(name) == 2:  # gradients are rounded to the inputs' dtype
            floor = 0.1 if a.shape[1] == 1 else 1e-2  # of one column the gradients cancel, at a norm to nothing
            within_budget(name, mine[name], plain[name].to(dtype), right, dtype, floor=floor)
        else:  # the dual form's sum is what is left of ‖M‖² without the diagonal's squares
            dual_sum = name == "off_diagonal" and options.get("form") == "dual"
            floor = truth["diagonal"].detach().square().sum().item() if dual_sum else 1e-3
            within_budget(name, mine[name], plain[name], right, wide, floor=floor)


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_and_gradients(shape: tuple[int, int], kind: Kind, form: str) -> None:
    a, b = batches(*shape, kind, torch.float32)
    check(a, b, kind, torch.float32, form=form)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
def test_dtypes(kind: Kind, form: str, dtype: torch.dtype) -> None:
    for shape in [(61, 127), (127, 61), (200, 33)]:
        a, b = batches(*shape, kind, dtype)
        check(a, b, kind, dtype, form=form)
