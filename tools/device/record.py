"""Results as they come: a line of JSON for each step, rows of a CSV, and a summary that is written anew each time."""

from __future__ import annotations

import csv
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .steps import GREEN, NOT_RUN, RED

STEPS, SWEEP, SUMMARY, LOG = "steps.jsonl", "sweep.jsonl", "summary.txt", "device.log"


@dataclass(frozen=True)
class Result:
    """How one step ended; ``detail`` is what it noted, why it is red, or why it was not run."""

    stage: str
    step: str
    status: str
    detail: str = ""
    seconds: float = 0.0


@dataclass
class Record:
    """All results of a run, in ``output``. Several threads may add to it."""

    output: Path
    titles: Mapping[str, str] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    sweeps: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self.output.mkdir(parents=True, exist_ok=True)
        for name in (STEPS, SWEEP, LOG):
            (self.output / name).write_text("")

    def add(self, result: Result) -> None:
        with self._lock:
            self.results.append(result)
            self._append(STEPS, vars(result))
            self._write_summary()

    def row(self, row: dict[str, Any]) -> None:
        """One row of the CSV ``<machine>.csv``, whose columns are those of the first row."""
        with self._lock:
            self.rows.append(row)
            path = self.output / f"{slug(row)}.csv"
            new = len(self.rows) == 1
            with path.open("w" if new else "a", newline="") as file:
                writer = csv.DictWriter(file, list(self.rows[0]), lineterminator="\n", extrasaction="ignore")
                if new:
                    writer.writeheader()
                writer.writerow(row)

    def sweep(self, found: dict[str, Any]) -> None:
        with self._lock:
            self.sweeps.append(found)
            self._append(SWEEP, found)

    def red(self) -> list[Result]:
        return [result for result in self.results if result.status == RED]

    def summary(self) -> str:
        """Counts of each stage, what is red and what was not run by name, best configurations, headline times."""
        lines = []
        for stage in dict.fromkeys(result.stage for result in self.results):
            of_stage = [result for result in self.results if result.stage == stage]
            counts = ", ".join(
                f"{sum(result.status == status for result in of_stage)} {status}" for status in (GREEN, RED, NOT_RUN)
            )
            seconds = sum(result.seconds for result in of_stage)
            lines.append(f"{stage} {self.titles.get(stage, '')}: {counts}; {seconds:.0f} s of steps")
            for status in (RED, NOT_RUN):
                lines += [f"  {status}: {r.step}: {last_line(r.detail)}" for r in of_stage if r.status == status]
            lines += [f"  {r.step}: {r.detail}" for r in of_stage if r.status == GREEN and r.detail]
        return "\n".join([*lines, *best(self.sweeps), *headlines(self.rows)]) + "\n"

    def _append(self, name: str, entry: Mapping[str, Any]) -> None:
        with (self.output / name).open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def _write_summary(self) -> None:
        partial = self.output / f"{SUMMARY}.partial"
        partial.write_text(self.summary())
        partial.replace(self.output / SUMMARY)


def slug(row: Mapping[str, Any]) -> str:
    """The machine's file name, as the benchmarks' own results have it."""
    letters = "".join(c if c.isalnum() else "-" for c in str(row.get("device", "machine")).lower())
    return "-".join(filter(None, letters.split("-"))) or "machine"


def last_line(detail: str) -> str:
    """What a traceback says: its last line, or the first one of an assertion of several lines."""
    lines = [line for line in detail.strip().splitlines() if line.strip()]
    named = [line for line in lines if not line.startswith(" ") and ("Error" in line.split(":")[0])]
    return (named or lines or [""])[-1][:300]


def best(sweeps: Sequence[Mapping[str, Any]]) -> list[str]:
    """The quickest right configuration of each sweep, beside the one in the table."""
    lines = []
    for name in dict.fromkeys(found["sweep"] for found in sweeps):
        timed = [found for found in sweeps if found["sweep"] == name and found.get("ms") is not None]
        if not timed:
            continue
        quickest = min(timed, key=lambda found: float(found["ms"]))
        now = next((found for found in timed if found["now"]), None)
        beside = f", the table's {now['config']} {now['ms']:.4g} ms" if now else ""
        lines.append(f"sweep {name}: best {quickest['config']} {quickest['ms']:.4g} ms{beside}, of {len(timed)}")
    return lines


def headlines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each case and mode: sslfast's time, rate and share of the product's peak, and its best opponent's."""
    lines = []
    timed = [row for row in rows if row["metric"] == "time_ms"]
    for case in dict.fromkeys((row["op"], row["shape"], row["dtype"], row["mode"]) for row in timed):
        of_case = [row for row in timed if (row["op"], row["shape"], row["dtype"], row["mode"]) == case]
        ours = [row for row in of_case if row["provider"].startswith("sslfast")]
        others = [row for row in of_case if row not in ours]
        text = ", ".join(_time(row) for row in ours) or "not timed"
        if ours and others:
            best_other = min(others, key=lambda row: float(row["p50"]))
            ratio = float(best_other["p50"]) / min(float(row["p50"]) for row in ours)
            text += f"; best of {len(others)} others {_time(best_other)}, {ratio:.2f}×"
        elif others:
            text += "; others " + ", ".join(_time(row) for row in others)
        op, shape, dtype, mode = case
        sizes = " ".join(f"{name}={size}" for name, size in json.loads(shape).items())
        lines.append(f"{op} {sizes} {dtype} {mode}: {text}")
    peaks = [row for row in rows if row["op"] == "machine"]
    return [f"peak {row['provider']} {row['dtype']}: {row['p50']} {row['metric']}" for row in peaks] + lines


def _time(row: Mapping[str, Any]) -> str:
    rate = f", {row['tflops']} TFLOP/s" if row.get("tflops") else ""
    share = f", {float(row['share_of_peak']):.0%} of mm" if row.get("share_of_peak") else ""
    return f"{row['provider']} {row['p50']} ms ({row['p20']}–{row['p80']}{rate}{share})"
