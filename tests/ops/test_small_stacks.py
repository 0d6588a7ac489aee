"""Threads with small stacks, such as web servers and some interpreters make: no kernel keeps large arrays there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from sslfast import ops

TESTS = Path(__file__).parents[1]


def test_every_operation_in_a_small_thread() -> None:
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), str(TESTS / "helpers")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_STACKSIZE": "64k", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "small_stacks"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    served = set(json.loads(done.stdout.splitlines()[-1]))
    assert {op for op in ops.__all__ if "cpu" in getattr(ops, op).BACKENDS} <= served
