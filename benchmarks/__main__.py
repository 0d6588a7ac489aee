"""``python -m benchmarks [op ...]``: measure, write the CSV, draw it; ``--help`` says how to measure less."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from . import plot
from .harness import Case, discover
from .machine import ROOT, describe, measure_peaks
from .rows import Row, merged, read_csv, write_csv
from .runner import SECONDS, Options, Report, Runner

RESULTS = ROOT / "benchmarks" / "results"


def parse(arguments: Sequence[str], benches: Mapping[str, ModuleType]) -> argparse.Namespace:
    """The command line; an unknown name, or a device that is absent, ends the program with a message."""
    known = list(benches)
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time and peak memory of each operation.")
    parser.add_argument("ops", nargs="*", metavar="op", help=f"operations (default: all of {', '.join(known)})")
    parser.add_argument("--quick", action="store_true", help="fewer cases and shorter timing")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose line has it: 'N=65536 D=512 bfloat16'")
    parser.add_argument("--providers", default="", metavar="NAME,...", help="only these")
    parser.add_argument("--seconds", type=float, metavar="S", help=f"of timing, a case (default: {SECONDS[False]:g})")
    parser.add_argument("--no-memory", action="store_true", help="no peaks of memory: half of a run's time")
    options = parser.parse_args(arguments)
    unknown = [op for op in options.ops if op not in known]
    if unknown:
        parser.error(f"op={unknown[0]!r} has no benchmark; allowed: {', '.join(known)}")
    options.ops = options.ops or known
    options.providers = tuple(filter(None, options.providers.split(",")))
    there = dict.fromkeys(name for op in options.ops for name in benches[op].PROVIDERS)
    unknown = [name for name in options.providers if name not in there]
    if unknown:
        parser.error(f"--providers {unknown[0]!r} is no provider of these operations; allowed: {', '.join(there)}")
    if options.seconds is not None and not 0 <= options.seconds < float("inf"):
        parser.error(f"--seconds {options.seconds}: must be at least 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch finds no CUDA GPU; allowed here: cpu")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return options


def flags(options: argparse.Namespace) -> list[str]:
    """The command line again, without what holds a path: it stands in every row of the CSV."""
    words = [*options.ops, *(["--quick"] if options.quick else []), "--device", options.device]
    if options.only:
        words += ["--only", shlex.quote(options.only)]
    if options.providers:
        words += ["--providers", ",".join(options.providers)]
    if options.seconds is not None:
        words += ["--seconds", f"{options.seconds:g}"]
    return words + (["--no-memory"] if options.no_memory else [])


def chosen(options: argparse.Namespace, benches: Mapping[str, ModuleType]) -> list[tuple[str, Case]]:
    """(operation, case) of everything to be measured."""
    every = [(op, case) for op in options.ops for case in benches[op].cases(options.device, options.quick)]
    return [(op, case) for op, case in every if options.only in str(case)]


def table(rows: Sequence[Row]) -> Table:
    """The run's rows as a terminal table, one line per (case, provider), peak memory beside time."""
    view = Table(title="times: median (20th–80th percentile); speed-up over the best baseline")
    for column in ("case", "provider"):
        view.add_column(column, no_wrap=True)
    for column in ("time [ms]", "share of\nbound", "speed-\nup", "extra peak\n[MiB]"):
        view.add_column(column, justify="right", no_wrap=True)
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        case = f"{row['op']} {plot.shape_text(row['shape'])} {row['dtype']} {row['mode']}"
        found.setdefault((case, row["provider"]), {})[row["metric"]] = row
    above = ""
    for (case, provider), metrics in found.items():
        timed, peak = metrics.get("time_ms", {}), metrics.get("peak_mib", {})
        time = f"{timed['p50']} ({timed['p20']}–{timed['p80']})" if timed else ""
        ratio = timed.get("speedup_over_best_of_eager_compile", "")
        if case != above:
            view.add_section()
        share = timed.get("share_of_bound", "")
        view.add_row("" if case == above else case, provider, time, share, ratio, peak.get("p50", ""))
        above = case
    return view


def tell(console: Console, report: Report, path: Path) -> None:
    """Print the table, the peaks, and every skip and error by name."""
    console.print(table([row for row in report.rows if row["op"] != "machine"]))
    for row in report.rows:
        if row["op"] == "machine":
            what = f"{row['provider']} {row['dtype']} {plot.shape_text(row['shape'])}"
            console.print(f"peak: {what}: {row['p50']} {row['metric']}", highlight=False)
    for name, count, lines in (
        ("measurements skipped", len(report.skips), report.named_skips()),
        ("errors", len(report.errors), report.errors),
    ):
        console.print(f"{count} {name}")
        for line in lines:
            console.print(f"  {line}", markup=False, highlight=False)
    console.print(f"{len(report.rows)} rows in {path.name}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns 1 if a result was wrong or sslfast failed, else 0."""
    benches = discover()
    options = parse(sys.argv[1:] if arguments is None else arguments, benches)
    machine = describe(options.device, " ".join(["python", "-m", "benchmarks", *flags(options)]))
    path = options.output / f"{machine.slug}.csv"
    before = read_csv(path)

    work = chosen(options, benches)
    if not work:
        print(f"--only {options.only!r} leaves no case of {', '.join(options.ops)}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 130)
    versions = f"torch {machine.torch}, sslfast {machine.sslfast} ({machine.commit})"
    console.print(f"{machine.device}, {machine.threads} threads, {versions}", highlight=False)
    with tqdm(total=len(work), unit="case", dynamic_ncols=True) as bar:
        bar.set_description("machine's peaks")
        seconds = SECONDS[options.quick] if options.seconds is None else options.seconds
        how = Options(seconds, not options.no_memory, options.providers)
        runner = Runner(machine, measure_peaks(options.device), how, bar.set_description)
        for op, case in work:
            runner.run_case(benches[op], case)
            write_csv(path, merged(before, runner.report.rows))  # case by case: a stopped run keeps what it has
            bar.update()
    tell(console, runner.report, path)
    for picture in plot.draw(path):
        console.print(f"drawn: {picture.name}")
    return 1 if runner.report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
