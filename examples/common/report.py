"""What a demo leaves behind: a table on the terminal, one picture, one JSON file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from .measure import Cost

FIRST_STEPS = 20
LEGEND_MOST = 20
FUSED, PLAIN = "#1b6ca8", "#e08a2c"
MIB = 2**20


@dataclass(frozen=True)
class Result:
    """All numbers of one demo, as they stand in its JSON file.

    Attributes:
        method: its title.
        loss: with its parameters, as a title.
        data: the data set's name; ``images`` its sizes; ``notes`` what its reader has to know.
        settings: epochs, steps, batch size, seed, versions, ranks, threads of each.
        backend: which of sslfast's backends served the fused loss in training.
        backend_alone: which served it in ``costs``, on one process.
        curves: the loss of every training step, ``fused`` and ``plain``.
        training_seconds: by loss.
        accuracies: by classifier (``knn``, ``linear``) and features (``fused``, ``plain``, ``untrained``,
            ``raw pixels``); ``None`` without labels.
        costs: of the loss alone: at the training's size, then at larger ones.
        seconds: the whole run.
    """

    method: str
    loss: str
    data: str
    images: dict[str, int]
    notes: tuple[str, ...]
    settings: dict[str, Any]
    backend: str
    backend_alone: str
    curves: dict[str, list[float]]
    training_seconds: dict[str, float]
    accuracies: dict[str, dict[str, float]] | None
    costs: list[Cost]
    seconds: float

    def curve_differences(self) -> dict[str, float]:
        """|fused − plain|: the largest over the first 20 steps, over all steps, and at the last step."""
        gap = np.abs(np.subtract(self.curves["fused"], self.curves["plain"]))
        spans = {"first_steps": gap[:FIRST_STEPS], "all_steps": gap, "last_step": gap[-1:]}
        return {name: float(span.max()) for name, span in spans.items()}

    def compared(self) -> Cost:
        """The costs at the last size at which both losses were measured."""
        return [cost for cost in self.costs if len(cost.seconds) > 1][-1]


def write_json(result: Result, path: Path) -> None:
    """All fields of ``result`` and the differences of its curves."""
    content = dataclasses.asdict(result) | {"curve_differences": result.curve_differences()}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def print_table(result: Result, console: Console) -> None:
    """The numbers side by side."""
    images, settings = result.images, result.settings
    served = f"fused served by backend {result.backend!r}"
    if settings["ranks"] > 1:
        served += f" over {settings['ranks']} ranks, alone by {result.backend_alone!r}"
    table = Table(
        title=f"{result.method} on {result.data}: {images['train']} training and {images['test']} test images",
        caption=f"{result.loss}; {served}; {settings['threads']} threads",
    )
    table.add_column("")
    columns = ("fused", "plain", "untrained", "raw pixels")
    for name in columns:
        table.add_column(name, justify="right")

    def row(
        label: str, values: Mapping[str, float | None], form: Callable[[float], str], section: bool = False
    ) -> None:
        given = [values.get(name) for name in columns]
        cells = ["–" if value is None else form(value) for value in given]
        table.add_row(label, *cells, end_section=section)

    for kind, label in (("knn", "kNN accuracy (k = 20)"), ("linear", "linear probe accuracy")):
        if result.accuracies is None:
            table.add_row(label, *["no labels"] * len(columns), end_section=kind == "linear")
        else:
            row(label, result.accuracies[kind], lambda x: f"{100 * x:.1f} %", kind == "linear")
    row("training, whole", result.training_seconds, lambda x: f"{x:.0f} s")
    row("loss at the last step", {name: curve[-1] for name, curve in result.curves.items()}, lambda x: f"{x:.4f}", True)
    for cost in result.costs:
        row(f"loss, {_size(cost)}: time", cost.seconds, milliseconds)
        row("    peak extra memory", cost.peak_bytes, mebibytes)
    console.print(table)
    below(result.curve_differences(), result.notes, console)


def below(gap: dict[str, float], notes: Sequence[str], console: Console) -> None:
    """What stands below a table: how far the two sides' losses are apart, and the notes."""
    console.print(
        f"Loss curves, |fused − plain|: at most {gap['first_steps']:.1e} over the first {FIRST_STEPS} steps, "
        f"{gap['all_steps']:.1e} over all, {gap['last_step']:.1e} at the last."
    )
    for note in notes:
        console.print(f"Note: {note}.", markup=False)


def draw(result: Result, points: np.ndarray, labels: np.ndarray | None, names: tuple[str, ...], path: Path) -> None:
    """One PNG: the loss curves, the test features in two dimensions, time and memory of the loss.

    Args:
        points: [m, 2].
        labels: [m] class numbers, or ``None``.
        names: of the classes.
    """
    figure = Figure(figsize=(14, 10), layout="constrained")
    figure.suptitle(f"{result.method} on {result.data}", fontsize=17)
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 2))
    curves, embedding = top.subplots(1, 2)
    _draw_curves(curves, result)
    _draw_points(embedding, points, labels, names)
    cost = result.compared()
    time_bars, memory_bars = bottom.subplots(1, 2)
    time_bars.set_title(f"Time a step of the loss, {_size(cost)}", fontsize=14)
    _draw_bars(time_bars, cost.seconds, "milliseconds", 1e-3, milliseconds)
    memory_bars.set_title(f"Extra peak memory of the loss, {_size(cost)}", fontsize=14)
    _draw_bars(memory_bars, cost.peak_bytes, "MiB", MIB, mebibytes)
    figure.savefig(path, dpi=110)


def _draw_curves(axes: Axes, result: Result) -> None:
    steps = np.arange(1, len(result.curves["plain"]) + 1)
    # The curves lie on one another: the plain one is drawn broad, the fused one thin on top of it.
    axes.plot(steps, result.curves["plain"], color=PLAIN, linewidth=5, alpha=0.55, label="plain PyTorch")
    axes.plot(steps, result.curves["fused"], color=FUSED, linewidth=1.3, label=f"fused ({result.backend})")
    gap = result.curve_differences()
    axes.set_title(f"Training loss; largest difference {gap['all_steps']:.1e}", fontsize=14)
    axes.set_xlabel("step", fontsize=12)
    axes.set_ylabel(result.loss, fontsize=12)
    axes.legend(fontsize=12)
    axes.grid(alpha=0.3)


def _draw_points(axes: Axes, points: np.ndarray, labels: np.ndarray | None, names: tuple[str, ...]) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(f"t-SNE of {len(points)} test features" + ("" if names else " (no labels)"), fontsize=14)
    if labels is None:
        axes.scatter(points[:, 0], points[:, 1], s=14, color=FUSED)
        return
    # Past 20 classes colours cannot be told apart: the most frequent 19 keep theirs, the others share black.
    order = np.argsort(-np.bincount(labels, minlength=len(names)), kind="stable")
    shown = np.sort(order[: LEGEND_MOST - 1]) if len(names) > LEGEND_MOST else np.arange(len(names))
    palette = colormaps["tab10" if len(shown) <= 10 else "tab20"]
    rest = ~np.isin(labels, shown)
    groups = [("black", rest, f"{len(names) - len(shown)} others")] if rest.any() else []
    groups += [
        (colour, labels == i, _short(names[i]))
        for colour, i in zip(map(palette, range(palette.N)), shown, strict=False)
    ]
    for colour, members, label in groups:
        axes.scatter(points[members, 0], points[members, 1], s=14, color=colour, label=label)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=11, markerscale=2, frameon=False)


def _short(name: str, most: int = 18) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _draw_bars(
    axes: Axes, values: Mapping[str, float | None], unit: str, scale: float, form: Callable[[float], str]
) -> None:
    names = ["plain", "fused"]
    heights = [value for name in names if (value := values[name]) is not None]
    if len(heights) < len(names):
        axes.text(0.5, 0.5, "not measured on this system", ha="center", va="center", fontsize=12)
        axes.set_axis_off()
        return
    bars = axes.bar(names, [height / scale for height in heights], width=0.55, color=[PLAIN, FUSED])
    axes.bar_label(bars, [form(height) for height in heights], fontsize=13, padding=3)
    axes.set_ylabel(unit, fontsize=12)
    axes.tick_params(axis="x", labelsize=13)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def _size(cost: Cost) -> str:
    return f"N = {cost.pairs}, D = {cost.width}"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds < 0.1 else f"{1e3 * seconds:.0f} ms"


def mebibytes(size: float) -> str:
    return f"{size / MIB:.1f} MiB" if size < 100 * MIB else f"{size / MIB:.0f} MiB"
