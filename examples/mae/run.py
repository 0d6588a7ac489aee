"""The whole run: train on both sides, evaluate, measure, and write tables, picture and JSON."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Generator, Tensor

import sslfast
from examples.common import evaluate
from examples.common.data import Dataset, batch_of
from examples.common.measure import operators_of

from . import report
from .costs import cost, large_cost
from .model import MaskedAutoencoder, Shape, build
from .sides import SIDES, patchify, unpatchify
from .train import Schedule, loss_of, train

PICTURES = 12
MEASURE_SECONDS = 12.0


@dataclass(frozen=True)
class Recipe:
    """What suits images of one size.

    Attributes:
        patch: height and width of a patch, in pixels.
        batch_size, learning_rate, steps: of the training.
        ratio: the part of the patches that is masked; less than for photographs, for these have few patches.
    """

    patch: int
    batch_size: int
    learning_rate: float
    steps: int
    ratio: float


TINY = Recipe(patch=2, batch_size=64, learning_rate=1e-3, steps=1440, ratio=0.5)  # below 16 × 16 pixels
SMALL = Recipe(patch=4, batch_size=64, learning_rate=1e-3, steps=930, ratio=0.6)
NORMALISE = True  # the decoder predicts patches that are standardised each by itself, MAE's better features


@dataclass(frozen=True)
class Settings:
    """One run: the command line's flags, with ``None`` where the recipe has a default."""

    output: Path
    epochs: int | None = None
    batch_size: int | None = None
    seed: int = 0


def run(settings: Settings, data: Dataset, console: Console) -> report.Result:
    """Train on both sides from the same weights, with the same batches and masks; evaluate, measure, write."""
    start = time.perf_counter()
    size, seed = data.train.shape[-1], settings.seed
    recipe = TINY if size < 16 else SMALL
    shape = Shape(data.train.shape[1], size, recipe.patch)
    notes = list(data.notes)
    batch_size = batch_of(data, settings.batch_size or recipe.batch_size, notes)
    steps_per_epoch = len(data.train) // batch_size
    epochs = settings.epochs or math.ceil(recipe.steps / steps_per_epoch)
    schedule = Schedule(epochs, batch_size, recipe.learning_rate, recipe.ratio, NORMALISE, seed)
    initial = build(shape, data.train, seed)
    images = initial.standardise(data.train[:batch_size])
    noise = torch.rand(batch_size, shape.length, generator=Generator().manual_seed(seed))
    seen = operators_of(partial(loss_of, initial, SIDES["fused"], images, noise, schedule))
    operators = tuple(sorted(name for name in seen if name.startswith("sslfast::")))
    console.print(
        f"MAE on {data.name}: {len(data.train)} training images of {shape.length} patches, {recipe.ratio:.0%} masked, "
        f"{epochs} epochs of {steps_per_epoch} step(s), batch {batch_size}",
        markup=False,
    )
    models = {name: initial.copy() for name in SIDES}
    runs = {name: train(models[name], data.train, side, schedule, name) for name, side in SIDES.items()}
    console.print("Evaluating the features ...")
    features = {name: standardised(evaluate.encode(model, data)) for name, model in models.items()}
    features["untrained"] = standardised(evaluate.encode(initial, data))
    features["raw pixels"] = evaluate.raw_pixels(data)
    accuracies = evaluate.accuracies(features, data)
    console.print("Measuring the parts of a step ...")
    result = report.Result(
        data=data.name,
        images={"train": len(data.train), "test": len(data.test)},
        notes=tuple(notes),
        settings={
            **vars(shape),
            **vars(schedule),
            "steps": epochs * steps_per_epoch,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "sslfast": sslfast.__version__,
        },
        operators=operators,
        curves={name: curve for name, (curve, _) in runs.items()},
        training_seconds={name: seconds for name, (_, seconds) in runs.items()},
        accuracies=accuracies,
        cost=cost(models["fused"], images, noise, schedule, MEASURE_SECONDS, memory=False),
        large_cost=large_cost(data.train, schedule, MEASURE_SECONDS),
        seconds=0.0,
    )
    settings.output.mkdir(parents=True, exist_ok=True)
    target = settings.output / f"mae_{data.name}"
    report.draw(result, *reconstructions(models["fused"], data.test[:PICTURES], schedule), target.with_suffix(".png"))
    result = replace(result, seconds=time.perf_counter() - start)
    report.write_json(result, target.with_suffix(".json"))
    report.print_tables(result, console)
    console.print(f"{target}.png and .json written; {result.seconds:.0f} s in all", markup=False)
    return result


def standardised(features: evaluate.Features) -> evaluate.Features:
    """Columns of mean 0 and variance 1 over the training images, as MAE's linear probe has them by a batch norm.

    Without that, features of random weights are dominated by their mean, and the comparison would flatter training.
    """
    mean, std = features.train.mean(axis=0), features.train.std(axis=0) + np.float32(1e-6)
    return evaluate.Features((features.train - mean) / std, (features.test - mean) / std)


@torch.no_grad()
def reconstructions(model: MaskedAutoencoder, images: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    """``images`` [m, C, H, H] in [0, 1]; the same with grey masked patches; the same with the model's patches there.

    A model that predicts standardised patches tells neither their mean nor their variance: they are the image's own.
    """
    patch, side = model.shape.patch, SIDES["fused"]
    noise = torch.rand(len(images), model.shape.length, generator=Generator().manual_seed(schedule.seed))
    standard = model.standardise(images)
    tokens, masks = side.embed(model, standard, noise, schedule.ratio)
    pred = model.decode(side.fill(model, model.narrow(model.encoder(tokens)), masks))
    target = patchify(standard, patch)
    if schedule.normalise:
        pred = pred * (target.var(dim=-1, keepdim=True) + 1e-6).sqrt() + target.mean(dim=-1, keepdim=True)
    hidden = unpatchify(masks.mask[..., None].expand_as(target), patch, images.shape[1])
    restored = unpatchify(pred, patch, images.shape[1]) * model.std + model.mean
    return images, images.masked_fill(hidden, 0.5), torch.where(hidden, restored.clamp(0, 1), images)
