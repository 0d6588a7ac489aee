"""Kernels at every instruction-set level: tests that are marked ``levels``, again, in one process for each level."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import LEVELS, run_at_level

pytestmark = pytest.mark.sanitize


@pytest.mark.parametrize("level", LEVELS)
def test_every_cpu_level(level: str) -> None:
    run_at_level(level, str(Path(__file__).parent), "", "levels and not gpu")
