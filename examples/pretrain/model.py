"""The network that is trained: a small convolutional encoder, and a projector to the width that the loss wants."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.common.data import Dataset


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
    """``encoder`` gives the features that are kept, ``projector`` the embeddings [B, D] that the loss compares."""

    encoder: nn.Module
    projector: nn.Module

    def embed(self, x: Tensor) -> Tensor:
        """[B, D] embeddings of x [B, C, H, W]."""
        return self.projector(self.encoder(x))

    def copy(self) -> Model:
        """The same weights, in memory of their own."""
        return copy.deepcopy(self)

    def of_width(self, hidden: tuple[int, ...], width: int, seed: int) -> Model:
        """The same encoder under a projector to another width, with random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Model(self.encoder, _projector(hidden, width))


def build(data: Dataset, hidden: tuple[int, ...], width: int, seed: int) -> Model:
    """A model with random weights that depend on ``seed`` alone; torch's global generator is left as it was.

    Args:
        hidden: widths of the projector's hidden layers.
        width: D, of the embeddings.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(Encoder(data.train, data.view_size), _projector(hidden, width))


def _projector(hidden: tuple[int, ...], width: int) -> nn.Sequential:
    """Linear layers from the encoder's features to ``width``, with batch norm and ReLU between them."""
    layers: list[nn.Module] = []
    last = Encoder.features
    for size in hidden:
        layers += [nn.Linear(last, size, bias=False), nn.BatchNorm1d(size), nn.ReLU()]
        last = size
    return nn.Sequential(*layers, nn.Linear(last, width))


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
