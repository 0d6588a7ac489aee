"""The command line of ``tools.device``: the stages one after another, the summary, the exit status."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import ptxas
from .record import SUMMARY, Record, Result
from .steps import NOT_RUN
from .supervise import Group, Settings, Stage, run_stage

PREPARE = Stage("0", "preparation", 480.0, (Group("tools.device.prepare:steps"),))
SANITIZERS = ("memcheck", "racecheck", "triton")
# cuBLAS gives the same bits in every run with a workspace of fixed size alone; and several processes share the cores.
SHARED = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "2"}


def stages(rehearse: bool) -> list[Stage]:
    """In the order in which they are run: what a first look at a GPU is worth most for comes first."""
    processes = 1 if rehearse else max(1, min(6, len(os.sched_getaffinity(0)) // 2))
    correct = [Group("tools.device.correct:steps", processes, environment=SHARED)]
    if isinstance(found := ptxas.second(), tuple):
        path, version = found
        cache = tempfile.mkdtemp(prefix="triton-")
        environment = {**SHARED, "TRITON_PTXAS_PATH": str(path), "TRITON_CACHE_DIR": cache}
        if not rehearse:
            correct.append(Group("tools.device.correct:triton", processes, f" [ptxas {version}]", environment))
    correct.append(Group("tools.device.sweep:warm", 1 if rehearse else max(1, processes // 2), environment=SHARED))
    return [
        Stage("A", "correctness", 240.0, tuple(correct)),
        Stage("B", "times", 240.0, (Group("tools.device.timings:steps"),)),
        Stage("C", "tests", 240.0, (Group("tools.device.suite:steps"),)),
        Stage("D", "compute-sanitizer", 200.0, tuple(Group(f"tools.device.sanitizer:{name}") for name in SANITIZERS)),
    ]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.device", description="Stages of checks on a GPU.")
    parser.add_argument("--stages", default="A,B,C,D", metavar="A,B,...", help="default: A,B,C,D, in this order")
    parser.add_argument("--only", default="", metavar="TEXT", help="steps whose name contains it")
    parser.add_argument("--seconds", type=float, metavar="S", help="of each stage (default: 200 to 240)")
    parser.add_argument("--output", type=Path, default=Path("out/gpu"), metavar="DIR", help="default: out/gpu")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny problems on the CPU: that the stages themselves work"
    )
    options = parser.parse_args(arguments)
    known = "ABCD"
    options.stages = [letter for letter in options.stages.split(",") if letter]
    unknown = [letter for letter in options.stages if letter not in known or len(letter) != 1]
    if unknown or not options.stages:
        parser.error(f"--stages {','.join(unknown)!r}: allowed are {', '.join(known)}")
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"--seconds {options.seconds}: must be more than 0")
    return options


def run(chosen: Sequence[Stage], record: Record, settings: Settings) -> int:
    """All stages whatever becomes of one; 1 if anything is red, in the very end."""
    for stage in chosen:
        print(f"=== {stage.letter} {stage.title}, {stage.seconds:.0f} s at most", flush=True)
        run_stage(stage, record, settings)
    print(f"\n{record.summary()}", flush=True)
    return 1 if record.red() else 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    every = {stage.letter: stage for stage in stages(options.rehearse)}
    chosen = [every[letter] for letter in options.stages]
    if options.seconds is not None:
        chosen = [Stage(s.letter, s.title, options.seconds, s.groups) for s in chosen]
    titles = {stage.letter: stage.title for stage in [PREPARE, *chosen]}
    record = Record(options.output.resolve(), titles)
    settings = Settings(options.only, options.rehearse)
    run_stage(PREPARE, record, Settings("", options.rehearse))
    if "A" in options.stages and isinstance(why := ptxas.second(), str):
        record.add(Result("A", "the same under a second ptxas", NOT_RUN, why))
    status = run(chosen, record, settings)
    print(f"results: {options.output / SUMMARY} and beside it", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
