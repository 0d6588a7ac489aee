"""Stage D: compute-sanitizer over small calls of every CUDA source: memcheck, racecheck, then memcheck of Triton.

Only kernels of sslfast are instrumented (their mangled names hold its namespace); torch's own would take minutes. Its
allocator keeps no memory, so that each tensor has bounds of its own.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from .launches import DONE, MARK
from .steps import RED, ROOT, Context, NotRun, Step

OURS = ("--kernel-name", "kns=sslfast")
COMMON = ("--report-api-errors", "no", "--print-limit", "50", "--target-processes", "all")
FAULT = re.compile(
    r"^=+ (?:Error: |Warning: |Invalid |Race reported|Potential |Uninitialized |Barrier error|Program hit|Misaligned )"
)
FIRST = "import torch; torch.zeros(3, device='cuda').add_(1).sum().item()"


def steps(context: Context) -> list[Step]:
    share = max(20.0, context.left() / 3)
    return [
        Step("compute-sanitizer", lambda: usable(context), 60.0),
        Step("memcheck, operators", lambda: check(context, "memcheck", "operators", share), share + 60),
        Step("racecheck, operators", lambda: check(context, "racecheck", "operators", share), share + 60),
        Step("memcheck, triton", lambda: check(context, "memcheck", "triton", 60.0), 120.0),
    ]


def program() -> Path:
    """Raises ``NotRun`` where it is not installed."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(found).exists():
        raise NotRun("compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin")
    return Path(found)


@functools.cache
def why_unusable() -> str | None:
    """Whether it can use this device: some virtual machines refuse it."""
    done = sanitized("memcheck", [sys.executable, "-c", FIRST], ours=True, seconds=50)
    if done.returncode == 0 and "ERROR SUMMARY: 0" in done.stdout:
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith("=====")] or ["it says nothing"]
    return f"compute-sanitizer cannot use this device: {lines[-1].strip('= ')}"


def sanitized(tool: str, command: list[str], ours: bool, seconds: float) -> subprocess.CompletedProcess[str]:
    """``command`` under ``tool``; on a time-out, what it said until then."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    words = [str(program()), "--tool", tool, *COMMON, *(OURS if ours else ()), *command]
    try:
        return subprocess.run(
            words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        return subprocess.CompletedProcess(words, 124, f"{said}\nstopped after {seconds:.0f} s", "")


def usable(context: Context) -> str:
    if context.rehearse:
        raise NotRun("a rehearsal runs the same program without it")
    if why := why_unusable():
        raise NotRun(why)
    return ""


def check(context: Context, tool: str, what: str, seconds: float) -> str:
    """Each announced case with a finding becomes a result of its own."""
    command = [sys.executable, "-m", "tools.device.launches", what, "--seconds", f"{max(1.0, seconds - 25):.0f}"]
    if context.rehearse:
        command += ["--device", "cpu", "--most", "4"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    else:
        if why := why_unusable():
            raise NotRun(why)
        done = sanitized(tool, command, what == "operators", min(seconds + 50, max(5.0, context.left() - 3)))
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
