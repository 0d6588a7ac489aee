"""Training so that two views of an image agree, and embeddings of views for measuring a loss alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from examples.common import ranks
from examples.common.data import Dataset
from sslfast.augment import MultiViewTransform, ViewSpec

from .learners import Learner
from .model import Model

WEIGHT_DECAY = 1e-4
WARM_UP = 0.05  # part of the steps over which the learning rate rises, before it falls as a cosine


@dataclass(frozen=True)
class Schedule:
    """What fixes a training beside model, data and loss.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step, of all ranks together, at most the number of training images; what is left over at
            the end of an epoch waits for the next shuffle.
        learning_rate: the largest; it rises to it over the first steps, then falls as a cosine.
        seed: of the order of the images and of all views, so two trainings see the same batches: the views of an image
            depend on it, on the epoch and on the image's index, and on nothing else.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int


def train(
    learner: Learner, data: Dataset, views: Sequence[ViewSpec], schedule: Schedule, label: str
) -> tuple[list[float], float]:
    """Train ``learner`` in place with AdamW.

    With several ranks each trains on its part of every batch, with batch statistics of its own, and
    DistributedDataParallel keeps the weights alike.

    Args:
        views: those that are made of each image, all of one size.
        label: shown by the progress bar.

    Returns:
        The loss of each step (the mean over the ranks), and the seconds the training took.
    """
    generator = Generator().manual_seed(schedule.seed)
    rank, world = ranks.place()
    transform = MultiViewTransform(views, seed=schedule.seed, stacked=True)
    step: nn.Module = learner if world == 1 else DistributedDataParallel(learner)
    parameters = [p for p in learner.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=WEIGHT_DECAY)
    steps_per_epoch = len(data.train) // schedule.batch_size
    steps = schedule.epochs * steps_per_epoch
    rise = max(1, round(WARM_UP * steps))
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / (rise + 1), total_iters=rise)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - rise))
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [rise])

    learner.train()
    losses: list[float] = []
    start = time.perf_counter()
    with tqdm(total=steps, desc=f"{label:>5} loss", unit="step", disable=rank > 0) as progress:
        for epoch in range(schedule.epochs):
            order = torch.randperm(len(data.train), generator=generator)
            for batch in order[: steps_per_epoch * schedule.batch_size].split(schedule.batch_size):
                ids = batch.tensor_split(world)[rank]
                value = step(transform(data.train[ids], ids, epoch=epoch))  # [V, n, C, s, s]
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                scheduler.step()
                learner.after_step((len(losses) + 1) / steps)
                losses.append(ranks.mean(value.detach()).item())
                progress.update()
                progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses, time.perf_counter() - start


@torch.no_grad()
def embedded_views(
    model: Model, data: Dataset, views: Sequence[ViewSpec], pairs: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Embeddings of two views of real images, [pairs, D] each: the training images again and again, in new views."""
    transform = MultiViewTransform(views, seed=seed)
    model.encoder.eval()
    model.projector.eval()
    parts = []
    for ids in torch.arange(pairs).split(512):
        # The second time round an image has another id, hence other views.
        parts.append([model.embed(view) for view in transform(data.train[ids % len(data.train)], ids, epoch=0)])
    first, second = (torch.cat(embeddings) for embeddings in zip(*parts, strict=True))
    return first, second
