"""Whole training scripts of other packages, without and with ``sslfast.patch``.

    python -m benchmarks.scripts [script ...] [--repeats 3] [--steps 20] [--data fashion-mnist]
                                 [--json docs/scripts.json] [--page docs/scripts.md]

Every script of ``examples/dropin`` runs in fresh processes, the two sides in turns. Their curves of losses must agree,
and sslfast must have served every call. Then the numbers go into the JSON file, and from there into the page's table.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import plot
from .machine import ROOT, describe

SIDES = ("without", "with")
SECONDS = 600  # a process that takes longer is an error
# Both sides start from the same weights and see the same batches: one rounding apart at the first step. Training
# magnifies that, a little a step.
FIRST_AGREES, CURVE_AGREES = 1e-5, 1e-2
MIN_STEPS = 3


@dataclass(frozen=True)
class Script:
    """One script of ``examples/dropin``, by name; the module that it needs; what is named in the table; its method."""

    script: str
    module: str
    loss: str
    method: str | None = None
    has_data: bool = True

    def flags(self, data: str) -> list[str]:
        """What it is told beside what every script is told."""
        return [*(["--method", self.method] if self.method else []), *(["--data", data] if self.has_data else [])]


# By the name under which each reports itself.
SCRIPTS = {
    "lightly_simclr": Script("lightly_views", "lightly", "lightly `NTXentLoss`, D = 128", "simclr"),
    "lightly_barlow_twins": Script("lightly_views", "lightly", "lightly `BarlowTwinsLoss`, D = 2048", "barlow_twins"),
    "lightly_vicreg": Script("lightly_views", "lightly", "lightly `VICRegLoss`, D = 2048", "vicreg"),
    "open_clip_two_towers": Script("open_clip_two_towers", "open_clip", "open_clip `ClipLoss`, D = 512"),
    "metric_learning": Script(
        "metric_learning", "pytorch_metric_learning", "pytorch-metric-learning `NTXentLoss`, ten classes, D = 128"
    ),
    "sentence_pairs": Script(
        "sentence_pairs",
        "sentence_transformers",
        "sentence-transformers `MultipleNegativesRankingLoss`, D = 512",
        has_data=False,
    ),
}
Run = dict[str, Any]


class Failed(RuntimeError):
    """A script failed, or its two sides disagree, for the reason in the message."""


# ------------------------------------------------------------------------------------------------------------- running


def run(name: str, side: str, flags: Sequence[str]) -> Run:
    """One process of one script: what it reports about itself.

    Raises:
        Failed: it ended with an error, took too long, or sslfast left a call to the package.
    """
    module = f"examples.dropin.{SCRIPTS[name].script}"
    command = [sys.executable, "-m", module, *flags, *(["--sslfast"] if side == "with" else [])]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{name}, {side}: took more than {SECONDS} s") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Failed(f"{name}, {side}: ended with status {done.returncode}: {last}")
    left = re.search(r"sslfast does not serve.*", done.stderr)
    if left:
        raise Failed(f"{name}, {side}: {left[0]}")
    return json.loads(done.stdout.splitlines()[-1])


def repeated(
    name: str, repeats: int, flags: Sequence[str], once: Callable[[str, str, Sequence[str]], Run], progress: Any
) -> dict[str, list[Run]]:
    """``repeats`` runs of each side, in turns; each repetition begins with the other side."""
    runs: dict[str, list[Run]] = {side: [] for side in SIDES}
    for index in range(repeats):
        for side in SIDES if index % 2 == 0 else reversed(SIDES):
            progress.set_description(f"{name}, {side}")
            runs[side].append(once(name, side, flags))
            progress.update()
    return runs


def disagreement(runs: dict[str, list[Run]]) -> tuple[float, float]:
    """The largest relative difference of any run's losses from the first unpatched run's: at the first step, at any.

    Raises:
        Failed: a curve has another length.
    """
    expected = torch.tensor(runs["without"][0]["losses"], dtype=torch.float64)
    first = whole = 0.0
    for each in (*runs["without"], *runs["with"]):
        losses = torch.tensor(each["losses"], dtype=torch.float64)
        if losses.shape != expected.shape:
            raise Failed(f"{len(losses)} steps beside {len(expected)}")
        # A NaN is infinitely far away.
        relative = ((losses - expected) / expected).abs().nan_to_num(nan=float("inf"))
        first, whole = max(first, relative[0].item()), max(whole, relative.max().item())
    return first, whole


def summary(name: str, runs: dict[str, list[Run]]) -> dict[str, Any]:
    """The numbers of one script: medians over the repetitions, and ratios of these.

    Raises:
        Failed: the two sides' losses differ by more than rounding explains.
    """
    first, whole = disagreement(runs)
    if first > FIRST_AGREES or whole > CURVE_AGREES:
        raise Failed(
            f"{name}: the losses with and without sslfast differ by {first:.1e} at the first step (allowed "
            f"{FIRST_AGREES:.0e}) and by {whole:.1e} later (allowed {CURVE_AGREES:.0e})"
        )

    def median(side: str, key: str) -> float:
        return statistics.median(each[key] for each in runs[side])

    keys = ("seconds_per_step", "loss_seconds_per_step", "loss_share", "seconds_total")
    keys += ("peak_memory_mib", "memory_of_training_mib")
    for each in (*runs["without"], *runs["with"]):  # the interpreter with its packages is not what a script can change
        each["memory_of_training_mib"] = each["peak_memory_mib"] - each["peak_memory_before_training_mib"]
    own = runs["without"][0]
    return {
        "script": name,
        "loss": SCRIPTS[name].loss,
        "batch_size": own["batch_size"],
        "steps": own["steps"],
        "data": own.get("data", "the standard library's docstrings"),
        "repeats": len(runs["with"]),
        **{side: {key: median(side, key) for key in keys} for side in SIDES},
        "curves_differ_by": {"first_step": first, "any_step": whole},
        "losses": {side: runs[side][0]["losses"] for side in SIDES},
    }


# ------------------------------------------------------------------------------------------------------------ the page


def table(found: dict[str, Any]) -> str:
    """The results as Markdown, under a line that says where they were measured."""
    machine = found["machine"]
    header = ["script", "loss", "batch", "loss's share of a step, before", "step, before → with [ms]"]
    header += ["step faster by", "at most (loss for nothing)", "loss alone, before → with [ms]", "loss faster by"]
    header += ["peak memory that training adds, before → with [MiB]", "losses differ by"]
    lines = ["| " + " | ".join(header) + " |", "|---|---|" + "---:|" * (len(header) - 2)]
    for each in found["scripts"]:
        before, after = (each[side] for side in SIDES)

        def both(key: str, scale: float = 1.0, before: Run = before, after: Run = after) -> str:
            return f"{plot._short(scale * before[key])} → {plot._short(scale * after[key])}"

        def ratio(key: str, before: Run = before, after: Run = after) -> str:
            return f"{plot._short(before[key] / after[key])}×"

        cells = [f"`{each['script']}`", each["loss"], str(each["batch_size"]), f"{before['loss_share']:.0%}"]
        cells += [both("seconds_per_step", 1e3), ratio("seconds_per_step")]
        cells += [f"{plot._short(1 / (1 - before['loss_share']))}×"]
        cells += [both("loss_seconds_per_step", 1e3), ratio("loss_seconds_per_step"), both("memory_of_training_mib")]
        cells += [f"{each['curves_differ_by']['any_step']:.0e}"]
        lines.append("| " + " | ".join(cells) + " |")
    where = f"**{machine['device']}, {machine['threads']} threads**: torch {machine['torch']}, sslfast "
    where += f"{machine['sslfast']} ({machine['commit']}). Medians of {found['repeats']} runs of each side, in turns, "
    where += f"{found['steps']} steps each, in fresh processes."
    return "\n".join([where, "", *lines])


# -------------------------------------------------------------------------------------------------------- command line


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scripts", description="Whole training scripts, without and with sslfast.patch."
    )
    parser.add_argument("scripts", nargs="*", metavar="script", help=f"default: all of {', '.join(SCRIPTS)}")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (3)")
    parser.add_argument("--steps", type=int, default=20, help="of each run (20)")
    parser.add_argument("--batch-size", type=int, help="default: each script's own")
    parser.add_argument("--data", default="fashion-mnist", help="as the scripts' --data (fashion-mnist)")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "scripts.json", help="docs/scripts.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "scripts.md", help="docs/scripts.md")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.scripts if name not in SCRIPTS]
    if unknown:
        parser.error(f"script={unknown[0]!r} does not exist; allowed: {', '.join(SCRIPTS)}")
    if options.repeats < 1 or options.steps < MIN_STEPS:
        parser.error(f"--repeats must be at least 1, --steps {MIN_STEPS}; got {options.repeats} and {options.steps}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the scripts, write JSON and page; returns 1 if one failed or its sides disagree (nothing is written then)."""
    options = parse(arguments)
    names = options.scripts or list(SCRIPTS)
    absent = [name for name in names if importlib.util.find_spec(SCRIPTS[name].module) is None]
    for name in absent:
        print(f"skipped: {name}: {SCRIPTS[name].module} is not installed")
    names = [name for name in names if name not in absent]
    results, errors = [], []
    with tqdm(total=len(names) * options.repeats * len(SIDES), unit="run") as bar:
        for name in names:
            flags = ["--steps", str(options.steps), *SCRIPTS[name].flags(options.data)]
            flags += ["--batch-size", str(options.batch_size)] if options.batch_size else []
            try:
                results.append(summary(name, repeated(name, options.repeats, flags, run, bar)))
            except Failed as error:
                errors.append(str(error))
    print(f"{len(errors)} errors", *errors, sep="\n  ")
    if errors or not results:
        return 1
    command = ["python", "-m", "benchmarks.scripts", *options.scripts, "--repeats", str(options.repeats)]
    machine = describe("cpu", " ".join([*command, "--steps", str(options.steps)]))
    found = {"machine": asdict(machine), "repeats": options.repeats, "steps": options.steps, "scripts": results}
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    text = table(found)
    print(text)
    options.page.write_text(plot.rewrite(options.page.read_text(), {"scripts": text}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
