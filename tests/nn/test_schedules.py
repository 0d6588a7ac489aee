"""Schedules against the formulas of the packages that have them, at the first, the middle and the last steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from sslfast.nn import cosine_schedule, linear_schedule

Formula = Callable[[int, int, float, float], float]


def dino(k: int, n: int, start: float, end: float) -> float:
    """dino.utils.cosine_scheduler: a table of n values; dinov2's returns the final one behind it."""
    table = end + 0.5 * (start - end) * (1 + np.cos(np.pi * np.arange(n) / n))
    return float(table[k]) if k < n else end


def deepmind(k: int, n: int, start: float, end: float) -> float:
    """byol.utils.schedules.target_ema, which ends at 1."""
    assert end == 1
    return 1 - (1 - start) * (np.cos(np.pi * np.clip(k, 0, n) / n) + 1) / 2


def lightly(k: int, n: int, start: float, end: float) -> float:
    """lightly.utils.scheduler.cosine_schedule."""
    if n <= 1 or k >= n - 1:
        return end
    return end - (end - start) * (math.cos(math.pi * k / (n - 1)) + 1) / 2


def dinov3(k: int, n: int, start: float, end: float) -> float:
    """A table over linspace with both ends."""
    table = end + 0.5 * (start - end) * (1 + np.cos(np.pi * np.linspace(0, 1, n)))
    return float(table[k]) if k < n else end


def solo(k: int, n: int, start: float, end: float) -> float:
    """solo.utils.momentum.MomentumUpdater.update_tau, called with the steps done."""
    done = min(k + 1, n)
    return end - (end - start) * (math.cos(math.pi * done / n) + 1) / 2


FORMULAS: dict[str, Formula] = {f.__name__: f for f in (dino, deepmind, lightly, dinov3, solo)}


@pytest.mark.parametrize("n", [2, 10, 1001])
@pytest.mark.parametrize("ending", FORMULAS)
def test_cosine(ending: str, n: int) -> None:
    for k in (0, 1, n // 2, n - 1, n, n + 5):
        found = cosine_schedule(k, n, 0.996, 1.0, ending=ending)
        assert found == pytest.approx(FORMULAS[ending](k, n, 0.996, 1.0), abs=1e-15)
    if ending != "deepmind":
        assert cosine_schedule(n // 2, n, 0.04, 0.4, ending=ending) == pytest.approx(
            FORMULAS[ending](n // 2, n, 0.04, 0.4), abs=1e-15
        )


def test_only_some_reach_the_end_in_the_last_update() -> None:
    last = {ending: cosine_schedule(99, 100, 0.996, 1.0, ending=ending) for ending in FORMULAS}
    assert last["lightly"] == last["dinov3"] == last["solo"] == 1.0
    assert last["dino"] == last["deepmind"] < 1.0
    assert cosine_schedule(0, 1, 0.5, 1.0, ending="lightly") == 1.0


def test_linear() -> None:
    n = 1000
    for k in (0, n // 2, n - 1, n):
        assert linear_schedule(k, n, 0.996, 1.0) == pytest.approx(0.996 + k * (1 - 0.996) / n, abs=1e-15)
    assert linear_schedule(n + 1, n, 0.996, 1.0) == 1.0
    stretched = linear_schedule(n - 1, round(1.25 * n), 0.996, 1.0)  # MSN's
    assert stretched == pytest.approx(0.9992, abs=1e-5)


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="ending must be one of dino, deepmind, .*, got 'cosine'"):
        cosine_schedule(0, 10, 0.9, 1.0, ending="cosine")
    with pytest.raises(ValueError, match="step must be a whole number of at least 0, got -1"):
        cosine_schedule(-1, 10, 0.9, 1.0)
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1, got 0"):
        linear_schedule(0, 0, 0.9, 1.0)
    with pytest.raises(TypeError, match="start must be a number, got 'a'"):
        linear_schedule(0, 10, "a", 1.0)  # type: ignore[arg-type]
