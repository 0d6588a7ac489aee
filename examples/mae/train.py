"""Pretraining of a masked autoencoder by one side's masked parts."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from .model import MaskedAutoencoder
from .sides import Side

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.05
WARM_UP = 0.1  # part of the steps over which the learning rate rises, before it falls as a cosine


@dataclass(frozen=True)
class Schedule:
    """What fixes a training beside model, data and side.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step, at most the number of training images; what is left over at the end of an epoch waits
            for the next shuffle.
        learning_rate: the largest; it rises to it over the first steps, then falls as a cosine.
        ratio: the part of an image's patches that is masked.
        normalise: the decoder predicts patches that are standardised each by itself, not pixels.
        seed: of the order of the images and of the masks, so two trainings see the same ones.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    ratio: float
    normalise: bool
    seed: int


def epoch_of_noise(count: int, length: int, seed: int, epoch: int) -> Tensor:
    """[count, length] uniform noise: the masks of image i in this epoch follow from its row i, whatever its batch."""
    return torch.rand(count, length, generator=Generator().manual_seed(1_000_003 * (seed + 1) + epoch))


def loss_of(model: MaskedAutoencoder, side: Side, images: Tensor, noise: Tensor, schedule: Schedule) -> Tensor:
    """The loss of standardised images [B, C, H, H] under the masks of noise [B, L]."""
    tokens, masks = side.embed(model, images, noise, schedule.ratio)
    encoded = model.narrow(model.encoder(tokens))
    pred = model.decode(side.fill(model, encoded, masks))
    return side.loss(images, pred, masks, model.shape.patch, schedule.normalise)


def train(
    model: MaskedAutoencoder, images: Tensor, side: Side, schedule: Schedule, label: str
) -> tuple[list[float], float]:
    """Train ``model`` in place with AdamW on images [n, C, H, H] in [0, 1].

    Args:
        label: shown by the progress bar.

    Returns:
        The loss of each step, and the seconds the training took.
    """
    generator = Generator().manual_seed(schedule.seed)
    images = model.standardise(images)
    steps_per_epoch = len(images) // schedule.batch_size
    steps = schedule.epochs * steps_per_epoch
    # As MAE does: no weight decay on biases, norms and tokens. Those have one dimension, or one row.
    matrices = [p for p in model.parameters() if p.dim() > 1 and p.shape[0] > 1]
    others = [p for p in model.parameters() if p.dim() == 1 or p.shape[0] == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=BETAS)
    rise = max(1, round(WARM_UP * steps))

    def rate(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / max(1, steps - rise))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    losses: list[float] = []
    start = time.perf_counter()
    with tqdm(total=steps, desc=f"{label:>5} loss", unit="step") as progress:
        for epoch in range(schedule.epochs):
            order = torch.randperm(len(images), generator=generator)
            noise = epoch_of_noise(len(images), model.shape.length, schedule.seed, epoch)
            for batch in order[: steps_per_epoch * schedule.batch_size].split(schedule.batch_size):
                value = loss_of(model, side, images[batch], noise[batch], schedule)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                scheduler.step()
                losses.append(value.item())
                progress.update()
                progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses, time.perf_counter() - start
