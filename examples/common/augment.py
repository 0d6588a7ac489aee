"""Random views of a whole batch in plain PyTorch: one affine resampling, then intensities.

Every random number comes from the generator that is passed in, so a seed fixes all views.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from .data import Dataset


@dataclass(frozen=True)
class Augment:
    """How views are drawn: call it with a batch and a generator.

    Attributes:
        size: height and width of a view.
        rotation: largest angle, degrees.
        zoom: smallest and largest side of the crop, as a part of the image's side (above 1 the crop reaches outside).
        stretch: largest ratio of the crop's sides, as a factor.
        shift: largest displacement of the crop, as a part of the image's side.
        shear: largest tangent of the horizontal shear.
        mirror: flip half of the views left to right.
        contrast: relative range of the contrast; brightness varies by half of it, additively.
        blur: probability of a 3 × 3 binomial blur.
        noise: largest standard deviation of the added noise (each view draws its own).
        colour: strength of the change of saturation, and of each channel's gain; no effect on one channel.
        padding: what lies outside the image, as in ``grid_sample``.
    """

    size: int
    rotation: float
    zoom: tuple[float, float]
    stretch: float
    shift: float
    shear: float
    mirror: bool
    contrast: float
    blur: float
    noise: float
    colour: float
    padding: str

    @torch.no_grad()
    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """One view of each image.

        Args:
            images: [B, C, H, W] float32 in [0, 1].
            generator: the source of all randomness.

        Returns:
            [B, C, size, size] float32; noise may leave [0, 1].
        """
        b, c = images.shape[:2]

        def uniform(low: float, high: float) -> Tensor:
            return torch.empty(b).uniform_(low, high, generator=generator)

        grid = F.affine_grid(self._matrix(uniform), [b, c, self.size, self.size], align_corners=False)
        x = F.grid_sample(images, grid, mode="bilinear", padding_mode=self.padding, align_corners=False)
        if c == 3:
            x = self._recolour(x, generator)
        gain = uniform(1 - self.contrast, 1 + self.contrast).view(b, 1, 1, 1)
        offset = uniform(-self.contrast / 2, self.contrast / 2).view(b, 1, 1, 1)
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        x = (x - mean) * gain + mean + offset
        x = torch.where(uniform(0, 1).view(b, 1, 1, 1) < self.blur, _binomial_blur(x), x)
        sigma = uniform(0, self.noise).view(b, 1, 1, 1)
        return x + sigma * torch.empty_like(x).normal_(generator=generator)

    def _matrix(self, uniform: Callable[[float, float], Tensor]) -> Tensor:
        """[B, 2, 3] affine maps from output to input coordinates: shift ∘ rotation ∘ shear ∘ scaling."""
        angle = uniform(-self.rotation, self.rotation) * (math.pi / 180)
        side = uniform(*self.zoom)
        ratio = torch.exp(uniform(-math.log(self.stretch), math.log(self.stretch)) / 2)
        width, height = side * ratio, side / ratio
        if self.mirror:
            width = torch.where(uniform(0, 1) < 0.5, -width, width)
        shear = uniform(-self.shear, self.shear)
        cos, sin = angle.cos(), angle.sin()
        # Coordinates run over [-1, 1], a length of 2: hence the factor of the shift.
        dx, dy = 2 * uniform(-self.shift, self.shift), 2 * uniform(-self.shift, self.shift)
        first = torch.stack([cos * width, (cos * shear - sin) * height, dx], dim=1)
        second = torch.stack([sin * width, (sin * shear + cos) * height, dy], dim=1)
        return torch.stack([first, second], dim=1)

    def _recolour(self, x: Tensor, generator: Generator) -> Tensor:
        """Saturation of all views, a gain of each channel, and one view in five without colour. x: [B, 3, H, W]."""
        draw = torch.empty(len(x), 5, 1, 1).uniform_(-1, 1, generator=generator)
        grey = x.mean(dim=1, keepdim=True)
        saturation = (1 + self.colour * draw[:, :1]).clamp_min(0)
        saturation = torch.where(draw[:, 1:2] < -0.6, 0.0, saturation)  # P(draw < −0.6) = 1/5
        return (grey + (x - grey) * saturation) * (1 + self.colour / 2 * draw[:, 2:])


def _binomial_blur(x: Tensor) -> Tensor:
    """[1 2 1]/4 along both axes of x [B, C, H, W], with the edge repeated."""
    for dim in (2, 3):
        length = x.shape[dim]
        before = torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 0, length - 1)], dim)
        after = torch.cat([x.narrow(dim, 1, length - 1), x.narrow(dim, length - 1, 1)], dim)
        x = x / 2 + (before + after) / 4
    return x


def recipe_for(data: Dataset) -> Augment:
    """The views that suit ``data``: small affine changes of drawings on black, strong crops and colours of photos."""
    if data.photos:
        return Augment(
            size=data.view_size, rotation=10, zoom=(0.35, 1.0), stretch=4 / 3, shift=0.12, shear=0.0,
            mirror=data.mirror, contrast=0.4, blur=0.3, noise=0.05, colour=0.6, padding="reflection",
        )  # fmt: skip
    return Augment(
        size=data.view_size, rotation=15, zoom=(0.7, 1.2), stretch=4 / 3, shift=0.1, shear=0.2,
        mirror=data.mirror, contrast=0.4, blur=0.3, noise=0.15, colour=0.0, padding="zeros",
    )  # fmt: skip
