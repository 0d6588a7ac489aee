"""The file of results: what a new run replaces, and what stays."""

from __future__ import annotations

import csv
from pathlib import Path

from benchmarks import rows


def run(commit: str, *ops: str) -> list[rows.Row]:
    """What one run writes: its machine's peak, and a row of each operation."""
    return [{column: "" for column in rows.COLUMNS} | {"op": op, "commit": commit} for op in ("machine", *ops)]


def ops(table: list[rows.Row]) -> list[tuple[str, str]]:
    return [(row["op"], row["commit"]) for row in table]


def test_results_of_other_operations_survive_a_run_with_the_peaks_they_were_held_to(tmp_path: Path) -> None:
    path = tmp_path / "results" / "machine.csv"
    rows.write_csv(path, run("first", "a", "b"))
    rows.write_csv(path, rows.merged(rows.read_csv(path), run("second", "b", "c")))
    kept, new = [("machine", "first"), ("a", "first")], [("machine", "second"), ("b", "second"), ("c", "second")]
    assert ops(rows.read_csv(path)) == kept + new
    rows.write_csv(path, rows.merged(rows.read_csv(path), run("third", "a")))
    assert ops(rows.read_csv(path)) == [*new, ("machine", "third"), ("a", "third")]
    with path.open(newline="") as file:
        assert next(csv.reader(file)) == list(rows.COLUMNS)
    assert rows.read_csv(tmp_path / "absent.csv") == []


def test_a_repeated_run_leaves_one_row_of_each_peak(tmp_path: Path) -> None:
    """A run is written case by case, and may be the same command on the same commit as before."""
    before = run("first", "a", "b")
    assert ops(rows.merged(before, run("first", "a"))) == [("b", "first"), ("machine", "first"), ("a", "first")]
