"""SimCLR: a small convolutional encoder and a projector, trained so that two views of an image agree."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from examples.common import ranks
from examples.common.augment import Augment
from examples.common.data import Dataset
from examples.common.measure import Loss

LEARNING_RATE, WEIGHT_DECAY = 2e-3, 1e-4
WARM_UP = 0.05  # part of the steps over which the learning rate rises, before it falls as a cosine
DEFAULT_STEPS = 300


class Encoder(nn.Module):
    """Three convolutions and the mean over positions: [B, C, H, W] in [0, 1] to [B, 128].

    Args:
        images: [n, C, H, W], the training images: their mean and standard deviation a channel standardise every input.
        view_size: height and width at which the convolutions see an image.
    """

    features = 128
    mean: Tensor  # [1, C, 1, 1], as std
    std: Tensor

    def __init__(self, images: Tensor, view_size: int) -> None:
        super().__init__()
        self.view_size = view_size
        self.register_buffer("mean", images.mean(dim=(0, 2, 3), keepdim=True))
        self.register_buffer("std", images.std(dim=(0, 2, 3), keepdim=True) + 1e-3)
        # Views of 16 reach the last layer as 4 × 4 positions, views of 28 and 32 too: the cost is about the same.
        middle = 1 if view_size <= 16 else 2
        self.layers = nn.Sequential(
            *_convolution(images.shape[1], 32, 2),
            *_convolution(32, 64, middle),
            *_convolution(64, self.features, 2),
        )
        self.layers.to(memory_format=torch.channels_last)  # oneDNN's faster layout on a CPU

    def forward(self, x: Tensor) -> Tensor:
        """[B, 128] features of x [B, C, H, W], resampled first where its size is not the views'."""
        if x.shape[-1] != self.view_size:
            x = F.interpolate(x, size=(self.view_size, self.view_size), mode="bilinear", align_corners=False)
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return self.layers(x).mean(dim=(2, 3))


def _convolution(channels_in: int, channels_out: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)]


@dataclass(frozen=True)
class Model:
    """``encoder`` gives the features that are kept, ``projector`` the embeddings [B, 128] that the loss compares."""

    encoder: nn.Module
    projector: nn.Module

    def embed(self, x: Tensor) -> Tensor:
        """[B, 128] embeddings of x [B, C, H, W]."""
        return self.projector(self.encoder(x))

    def copy(self) -> Model:
        """The same weights, in memory of their own."""
        return copy.deepcopy(self)


def build(data: Dataset, seed: int) -> Model:
    """A model with random weights that depend on ``seed`` alone; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Encoder(data.train, data.view_size)
        width = encoder.features
        projector = nn.Sequential(
            nn.Linear(width, 2 * width, bias=False), nn.BatchNorm1d(2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )
    return Model(encoder, projector)


@torch.no_grad()
def untrained(model: Model, data: Dataset) -> nn.Module:
    """A copy of the encoder whose weights are not trained, but whose batch norms know the training images.

    Without that, features of random weights are dominated by their mean, and the comparison would flatter training.
    """
    encoder = model.copy().encoder
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a cumulative average instead of an exponential one
    encoder.train()
    for batch in data.train.split(512):
        if len(batch) > 1:
            encoder(batch)
    return encoder.eval()


def train(
    model: Model, data: Dataset, augment: Augment, loss: Loss, epochs: int, batch_size: int, seed: int, label: str
) -> tuple[list[float], float]:
    """Train ``model`` in place with AdamW and a cosine schedule.

    With several ranks each trains on its part of every batch, with batch statistics of its own, and
    DistributedDataParallel keeps the weights alike.

    Args:
        loss: takes the embeddings of both views, [rows, 128] each, where ``rows`` is this rank's part of the batch.
        batch_size: images a step, of all ranks together, at most the number of training images; what is left over at
            the end of an epoch waits for the next shuffle.
        seed: fixes the order of the images and all views, so two calls see the same batches.
        label: shown by the progress bar.

    Returns:
        The loss of each step (the mean over the ranks), and the seconds the training took.
    """
    generator = Generator().manual_seed(seed)
    rank, world = ranks.place()
    # All ranks shuffle alike; with several of them each draws views of its own.
    views_generator = generator if world == 1 else Generator().manual_seed(seed + 1 + rank)
    embed: nn.Module = nn.Sequential(model.encoder, model.projector)
    if world > 1:
        embed = DistributedDataParallel(embed)
    parameters = [*model.encoder.parameters(), *model.projector.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps_per_epoch = len(data.train) // batch_size
    steps = epochs * steps_per_epoch
    rise = max(1, round(WARM_UP * steps))
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / (rise + 1), total_iters=rise)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - rise))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [rise])

    model.encoder.train()
    model.projector.train()
    losses: list[float] = []
    start = time.perf_counter()
    with tqdm(total=steps, desc=f"{label:>5} loss", unit="step", disable=rank > 0) as progress:
        for _ in range(epochs):
            order = torch.randperm(len(data.train), generator=generator)
            for batch in order[: steps_per_epoch * batch_size].split(batch_size):
                images = data.train[batch.tensor_split(world)[rank]]  # [n, C, H, W]
                views = torch.cat([augment(images, views_generator) for _ in range(2)])  # [2n, C, s, s]
                value = loss(*embed(views).chunk(2))
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                schedule.step()
                losses.append(ranks.mean(value.detach()).item())
                progress.update()
                progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses, time.perf_counter() - start


@torch.no_grad()
def embedded_views(model: Model, data: Dataset, augment: Augment, pairs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Embeddings of two views of real images, [pairs, 128] each: the training images again and again, in new views."""
    generator = Generator().manual_seed(seed)
    model.encoder.eval()
    model.projector.eval()
    parts: list[tuple[Tensor, Tensor]] = []
    left = pairs
    while left > 0:
        for images in data.train.split(512):
            images = images[:left]
            parts.append((model.embed(augment(images, generator)), model.embed(augment(images, generator))))
            left -= len(images)
            if left == 0:
                break
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
