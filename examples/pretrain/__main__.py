"""Pretraining on real images, fused loss beside plain: ``python -m examples.pretrain --method simclr``.

On several processes: ``torchrun --nproc-per-node 2 -m examples.pretrain --method simclr``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

import sslfast
from examples.common import evaluate, ranks, report
from examples.common.augment import views_for
from examples.common.data import Dataset, batch_of, load
from examples.common.measure import Cost, cost, serving_backend
from examples.mae import run as mae
from sslfast.augment import ViewSpec

from .methods import METHODS, Method
from .model import Model, build, untrained
from .train import Schedule, embedded_views, train

# A loss is left out at a size where it may need more than this, as judged from the size before it.
MEMORY_MOST = int(2.5 * 2**30)


@dataclass(frozen=True)
class Settings:
    """One run: the command line's flags, with ``None`` where the method has a default."""

    method: Method
    output: Path
    epochs: int | None = None
    batch_size: int | None = None
    seed: int = 0


def run(settings: Settings, data: Dataset, console: Console) -> report.Result | None:
    """Train with both losses, evaluate, measure the loss alone, and write table, picture and JSON.

    With several ranks all train together; all but the first then return ``None``.
    """
    start = time.perf_counter()
    rank, world = ranks.place()
    method, seed = settings.method, settings.seed
    notes = list(data.notes)
    batch_size = batch_of(data, settings.batch_size or method.batch_size, notes)
    steps_per_epoch = len(data.train) // batch_size
    epochs = settings.epochs or math.ceil(method.steps / steps_per_epoch)
    views = views_for(data, method.learner.local_views)
    initial = build(data, method.hidden, method.width, seed)

    measured = (
        initial if method.measured_width is None else initial.of_width(method.hidden, method.measured_width, seed)
    )
    small = embedded_views(measured, data, views[:2], min(8, batch_size), seed)
    alone = partial(method.of_two_views, method.fused if world == 1 else method.fused_over_ranks)
    backend = serving_backend(alone, method.operators if world == 1 else method.operators_over_ranks, *small)
    if rank == 0:
        spread = "" if world == 1 else f" over {world} ranks"
        console.print(
            f"{method.title} on {data.name}: {len(data.train)} training images, {epochs} epochs of {steps_per_epoch} "
            f"step(s), batch {batch_size}{spread}; the fused loss is served by backend {backend!r}",
            markup=False,
        )
    schedule = Schedule(epochs, batch_size, method.learning_rate, seed)
    learners = method.learners(initial, world)
    runs = {name: train(learner, data, views, schedule, name) for name, learner in learners.items()}
    if rank > 0:
        return None
    console.print("Evaluating the features ...")
    for name, learner in learners.items():
        told = ", ".join(f"{what} {value:.3g}" for what, value in learner.findings().items())
        if told:
            notes.append(f"{name}, last batch: {told}")
    features = {name: evaluate.encode(learner.encoder, data) for name, learner in learners.items()}
    features["untrained"] = evaluate.encode(untrained(initial, data), data)
    features["raw pixels"] = evaluate.raw_pixels(data)
    accuracies = evaluate.accuracies(features, data)
    points = evaluate.picture(features["fused"], seed)

    result = report.Result(
        method=method.title,
        loss=method.loss,
        data=data.name,
        images={"train": len(data.train), "test": len(data.test)},
        notes=tuple(notes),
        settings={
            "epochs": epochs,
            "steps": epochs * steps_per_epoch,
            "batch_size": batch_size,
            "learning_rate": method.learning_rate,
            "projector": [*method.hidden, method.width],
            "seed": seed,
            "ranks": world,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "sslfast": sslfast.__version__,
        },
        backend=backend,
        backend_alone=serving_backend(partial(method.of_two_views, method.fused), method.operators, *small),
        curves={name: curve for name, (curve, _) in runs.items()},
        training_seconds={name: seconds for name, (_, seconds) in runs.items()},
        accuracies=accuracies,
        costs=_costs(method, batch_size, learners["fused"].model, data, views[:2], seed, console),
        seconds=0.0,
    )
    settings.output.mkdir(parents=True, exist_ok=True)
    target = settings.output / f"{method.name}_{data.name}"
    labels = None if data.test_labels is None else data.test_labels[: len(points)]
    report.draw(result, points, labels, data.class_names, target.with_suffix(".png"))
    result = replace(result, seconds=time.perf_counter() - start)
    report.write_json(result, target.with_suffix(".json"))
    report.print_table(result, console)
    console.print(f"{target}.png and .json written; {result.seconds:.0f} s in all", markup=False)
    return result


def _costs(
    method: Method, batch_size: int, model: Model, data: Dataset, views: Sequence[ViewSpec], seed: int, console: Console
) -> list[Cost]:
    """The cost of each loss at the training's size and at the method's large ones; the embeddings are of real images.

    At a width that is not the training's, a projector of that width with random weights stands on the trained encoder.
    """
    costs: list[Cost] = []
    losses = method.alone()
    sizes = dict.fromkeys(((batch_size, method.measured_width or method.width), *method.large))  # each once, in order
    for pairs, width in sizes:
        if costs:
            # The matrix grows as N² or D², that of scores as N·K, and no buffer grows faster.
            rows, columns = pairs / costs[-1].pairs, width / costs[-1].width
            growth = max(rows, columns) ** 2 if method.measured_width is None else rows * columns
            peaks = costs[-1].peak_bytes
            losses = {name: loss for name, loss in losses.items() if (peaks[name] or 0) * growth <= MEMORY_MOST}
        if losses:
            console.print(f"Measuring the loss alone at N = {pairs}, D = {width}: {', '.join(losses)} ...")
            embedder = model if width == method.width else model.of_width(method.hidden, width, seed)
            # Views of another seed than the training's.
            costs.append(cost(losses, *embedded_views(embedder, data, views, pairs, seed + 1)))
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
    steps = ", ".join(f"{method.steps} ({name})" for name, method in METHODS.items())
    batches = ", ".join(f"{method.batch_size} ({name})" for name, method in METHODS.items())
    parser = argparse.ArgumentParser(prog="python -m examples.pretrain", description=__doc__.split(":")[0] + ".")
    parser.add_argument("--method", choices=(*METHODS, "mae"), default="simclr", help="default: simclr")
    parser.add_argument("--data", default="digits", help="digits (default), fashion-mnist, or a folder of images")
    parser.add_argument("--epochs", type=_at_least(1), help=f"default: as many as make {steps} steps (mae: by data)")
    parser.add_argument("--batch-size", type=_at_least(2), help=f"images a step (default: {batches}; mae: by data)")
    parser.add_argument("--seed", type=_at_least(0), default=0, help="of weights, batches, views and masks (default 0)")
    parser.add_argument("--output", type=Path, default=Path("out/demo"), help="folder for the results (out/demo)")
    given = parser.parse_args(arguments)
    try:
        data = load(given.data)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if given.method == "mae":
        if dist.is_torchelastic_launched():
            parser.error("--method mae runs on one process, without torchrun")
        mae.run(mae.Settings(given.output, given.epochs, given.batch_size, given.seed), data, Console())
        return
    method = METHODS[given.method]
    if method.fused_over_ranks is None and dist.is_torchelastic_launched():
        parser.error(f"--method {method.name} runs on one process, without torchrun")
    with ranks.group():
        world, batch_size = ranks.place()[1], given.batch_size or method.batch_size
        if batch_size < 2 * world:
            parser.error(f"--batch-size must be at least 2 a rank, got {batch_size} for {world} ranks")
        run(Settings(method, given.output, given.epochs, given.batch_size, given.seed), data, Console())


if __name__ == "__main__":
    main()
