"""Whether two implementations compute the same function: errors against float64, and how much of them is rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Largest error against float64 by the largest entry and by the norm, relative to those of the truth, at which two
# implementations still compute the same function. bfloat16 rounds every similarity to 8 bits before the softmax.
AGREEMENT = {"float64": 1e-9, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}

# The error budget: beside AGREEMENT, twice what plain PyTorch is wrong by in the same dtype. A sum of 65,536 terms that
# cancel, such as the scale's gradient, is rounded by everybody. Plain PyTorch itself may be off by so many times
# AGREEMENT; further off, it says nothing about rounding.
TRUSTED = 10.0


def errors(got: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """The relative error of each result against ``truth`` (float64): the larger by the largest entry and by the norm.

    A NaN, or a result of the wrong shape, is infinitely wrong; so is every result if their number is wrong.
    """
    if len(got) != len(truth):
        return [float("inf")] * max(1, len(truth))
    found = []
    for result, exact in zip(got, truth, strict=True):
        if result.shape != exact.shape:
            found.append(float("inf"))
            continue
        error = result.detach().double() - exact
        worst = 0.0
        for size in (lambda t: t.abs().max(), torch.linalg.vector_norm):
            relative = (size(error) / size(exact).clamp_min(1e-300)).item()
            worst = max(worst, relative) if relative == relative else float("inf")
        found.append(worst)
    return found


def disagreement(got: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest of :func:`errors`."""
    return max(errors(got, truth), default=0.0)


def allowance(dtype: str, reference: Sequence[float], count: int) -> list[float]:
    """The error allowed in each of ``count`` results, from those of plain PyTorch in this dtype (none: AGREEMENT)."""
    least = AGREEMENT[dtype]
    if len(reference) != count or not max(reference, default=0.0) <= TRUSTED * least:
        return [least] * count
    return [least + 2 * error for error in reference]


def excess(found: Sequence[float], allowed: Sequence[float]) -> tuple[float, float] | None:
    """(error, allowed) of the result that is furthest over what is allowed; ``None`` where none is."""
    over = [pair for pair in zip(found, allowed, strict=True) if not pair[0] <= pair[1]]
    return max(over, key=lambda pair: pair[0] / pair[1]) if over else None
