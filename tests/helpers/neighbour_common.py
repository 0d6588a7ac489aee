"""What the tests of neighbours share: sizes, rows, and gradients of what a function of rows gives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from helpers import SHAPES, roundings, within_budget

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# (rows, columns or 0 for the rows themselves, features, count): one block and several, groups of blocks, one row, more
# columns than are packed at a time, lists that are merged.
CASES = [
    *((m, 0, d, min(c, m - 1)) for (m, d), c in zip(SHAPES, (1, 3, 20, 2, 1, 1, 70, 1), strict=True) if m > 1),
    (1700, 0, 16, 2),
    (1, 300, 8, 300),
    (67, 97, 13, 1),
    (20, 9000, 130, 5),
    (3, 6000, 33, 100),
    (301, 257, 40, 1),
    (2, 0, 3, 1),
]


def wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rows(m: int, n: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
    return torch.randn(m, d).to(dtype), torch.randn(n, d).to(dtype) if n else None


def whole_rows(m: int, n: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
    """Small whole numbers: every sum is exact, and many are equal."""
    return torch.randint(-2, 3, (m, d)).to(dtype), torch.randint(-2, 3, (n, d)).to(dtype) if n else None


def learning(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def gradients(function, *tensors: Tensor | None) -> list[Tensor]:
    """Of what the function of q and k gives, each entry with a weight of its own; −inf and +inf have none."""
    leaves = learning(*tensors)
    found = function(*leaves)
    weights = torch.linspace(-1, 2, found.numel(), dtype=found.dtype).view_as(found)
    total = (found.masked_fill(found.isinf(), 0.0) * weights).sum()
    return list(torch.autograd.grad(total, [t for t in leaves if t is not None]))


def check_gradients(
    function: Callable[..., Tensor], formula: Callable[..., Tensor], q: Tensor, k: Tensor | None
) -> None:
    """Of both ends, by error budget."""
    given = [None if t is None else t.to(wide(q)) for t in (q, k)]
    plain = roundings(gradients, formula, *given)
    truth = gradients(formula, *(None if t is None else t.double() for t in (q, k)))
    for what, mine, single, true in zip(("dq", "dk"), gradients(function, q, k), plain, truth, strict=False):
        assert mine.dtype == q.dtype
        within_budget(what, mine, single.to(q.dtype), true, q.dtype, 1.0)
