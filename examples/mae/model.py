"""The masked autoencoder (He et al. 2022), small: what is the same for the fused and the plain side.

The steps between these parts (masking and patch embedding, the decoder's input, the loss) are in ``sides.py``.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Sizes: images [B, C, H, H] cut into L = (H / patch)² patches, widths and depths of both transformers."""

    channels: int
    size: int
    patch: int
    width: int = 128
    depth: int = 4
    decoder_width: int = 64
    decoder_depth: int = 2
    heads: int = 4

    @property
    def grid(self) -> tuple[int, int]:
        return self.size // self.patch, self.size // self.patch

    @property
    def length(self) -> int:
        """L, the patches of an image."""
        return math.prod(self.grid)


class Block(nn.Module):
    """A transformer block: attention and a two-layer perceptron, each behind a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class MaskedAutoencoder(nn.Module):
    """Encoder of the visible patches, decoder of all.

    As a module it is the encoder alone, for evaluation: images [B, C, H, H] in [0, 1] to [B, D], the mean over the
    encoded patches, none of them masked.

    Args:
        shape: all sizes.
        images: [n, C, H, H], the training images: their mean and standard deviation a channel standardise every input.

    Attributes:
        project: the patch projection, a convolution whose stride is the patch.
        position: [L, D], fixed sines and cosines.
        decoder_position: [1 + L, D'], the same; the first row, of the class token, is zero.
        class_token: [1, D].
        mask_token: [D'].
    """

    mean: Tensor
    std: Tensor
    position: Tensor
    decoder_position: Tensor

    def __init__(self, shape: Shape, images: Tensor) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("mean", images.mean(dim=(0, 2, 3), keepdim=True))
        self.register_buffer("std", images.std(dim=(0, 2, 3), keepdim=True) + 1e-3)
        narrow = shape.decoder_width
        self.project = nn.Conv2d(shape.channels, shape.width, shape.patch, stride=shape.patch)
        self.register_buffer("position", sines(shape.grid, shape.width))
        self.class_token = nn.Parameter(0.02 * torch.randn(1, shape.width))
        self.encoder = nn.Sequential(*(Block(shape.width, shape.heads) for _ in range(shape.depth)))
        self.encoder.append(nn.LayerNorm(shape.width))
        self.narrow = nn.Linear(shape.width, narrow)
        self.mask_token = nn.Parameter(0.02 * torch.randn(narrow))
        position = sines(shape.grid, narrow)
        self.register_buffer("decoder_position", torch.cat([torch.zeros(1, narrow), position]))
        self.decoder = nn.Sequential(*(Block(narrow, shape.heads) for _ in range(shape.decoder_depth)))
        self.decoder.append(nn.LayerNorm(narrow))
        self.head = nn.Linear(narrow, shape.patch**2 * shape.channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.project.weight.data.flatten(1))

    def standardise(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    def decode(self, tokens: Tensor) -> Tensor:
        """[B, L, patch² · C] from [B, 1 + L, D']: the patches, their values in the order (row, column, channel)."""
        return self.head(self.decoder(tokens)[:, 1:])

    def forward(self, images: Tensor) -> Tensor:
        patches = self.project(self.standardise(images)).flatten(2).transpose(1, 2) + self.position
        tokens = torch.cat([self.class_token.expand(len(images), 1, -1), patches], dim=1)
        return self.encoder(tokens)[:, 1:].mean(dim=1)

    def copy(self) -> MaskedAutoencoder:
        """The same weights, in memory of their own."""
        return copy.deepcopy(self)


def build(shape: Shape, images: Tensor, seed: int) -> MaskedAutoencoder:
    """A model with random weights that depend on ``seed`` alone; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MaskedAutoencoder(shape, images)


def sines(grid: tuple[int, int], width: int) -> Tensor:
    """MAE's position table [rows · columns, width]: a quarter each of sine and cosine of the column and of the row."""
    if width % 4:
        raise ValueError(f"width must be a multiple of 4, got {width}")
    frequency = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    rows, columns = (
        places.flatten()[:, None] * frequency
        for places in torch.meshgrid(*(torch.arange(size).float() for size in grid), indexing="ij")
    )
    return torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=1)
