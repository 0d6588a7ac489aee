"""Kernels at every instruction-set level: tests that are marked ``levels``, again, in one process for each level."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from helpers import run_with

pytestmark = pytest.mark.sanitize

LEVELS = ["baseline", "avx2", "avx512"]  # narrowest first


@pytest.mark.parametrize("level", LEVELS)
def test_every_cpu_level(level: str) -> None:
    if LEVELS.index(level) > LEVELS.index(torch.ops.sslfast.cpu_level_widest()):
        pytest.skip(f"this processor has no {level}")
    if os.environ.get("SSLFAST_CPU_CAPABILITY"):
        pytest.skip("already inside a run of one level")
    if level == torch.ops.sslfast.cpu_level():
        pytest.skip("the level of this run, which has these tests too")
    run_with({"SSLFAST_CPU_CAPABILITY": level}, [Path(__file__).parent], "", "levels and not gpu")
