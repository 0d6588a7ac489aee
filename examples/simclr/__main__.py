"""SimCLR on real images, with the fused loss beside the plain one: ``python -m examples.simclr --data digits``.

On several processes: ``torchrun --nproc-per-node 2 -m examples.simclr --data digits``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

import sslfast
from examples.common import evaluate, ranks, report
from examples.common.augment import Augment, recipe_for
from examples.common.data import Dataset, load
from examples.common.measure import Cost, Loss, cost, serving_backend

from .losses import LOSSES, LOSSES_OVER_RANKS, OPERATORS, TEMPERATURE
from .train import DEFAULT_STEPS, Model, build, embedded_views, train, untrained

LARGE_PAIRS = (4096, 8192)
# A loss is left out at a batch where it may need more than this, as judged from the batch before it.
MEMORY_MOST = int(2.5 * 2**30)


@dataclass(frozen=True)
class Settings:
    """One run: the command line's flags, and the batches at which the loss alone is measured."""

    data: str
    output: Path
    epochs: int | None = None
    batch_size: int = 512
    seed: int = 0
    large_pairs: tuple[int, ...] = LARGE_PAIRS


def run(settings: Settings, data: Dataset, console: Console) -> report.Result | None:
    """Train with both losses, evaluate, measure the loss alone, and write table, picture and JSON.

    With several ranks all train together; all but the first then return ``None``.
    """
    start = time.perf_counter()
    rank, world = ranks.place()
    losses = LOSSES if world == 1 else LOSSES_OVER_RANKS
    notes = list(data.notes)
    batch_size = min(settings.batch_size, len(data.train))
    if batch_size < settings.batch_size:
        notes.append(f"a batch of {batch_size}, all training images, instead of {settings.batch_size}")
    steps_per_epoch = len(data.train) // batch_size
    epochs = settings.epochs or math.ceil(DEFAULT_STEPS / steps_per_epoch)
    augment = recipe_for(data)
    initial = build(data, settings.seed)

    small = embedded_views(initial, data, augment, min(8, batch_size), settings.seed)
    backend = serving_backend(losses["fused"], OPERATORS, *small)
    if rank == 0:
        spread = "" if world == 1 else f" over {world} ranks"
        console.print(
            f"{data.name}: {len(data.train)} training images, {epochs} epochs of {steps_per_epoch} step(s), "
            f"batch {batch_size}{spread}; sslfast.NTXentLoss is served by backend {backend!r}",
            markup=False,
        )
    models = {name: initial.copy() for name in LOSSES}
    runs = {
        name: train(models[name], data, augment, loss, epochs, batch_size, settings.seed, name)
        for name, loss in losses.items()
    }
    if rank > 0:
        return None
    console.print("Evaluating the features ...")
    features = {name: evaluate.encode(model.encoder, data) for name, model in models.items()}
    features["untrained"] = evaluate.encode(untrained(initial, data), data)
    features["raw pixels"] = evaluate.raw_pixels(data)
    accuracies = evaluate.accuracies(features, data)
    points = evaluate.picture(features["fused"], settings.seed)

    result = report.Result(
        method="SimCLR",
        loss=f"NT-Xent, temperature {TEMPERATURE}",
        data=data.name,
        images={"train": len(data.train), "test": len(data.test)},
        notes=tuple(notes),
        settings={
            "epochs": epochs,
            "steps": epochs * steps_per_epoch,
            "batch_size": batch_size,
            "seed": settings.seed,
            "ranks": world,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "sslfast": sslfast.__version__,
        },
        backend=backend,
        curves={name: losses for name, (losses, _) in runs.items()},
        training_seconds={name: seconds for name, (_, seconds) in runs.items()},
        accuracies=accuracies,
        costs=_costs((batch_size, *settings.large_pairs), models["fused"], data, augment, settings.seed, console),
        seconds=0.0,
    )
    settings.output.mkdir(parents=True, exist_ok=True)
    target = settings.output / f"simclr_{data.name}"
    labels = None if data.test_labels is None else data.test_labels[: len(points)]
    report.draw(result, points, labels, data.class_names, target.with_suffix(".png"))
    result = replace(result, seconds=time.perf_counter() - start)
    report.write_json(result, target.with_suffix(".json"))
    report.print_table(result, console)
    console.print(f"{target}.png and .json written; {result.seconds:.0f} s in all", markup=False)
    return result


def _costs(
    sizes: Sequence[int], model: Model, data: Dataset, augment: Augment, seed: int, console: Console
) -> list[Cost]:
    """The cost of each loss at each batch size, smallest first; the embeddings are of real images."""
    costs: list[Cost] = []
    losses: dict[str, Loss] = dict(LOSSES)
    for pairs in sorted(set(sizes)):
        if costs:
            # The matrix grows as N², and no buffer grows faster.
            growth = (pairs / costs[-1].pairs) ** 2
            peaks = costs[-1].peak_bytes
            losses = {name: loss for name, loss in losses.items() if (peaks[name] or 0) * growth <= MEMORY_MOST}
        if losses:
            console.print(f"Measuring the loss alone at {pairs} pairs: {', '.join(losses)} ...")
            # Views of another seed than the training's.
            costs.append(cost(losses, *embedded_views(model, data, augment, pairs, seed + 1)))
    return costs


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    parse.__name__ = "integer"  # argparse names the type in its message
    return parse


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run; bad input ends with status 2 and a message."""
    parser = argparse.ArgumentParser(prog="python -m examples.simclr", description=__doc__.split(":")[0] + ".")
    parser.add_argument("--data", default="digits", help="digits (default), fashion-mnist, or a folder of images")
    parser.add_argument("--epochs", type=_at_least(1), help=f"default: as many as make {DEFAULT_STEPS} steps")
    parser.add_argument("--batch-size", type=_at_least(2), default=512, help="images a step (default 512)")
    parser.add_argument("--seed", type=_at_least(0), default=0, help="of weights, batches and views (default 0)")
    parser.add_argument("--output", type=Path, default=Path("out/simclr"), help="folder for the results (out/simclr)")
    given = parser.parse_args(arguments)
    try:
        data = load(given.data)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    with ranks.group():
        if given.batch_size < 2 * ranks.place()[1]:
            parser.error(f"--batch-size must be at least 2 a rank, got {given.batch_size} for {ranks.place()[1]} ranks")
        run(Settings(given.data, given.output, given.epochs, given.batch_size, given.seed), data, Console())


if __name__ == "__main__":
    main()
