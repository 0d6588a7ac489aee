"""Rows of the results: one CSV a machine."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# ``tflops``: the operations that the task needs at least, over the time; ``share_of_peak``: of the library's product.
# Metrics are ``time_ms``, ``peak_mib`` and ``out_of_memory``, and ``gflops`` and ``gb_per_s`` of the machine's peaks.
Row = dict[str, Any]
COLUMNS = (
    *("op", "provider", "mode", "dtype", "shape", "metric", "p20", "p50", "p80", "rounds", "share_of_bound"),
    *("speedup_over_best_of_eager_compile", "tflops", "share_of_peak"),
    *("device", "threads", "driver", "torch", "triton", "sslfast", "commit", "command"),
)


def read_csv(path: Path) -> list[Row]:
    """The rows of one results file; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write ``rows`` in the schema ``COLUMNS``, through a neighbour file so that a stopped run leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def merged(old: Iterable[Row], new: Sequence[Row]) -> list[Row]:
    """``new`` rows instead of all ``old`` ones of the same operations; the other old ones stay.

    The machine's peaks are of one run, so those of an earlier run stay as long as other rows of it do.
    """
    again = {row["op"] for row in new}
    kept = [row for row in old if row["op"] == "machine" or row["op"] not in again]
    runs = {run(row) for row in kept if row["op"] != "machine"} - {run(row) for row in new}
    return [row for row in kept if row["op"] != "machine" or run(row) in runs] + list(new)


def run(row: Row) -> tuple[str, str]:
    """What tells one run from another: the commit and the command."""
    return row["commit"], row["command"]
