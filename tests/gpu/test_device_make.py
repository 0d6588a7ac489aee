"""``make gpu`` with programs that stand in for Python and nvidia-smi: a red step costs none of the others."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("nvidia-smi", "-m pip install", "-m sslfast", "-m tools.device")


def make_gpu(tmp_path: Path, failing: str, *words: str) -> tuple[int, list[str], str]:
    """(exit status, the commands that were run, the log), where commands that contain ``failing`` end with 1."""
    told = tmp_path / "told"
    for name in ("python", "nvidia-smi"):
        program = tmp_path / name
        program.write_text(
            f'#!/bin/sh\necho "{name} $*" >>"{told}"\n'
            f'case "{name} $*" in *"{failing}"*) echo "{name} fails"; exit 1;; esac\n'
        )
        program.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    environment["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    command = ["make", "gpu", f"PYTHON={tmp_path / 'python'}", f"OUT={tmp_path / 'out'}", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, told.read_text().splitlines(), (tmp_path / "out" / "gpu.log").read_text()


@pytest.mark.skipif(shutil.which("make") is None or not Path("/bin/bash").exists(), reason="no make, or no bash")
@pytest.mark.parametrize("failing", ["none of them", *STEPS])
def test_every_step_is_run_and_the_status_says_whether_one_failed(failing: str, tmp_path: Path) -> None:
    status, told, log = make_gpu(tmp_path, failing)
    assert (status != 0) == (failing in STEPS)
    at = [next(i for i, line in enumerate(told) if step in line) for step in STEPS]
    assert at == sorted(at), told
    assert f"-m tools.device --stages A,B,C,D --output {tmp_path / 'out'}" in told[-1]
    assert ("fails" in log) == (failing in STEPS)


@pytest.mark.skipif(shutil.which("make") is None or not Path("/bin/bash").exists(), reason="no make, or no bash")
def test_without_a_gpu_nothing_is_run(tmp_path: Path) -> None:
    status, told, _ = make_gpu(tmp_path, "import torch", f"BIN={tmp_path}", "STAGES=A")
    assert status != 0 and all("import torch" in line for line in told)
