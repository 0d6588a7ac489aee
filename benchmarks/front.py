"""The README's table: four losses of other packages, alone and with ``sslfast.patch``, from one run on one machine."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence

from .rows import Row, run

# (loss, N, D) of the operation ``adapters``, and how the README puts the size.
CHOSEN = {
    ("NTXentLoss", 2048, 128): "N = 2048, D = 128",
    ("NTXentLoss", 256, 128): "256 classes of two, D = 128",
    ("VICRegLoss", 256, 8192): "N = 256, D = 8192",
    ("ClipLoss", 4096, 512): "N = 4096, D = 512",
}
PICTURE = "nt_xent"  # the sweep of this operation is drawn below the table
HEADER = "| loss | size | the package alone | with sslfast | faster | less memory |"
ALIGNED = "|---|---|---:|---:|---:|---:|"


def table(rows: Sequence[Row]) -> str:
    """The table from one machine's results; empty where none of its rows was measured there.

    Raises:
        ValueError: a row is missing, or the rows come from several runs.
    """
    found: dict[tuple[str, int, int], dict[tuple[str, str], Row]] = {}
    for row in rows:
        shape = json.loads(row["shape"]) if row["op"] == "adapters" else {}
        key = (shape.get("loss"), shape.get("N"), shape.get("D"))
        if key in CHOSEN:
            found.setdefault(key, {})[row["provider"], row["metric"]] = row
    if not found:
        return ""
    if missing := [f"{loss} {n} × {d}" for loss, n, d in CHOSEN if (loss, n, d) not in found]:
        raise ValueError(f"the front table lacks {', '.join(missing)}; run python -m benchmarks adapters {PICTURE}")
    runs = {run(row) for cell in found.values() for row in cell.values()}
    if len(runs) > 1:
        raise ValueError(f"the front table would be of {len(runs)} runs; run python -m benchmarks adapters {PICTURE}")
    lines = [HEADER, ALIGNED]
    for key, size in CHOSEN.items():
        cell = found[key]
        time, memory = (
            [float(cell[name, metric]["p50"]) for name in ("unpatched", "sslfast")]
            for metric in ("time_ms", "peak_mib")
        )
        package = json.loads(cell["sslfast", "time_ms"]["shape"])["package"]
        # Of the medians that stand beside it, so that a reader who divides finds the same number.
        faster, smaller = (before / after for before, after in (time, memory))
        lines.append(
            f"| {package} `{key[0]}` | {size} | {_short(time[0])} ms | {_short(time[1])} ms | {_short(faster)}× | "
            f"{_short(smaller)}× |"
        )
    return "\n".join(
        [*lines, "", *textwrap.wrap(_caption(found, rows, *runs), 100, break_long_words=False, break_on_hyphens=False)]
    )


def _short(value: float) -> str:
    """Two significant digits, or a whole number: 6.5, 17, 306."""
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}"


def _caption(
    found: dict[tuple[str, int, int], dict[tuple[str, str], Row]], rows: Sequence[Row], of: tuple[str, str]
) -> str:
    cells = [row for cell in found.values() for row in cell.values()]
    first, rounds = cells[0], min(int(row["rounds"]) for row in cells if row["metric"] == "time_ms")
    text = (
        f"One run on a CPU: {first['device']}, {first['threads']} threads, torch {first['torch']}, sslfast "
        f"{first['sslfast']} ({first['commit']}), {first['dtype']}, forward and backward. Medians of at least {rounds} "
        "interleaved rounds; memory is the extra peak, gradients included; N is the number of pairs."
    )
    if {run(row) for row in rows if row["op"] == PICTURE} - {of}:
        text += " The picture is of another run: read its shape, not its milliseconds."
    return text
