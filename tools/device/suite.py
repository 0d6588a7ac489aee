"""Stage C: the tests marked ``gpu``, in as many processes as the machine has cores."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from .steps import GREEN, NOT_RUN, RED, ROOT, Context, NotRun, Step

JUNIT = "junit.xml"
MARGIN = 20.0  # seconds before the stage's end at which pytest is told to stop, so that it still reports
PER_TEST = 60
MOST_FAILURES = 30


def steps(context: Context) -> list[Step]:
    return [Step("pytest", lambda: run(context), 3600.0)]


def command(context: Context) -> list[str]:
    cores = len(os.sched_getaffinity(0))
    report = f"--junitxml={context.output.resolve() / JUNIT}"
    words = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", "-p", "no:cacheprovider", report]
    if importlib.util.find_spec("xdist"):
        words += ["-n", str(max(1, min(14, cores - 2)))]
    if importlib.util.find_spec("pytest_timeout"):
        words += [f"--timeout={PER_TEST}"]
    if context.rehearse:
        return [*words, "tests/benchmarks/test_bench_rows.py"]
    return [*words, f"--maxfail={MOST_FAILURES}", "-m", "gpu and not slow"]


def run(context: Context) -> str:
    """Every failed test becomes a result of its own, by name."""
    if importlib.util.find_spec("pytest") is None:
        raise NotRun("pytest is not installed")
    report = context.output / JUNIT
    report.unlink(missing_ok=True)
    process = subprocess.Popen(command(context), cwd=ROOT)
    late = ""
    try:
        status = process.wait(max(1.0, context.left() - MARGIN))
    except subprocess.TimeoutExpired:
        late = "stopped when the stage's time was up; "
        process.send_signal(signal.SIGINT)
        try:
            status = process.wait(MARGIN - 5)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"{late}pytest did not end") from None
    counts, failed = read(report)
    for name, message in failed:
        context.result(name, RED, message)
    text = late + ", ".join(f"{count} {what}" for what, count in counts.items())
    if failed:
        raise AssertionError(f"{len(failed)} tests failed: {text}")
    if late:
        context.result("the tests that are left", NOT_RUN, late)
    elif status != 0:
        raise AssertionError(f"pytest ended with status {status}: {text}")
    assert counts[GREEN], text
    return text


def read(report: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(how many tests ended how, (name, message) of those that failed) of a JUnit file."""
    counts = {GREEN: 0, "skipped": 0, "failed": 0}
    failed = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        problem = case.find("failure")
        problem = case.find("error") if problem is None else problem
        if problem is not None:
            counts["failed"] += 1
            name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
            failed.append((name, (problem.get("message") or problem.text or "")[:1000]))
        elif case.find("skipped") is not None:
            counts["skipped"] += 1
        else:
            counts[GREEN] += 1
    return counts, failed
