"""Plots and README tables, drawn from the CSV files alone.

    python -m benchmarks.plot [--results DIR]                       one PNG for every sweep in every CSV
    python -m benchmarks.plot [--results DIR] --readme README.md    rewrite its tables instead

A page marks a table's place by ``<!-- benchmark:nt_xent -->`` and ``<!-- /benchmark -->``; the README's short one is
``<!-- benchmark:front -->`` (``front.py``).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.ticker import FuncFormatter, NullLocator

from . import front
from .harness import CALL, WHOLE
from .machine import ROOT
from .rows import Row, read_csv

RESULTS = ROOT / "benchmarks" / "results"
MIN_POINTS = 4  # sizes that make a sweep
PANELS = (("time_ms", "time [ms]"), ("peak_mib", "extra peak memory [MiB]"))
COLOURS = {"sslfast": "#c1121f", "compile": "#2a6f97", "eager": "#6c757d", "lightly": "#588157", "chunked": "#bc6c25"}
COLOURS |= {"primal": "#7b2cbf", "dual": "#f48c06"}  # forms of one of our own operations
COLOURS |= {"mae": "#6c757d"}
NAMES = {"compile": "torch.compile", "eager": "eager PyTorch", "chunked": "chunked torch.mm"}
NAMES |= {"unpatched": "the package's own"}
NAMES |= {"primal": "always primal", "dual": "always dual"}
# Published code that is written out in this directory: tables say beside the speed-up how much faster than it we are.
PUBLISHED = {"mae": "MAE as published", "ijepa": "I-JEPA as published"}
PUBLISHED |= {"beit": "BEiT as published", "dinov2": "DINOv2 as published", "transformers": "transformers"}
NAMES |= PUBLISHED


def shape_text(shape: str) -> str:
    """``{"N": 512, "D": 128}`` as ``N=512 D=128``."""
    return " ".join(f"{name}={size}" for name, size in json.loads(shape).items())


def provider_text(provider: str) -> str:
    """A provider's name for readers: ``lightly-1.6.0`` becomes ``lightly 1.6.0``."""
    return NAMES.get(provider) or re.sub(r"-(?=\d)", " ", provider)


# ------------------------------------------------------------------------------------------------------------ pictures


def sweep(rows: Sequence[Row]) -> tuple[str, dict[str, int], list[Row]] | None:
    """The longest sweep among one operation's rows: (the size that varies, the other sizes, its rows).

    ``None`` where no size takes ``MIN_POINTS`` values while the others stay.
    """
    candidates = []
    shapes = [json.loads(row["shape"]) for row in rows]
    for key in dict.fromkeys(name for shape in shapes for name, size in shape.items() if isinstance(size, int)):
        others = dict.fromkeys(tuple((name, size) for name, size in shape.items() if name != key) for shape in shapes)
        for fixed in map(dict, others):
            chosen = [row for row, shape in zip(rows, shapes, strict=True) if {**shape, key: 0} == {**fixed, key: 0}]
            values = {json.loads(row["shape"])[key] for row in chosen}
            candidates.append((len(values), key, fixed, chosen))
    if not candidates:
        return None
    points, key, fixed, chosen = max(candidates, key=lambda candidate: candidate[0])
    return (key, fixed, chosen) if points >= MIN_POINTS else None


def draw(path: Path) -> list[Path]:
    """Draw every sweep of one CSV beside it as ``<machine>-<op>-<dtype>.png`` (``mode`` both); returns the files."""
    rows = [row for row in read_csv(path) if row["mode"] == "both"]
    pictures = []
    for op, dtype in dict.fromkeys((row["op"], row["dtype"]) for row in rows):
        found = sweep([row for row in rows if row["op"] == op and row["dtype"] == dtype])
        if found is None:
            continue
        key, fixed, chosen = found
        figure, axes = plt.subplots(1, len(PANELS), figsize=(10, 4), constrained_layout=True)
        for axis, (metric, title) in zip(axes, PANELS, strict=True):
            _panel(axis, key, title, [row for row in chosen if row["metric"] == metric])
        sizes = ", ".join(f"{name} = {size}" for name, size in fixed.items())
        where = f"{chosen[0]['device']}, {chosen[0]['threads']} threads, torch {chosen[0]['torch']}"
        figure.suptitle(f"{op}, forward and backward, {dtype}, {sizes}: {where}", fontsize=10)
        picture = path.with_name(f"{path.stem}-{op}-{dtype}.png")
        figure.savefig(picture, dpi=110, metadata={"Software": None})
        plt.close(figure)
        pictures.append(picture)
    return pictures


def _panel(axis: Axes, key: str, title: str, rows: Sequence[Row]) -> None:
    """One log-log panel, a line for each provider with its name in the right margin."""
    values: set[int] = set()
    ends: list[tuple[float, str, str]] = []  # height of the last point, name, colour
    for provider in dict.fromkeys(row["provider"] for row in rows):
        points = sorted((json.loads(row["shape"])[key], row) for row in rows if row["provider"] == provider)
        points = [(size, row) for size, row in points if float(row["p50"]) > 0]  # a log axis has no zero
        if len(points) < 2:  # no line; the table has it
            continue
        xs, ys = [size for size, _ in points], [float(row["p50"]) for _, row in points]
        values.update(xs)
        width, colour = (2 if provider == "sslfast" else 1.3), COLOURS.get(re.sub(r"-\d.*", "", provider))
        (line,) = axis.plot(xs, ys, marker="o", markersize=3.5, linewidth=width, color=colour)
        if rows[0]["metric"] == "time_ms":
            low, high = ([float(row[p]) for _, row in points] for p in ("p20", "p80"))
            axis.fill_between(xs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        ends.append((ys[-1], provider_text(provider), to_hex(line.get_color())))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sorted(values))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{int(size)}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    if values:
        axis.set_xlim(min(values) / 1.3, max(values) * 4)  # room for the names
    bottom, top = axis.get_ylim()
    ends.sort()
    text_height = (top / bottom) ** 0.055  # as a factor on the log axis
    heights = spread([height for height, _, _ in ends], text_height)
    axis.set_ylim(bottom, max([top, *(height * text_height for height in heights)]))
    for height, (_, name, colour) in zip(heights, ends, strict=True):
        axis.text(max(values) * 1.15, height, name, color=colour, fontsize=8, va="center")
    axis.set_xlabel(key)
    axis.set_ylabel(title)
    axis.grid(True, which="major", alpha=0.25)


def spread(heights: Sequence[float], ratio: float) -> list[float]:
    """Ascending ``heights`` on a log axis, moved up where needed so that neighbours lie a factor ``ratio`` apart."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] * ratio) if moved else height)
    return moved


# -------------------------------------------------------------------------------------------------------------- tables


def markdown(op: str, rows: Sequence[Row]) -> str:
    """One machine's results of one operation as a Markdown table, forward and backward together; empty without any.

    What makes views has rates instead of times: how many a second.
    """
    rows = [row for row in rows if row["op"] == op and row["mode"] in WHOLE]
    timed = [row for row in rows if row["metric"] == "time_ms"]
    if not timed:
        return ""
    tried = [row for row in rows if row["metric"] in ("time_ms", "out_of_memory")]
    providers = sorted(dict.fromkeys(row["provider"] for row in tried), key=lambda name: name == "sslfast")
    cases = list(dict.fromkeys((row["dtype"], row["shape"]) for row in rows))
    sizes = list(json.loads(cases[0][1]))
    several_dtypes = len({dtype for dtype, _ in cases}) > 1
    unit = "views/s" if _has_rates(rows[0]) else "ms"
    # Of several baselines the speed-up names the best; a published one has a column of its own then.
    published = [p for p in providers if p in PUBLISHED and len(providers) > 2]
    header = [*sizes, *(["dtype"] if several_dtypes else []), *(f"{provider_text(p)} [{unit}]" for p in providers)]
    header += ["speed-up", *(f"over {provider_text(p)}" for p in published)]
    header += ["share of bound", "memory, best other [MiB]", "memory, sslfast [MiB]"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---:|" * len(header)]
    for dtype, shape in cases:
        cell = {(row["provider"], row["metric"]): row for row in rows if (row["dtype"], row["shape"]) == (dtype, shape)}
        text = _rate_text if unit == "views/s" else _time_text
        times = [
            "out of memory" if (provider, "out_of_memory") in cell else text(cell.get((provider, "time_ms")))
            for provider in providers
        ]
        ours = cell.get(("sslfast", "time_ms"), {})
        speedup = ours.get("speedup_over_best_of_eager_compile")
        share = ours.get("share_of_bound")
        memory = {provider: float(row["p50"]) for (provider, metric), row in cell.items() if metric == "peak_mib"}
        others = [value for provider, value in memory.items() if provider != "sslfast"]
        line = [str(size) for size in json.loads(shape).values()] + ([dtype] if several_dtypes else []) + times
        line += [_ratio_text(speedup), *(_ratio_text(_over(cell, p)) for p in published)]
        line += [f"{float(share):.0%}" if share else ""]
        line += [_short(min(others)) if others else "", _short(memory["sslfast"]) if "sslfast" in memory else ""]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join([_caption(rows, timed, several_dtypes), "", *lines])


def _short(value: float | str) -> str:
    """Three significant digits, without an exponent: 1340, 83.9, 0.164."""
    return f"{float(f'{float(value):.3g}'):.10g}"


def _time_text(row: Row | None) -> str:
    return f"{_short(row['p50'])} ({_short(row['p20'])}–{_short(row['p80'])})" if row else ""


def _ratio_text(ratio: float | str | None) -> str:
    return f"{float(ratio):.1f}×" if ratio else ""


def _over(cell: dict[tuple[str, str], Row], provider: str) -> float | None:
    """How much faster sslfast is than ``provider``: of both the ratio to the best baseline was taken round by round."""
    rows = (cell.get((name, "time_ms"), {}) for name in ("sslfast", provider))
    ours, theirs = (row.get("speedup_over_best_of_eager_compile") for row in rows)
    return float(ours) / float(theirs) if ours and theirs else None


def _has_rates(row: Row) -> bool:
    return row["mode"] == CALL and "views" in json.loads(row["shape"])


def _rate_text(row: Row | None) -> str:
    if not row:
        return ""
    shape = json.loads(row["shape"])
    low, middle, high = (1e3 * shape["images"] * shape["views"] / float(row[p]) for p in ("p80", "p50", "p20"))
    return f"{_short(middle)} ({_short(low)}–{_short(high)})"


def _caption(rows: Sequence[Row], timed: Sequence[Row], several_dtypes: bool) -> str:
    first = rows[0]
    where = first["device"] + (f", driver {first['driver']}" if first["driver"] else f", {first['threads']} threads")
    dtype = "" if several_dtypes else f"{first['dtype']}, "
    rounds = min(int(row["rounds"]) for row in timed)
    versions = f"torch {first['torch']}, sslfast {first['sslfast']} ({first['commit']})"
    call = first["mode"] == CALL
    what = ("views a second" if _has_rates(first) else "one call") if call else "forward and backward"
    providers = {row["provider"] for row in timed}
    any_other = call or "unpatched" in providers or "eager" not in providers or bool(first["driver"])
    others = "the others" if any_other else "eager and torch.compile"
    caption = (
        f"**{where}**: {versions}, {dtype}{what}. "
        f"Median of at least {rounds} interleaved rounds (20th–80th percentile); speed-up over the best of "
        f"{others}; memory is the extra peak, {'results' if call else 'gradients'} included."
    )
    return textwrap.fill(caption, 100, break_long_words=False, break_on_hyphens=False)


def rewrite(text: str, tables: dict[str, str]) -> str:
    """``text`` with every ``<!-- benchmark:<op> -->`` … ``<!-- /benchmark -->`` block filled from ``tables``.

    Raises:
        ValueError: there is no such block, a block is not closed, or it names an operation without results.
    """
    block = re.compile(r"(<!-- benchmark:(\w+) -->\n)(?:(?!<!-- benchmark:).)*?(<!-- /benchmark -->)", re.DOTALL)
    opened = re.findall(r"<!-- benchmark:(\w+) -->", text)
    found = [match[1] for match in block.findall(text)]
    if not opened:
        raise ValueError("the readme has no block <!-- benchmark:<op> --> … <!-- /benchmark -->")
    if found != opened:
        raise ValueError(f"blocks opened: {opened}, closed: {found}; each needs its own line <!-- /benchmark -->")
    empty = [op for op in found if not tables.get(op)]
    if empty:
        raise ValueError(f"benchmark:{empty[0]} has no results; there are results of: {', '.join(tables) or 'nothing'}")
    return block.sub(lambda match: f"{match[1]}\n{tables[match[2]]}\n\n{match[3]}", text)


def tables(files: Sequence[Path]) -> dict[str, str]:
    """For each operation the tables of all machines that have results of it, CPU and GPU apart."""
    machines = [read_csv(path) for path in files]
    ops = dict.fromkeys(row["op"] for rows in machines for row in rows if row["op"] != "machine")
    joined = {op: "\n\n".join(filter(None, (markdown(op, rows) for rows in machines))) for op in ops}
    joined["front"] = "\n\n".join(filter(None, map(front.table, machines)))
    return {op: text for op, text in joined.items() if text}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of this module; returns 1 with a message where there is nothing to draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description="Plots and tables from the CSVs.")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="rewrite this file's tables instead of drawing")
    options = parser.parse_args(arguments)
    files = sorted(options.results.glob("*.csv"))
    try:
        if not files:
            raise ValueError(f"--results {options.results} holds no CSV; run python -m benchmarks first")
        if options.readme is None:
            for path in files:
                for picture in draw(path):
                    print(picture.name)
        else:
            options.readme.write_text(rewrite(options.readme.read_text(), tables(files)))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
