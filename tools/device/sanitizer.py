"""Stage D: compute-sanitizer over small calls of every CUDA source, memcheck beside racecheck; memcheck of Triton.

Only kernels of sslfast are instrumented (their mangled names hold its namespace); torch's own would take minutes. Its
allocator keeps no memory, so that each tensor has bounds of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .launches import DONE, MARK
from .steps import RED, ROOT, Context, NotRun, Step

OURS = ("--kernel-name", "kns=sslfast")
COMMON = ("--report-api-errors", "no", "--print-limit", "50", "--target-processes", "all")
FAULT = re.compile(
    r"^=+ (?:Error: |Warning: |Invalid |Race reported|Potential |Uninitialized |Barrier error|Program hit|Misaligned )"
)
FIRST = "import torch; torch.zeros(3, device='cuda').add_(1).sum().item()"


def memcheck(context: Context) -> list[Step]:
    return [step(context, "memcheck", "operators")]


def racecheck(context: Context) -> list[Step]:
    return [step(context, "racecheck", "operators")]


def triton(context: Context) -> list[Step]:
    """memcheck alone: racecheck is known to warn of Triton's kernels where there is nothing."""
    return [step(context, "memcheck", "triton")]


def step(context: Context, tool: str, what: str) -> Step:
    """It tells its program to stop a little before the stage ends."""
    return Step(f"{tool}, {what}", lambda: check(context, tool, what, context.left() - 60), 3600.0)


def program() -> Path:
    """Raises ``NotRun`` where it is not installed."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(found).exists():
        raise NotRun("compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin")
    return Path(found)


def usable() -> tuple[str, ...]:
    """The words that restrict it to our kernels, if this version knows them, else none.

    Raises:
        NotRun: it cannot use this device: some virtual machines refuse it.
    """
    said = ""
    for words in (OURS, ()):
        done = sanitized("memcheck", words, [sys.executable, "-c", FIRST], 60.0)
        if done.returncode == 0 and "ERROR SUMMARY: 0" in done.stdout:
            return words
        said = done.stdout
    lines = [line.strip("= ") for line in said.splitlines() if line.startswith("=====")]
    raise NotRun(f"compute-sanitizer cannot use this device: {(lines or ['it says nothing'])[-1]}")


def sanitized(tool: str, words: Sequence[str], command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """``command`` under ``tool``; on a time-out, what it said until then."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    whole = [str(program()), "--tool", tool, *COMMON, *words, *command]
    try:
        return subprocess.run(
            whole, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        return subprocess.CompletedProcess(whole, 124, f"{said}\nstopped after {seconds:.0f} s", "")


def check(context: Context, tool: str, what: str, seconds: float) -> str:
    """Each announced case with a finding becomes a result of its own."""
    command = [sys.executable, "-m", "tools.device.launches", what, "--seconds", f"{max(1.0, seconds):.0f}"]
    if context.rehearse:
        command += ["--device", "cpu", "--most", "4"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    else:
        words = usable()
        done = sanitized(tool, words if what == "operators" else (), command, max(5.0, context.left() - 3))
    print(done.stdout, flush=True)
    found = findings(done.stdout)
    for case, lines in found.items():
        context.result(f"{tool}: {case}", RED, "\n".join(lines))
    if found:
        raise AssertionError(f"{tool} found something in {len(found)} cases: {', '.join(found)}")
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-500:]
    finished = [line for line in done.stdout.splitlines() if line.startswith(DONE)]
    if done.returncode != 0 or not finished:
        raise AssertionError(f"ended with status {done.returncode}: {last}")
    return finished[0].removeprefix(f"{DONE}: ")


def findings(output: str) -> dict[str, list[str]]:
    """For each announced case, the tool's lines about it: the first of each finding, and where it was."""
    found: dict[str, list[str]] = {}
    case, follow = "before the first case", 0
    for line in output.splitlines():
        if line.startswith(MARK):
            case, follow = line.removeprefix(MARK), 0
        elif FAULT.match(line):
            found.setdefault(case, []).append(line.strip("= "))
            follow = 3
        elif follow and line.startswith("="):
            found[case].append(line.strip("= "))
            follow -= 1
    return found
