"""What the run leaves behind: tables on the terminal, one picture, one JSON file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from examples.common.report import FIRST_STEPS, FUSED, PLAIN, below, mebibytes, milliseconds

from .costs import MASKED, PARTS, Cost

ACCURACIES = {"knn": "kNN accuracy (k = 20)", "linear": "linear probe accuracy"}


@dataclass(frozen=True)
class Result:
    """All numbers of one run, as they stand in its JSON file.

    Attributes:
        data: the data set's name; ``images`` its sizes; ``notes`` what its reader has to know.
        settings: model, schedule, seed, threads, versions.
        operators: sslfast's operators that the fused side called; none where the reference served it.
        curves: the loss of every training step, ``fused`` and ``plain``.
        training_seconds: by side.
        accuracies: by classifier (``knn``, ``linear``) and features (``fused``, ``plain``, ``untrained``,
            ``raw pixels``); ``None`` without labels.
        cost: of the training's steps; ``large_cost`` of the masked parts at the sizes of ViT-B/16.
        seconds: the whole run.
    """

    data: str
    images: dict[str, int]
    notes: tuple[str, ...]
    settings: dict[str, Any]
    operators: tuple[str, ...]
    curves: dict[str, list[float]]
    training_seconds: dict[str, float]
    accuracies: dict[str, dict[str, float]] | None
    cost: Cost
    large_cost: Cost
    seconds: float

    def curve_differences(self) -> dict[str, float]:
        """|fused − plain|: the largest over the first 20 steps, over all steps, and at the last step."""
        gap = np.abs(np.subtract(self.curves["fused"], self.curves["plain"]))
        spans = {"first_steps": gap[:FIRST_STEPS], "all_steps": gap, "last_step": gap[-1:]}
        return {name: float(span.max()) for name, span in spans.items()}


def write_json(result: Result, path: Path) -> None:
    """All fields of ``result`` and the differences of its curves."""
    content = dataclasses.asdict(result) | {"curve_differences": result.curve_differences()}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def print_tables(result: Result, console: Console) -> None:
    """Accuracies, then the times of a step's parts: of the training's, and at the sizes of ViT-B/16."""
    columns = ("fused", "plain", "untrained", "raw pixels")
    table = Table(
        title=f"MAE on {result.data}: {result.images['train']} training and {result.images['test']} test images",
        caption=f"fused side served by {', '.join(result.operators) or 'the reference'}",
    )
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for kind, label in ACCURACIES.items():
        found = None if result.accuracies is None else result.accuracies[kind]
        table.add_row(label, *("no labels" if found is None else f"{100 * found[name]:.1f} %" for name in columns))
    table.add_section()
    table.add_row("training, whole", *(f"{result.training_seconds[name]:.0f} s" for name in columns[:2]), "–", "–")
    table.add_row("loss at the last step", *(f"{result.curves[name][-1]:.4f}" for name in columns[:2]), "–", "–")
    console.print(table)
    console.print(_cost_table("A step of the training, forward and backward", result.cost, PARTS))
    console.print(_cost_table("The masked parts at the sizes of ViT-B/16", result.large_cost, MASKED))
    below(result.curve_differences(), result.notes, console)


def _cost_table(title: str, cost: Cost, parts: tuple[str, ...]) -> Table:
    table = Table(
        title=title,
        caption=f"B = {cost.batch}, L = {cost.length}, {cost.ratio:.0%} masked, widths {cost.width} and "
        f"{cost.decoder_width}; medians of interleaved rounds",
    )
    for name in ("", "fused", "plain", "plain / fused"):
        table.add_column(name, justify="right" if name else "left")

    def row(label: str, fused: float, plain: float) -> None:
        table.add_row(label, milliseconds(fused), milliseconds(plain), f"{plain / fused:.2f}")

    for part in parts:
        row(part, cost.seconds["fused"][part], cost.seconds["plain"][part])
    table.add_section()
    row("together", *(sum(cost.seconds[name][part] for part in parts) for name in ("fused", "plain")))
    fused, plain = cost.peak_bytes["fused"], cost.peak_bytes["plain"]
    if fused and plain:
        table.add_row("peak extra memory", mebibytes(fused), mebibytes(plain), f"{plain / fused:.2f}")
    return table


def draw(result: Result, images: Tensor, masked: Tensor, reconstructed: Tensor, path: Path) -> None:
    """One PNG: input, mask and reconstruction of a few images; the loss curves; the time of the masked parts.

    Args:
        images, masked, reconstructed: [m, C, H, H] in [0, 1].
    """
    figure = Figure(figsize=(15, 10), layout="constrained")
    figure.suptitle(f"Masked autoencoder on {result.data}, {result.cost.ratio:.0%} of the patches masked", fontsize=17)
    left, right = figure.subfigures(1, 2, width_ratios=(2, 3))
    _draw_images(left, {"input": images, "masked": masked, "reconstruction": reconstructed})
    curves, bars = right.subplots(2, 1)
    _draw_curves(curves, result)
    _draw_parts(bars, result.large_cost)
    figure.savefig(path, dpi=100)


def _draw_images(figure: SubFigure, columns: dict[str, Tensor]) -> None:
    """Two images a row, three columns each."""
    count = len(next(iter(columns.values())))
    axes = figure.subplots((count + 1) // 2, 6, squeeze=False)
    for place in axes.flat:
        place.set_axis_off()
    for i in range(count):
        for j, (name, images) in enumerate(columns.items()):
            place = axes[i // 2, 3 * (i % 2) + j]
            place.imshow(images[i].permute(1, 2, 0).clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
            if i < 2:
                place.set_title(name, fontsize=10)


def _draw_curves(axes: Axes, result: Result) -> None:
    steps = np.arange(1, len(result.curves["plain"]) + 1)
    # The curves lie on one another: the plain one is drawn broad, the fused one thin on top of it.
    axes.plot(steps, result.curves["plain"], color=PLAIN, linewidth=5, alpha=0.55, label="plain PyTorch")
    axes.plot(steps, result.curves["fused"], color=FUSED, linewidth=1.3, label="fused")
    axes.set_title(f"Training loss; largest difference {result.curve_differences()['all_steps']:.1e}", fontsize=14)
    axes.set_xlabel("step", fontsize=12)
    axes.set_ylabel("mean squared error, masked patches", fontsize=12)
    axes.legend(fontsize=12)
    axes.grid(alpha=0.3)


def _draw_parts(axes: Axes, cost: Cost) -> None:
    places = np.arange(len(MASKED))
    for name, shift, colour in (("plain", -0.2, PLAIN), ("fused", 0.2, FUSED)):
        heights = [1e3 * cost.seconds[name][part] for part in MASKED]
        bars = axes.bar(places + shift, heights, width=0.38, color=colour, label=name)
        axes.bar_label(bars, [milliseconds(height / 1e3) for height in heights], fontsize=11, padding=2)
    axes.set_xticks(places, MASKED, fontsize=12)
    axes.set_ylabel("milliseconds", fontsize=12)
    axes.set_title(f"Masked parts at the sizes of ViT-B/16, {cost.batch} images, forward and backward", fontsize=14)
    axes.margins(y=0.15)
    axes.legend(fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)
