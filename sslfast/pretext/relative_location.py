"""Relative patch location: on which of eight sides of a patch its neighbour lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import check_share, real_number, warn_of_bytes, whole_number
from .._random.ids import Ids, sample_ids
from .._random.key import epoch_of
from .._random.philox import below, uniforms
from .._random.streams import stream_of
from ._draws import check_images, cut, settle, unit_scale

COLOURS = ("drop", "projection", "keep")
DRAWS = 13  # label; centre down, across; 2 × jitter down, across; 2 × coin, side, channel


class PatchPair(NamedTuple):
    """Two patches of each image and where the second lies as seen from the first.

    Attributes:
        first: [B, C, patch, patch] float32.
        second: [B, C, patch, patch] float32.
        label: [B] int64: 0 1 2 above, 3 left, 4 right, 5 6 7 below.

    Example:
        >>> images = torch.rand(2, 3, 96, 96)
        >>> pair = sslfast.pretext.relative_location(images, [0, 1], patch=24, gap=12, jitter=2)
        >>> pair.second.shape
        torch.Size([2, 3, 24, 24])
    """

    first: Tensor
    second: Tensor
    label: Tensor


def _taps(position: Tensor, scale: Tensor, size: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """Where bilinear interpolation reads for an output position, and with which weight; half-pixel centres."""
    source = ((position + 0.5) * scale - 0.5).clamp_min(0.0)
    low = source.floor()
    part = source - low
    return (low, 1 - part), (torch.minimum(low + 1, size - 1), part)


def _there_and_back(side: Tensor, patch: int) -> Tensor:
    """[..., patch, patch]: the matrix that resizes patch pixels to ``side`` [...] of them and back, bilinearly.

    One matrix serves rows and columns, so patches that shrink to sizes of their own are two matrix products.
    """
    pixel = torch.arange(patch, dtype=torch.float64, device=side.device)
    small = side.to(torch.float64)[..., None]  # [..., 1]
    matrix = torch.zeros((*side.shape, patch, patch), dtype=torch.float64, device=side.device)
    for middle, up in _taps(pixel, small / patch, small):
        for place, down in _taps(middle, patch / small, torch.full_like(small, patch)):
            matrix += (up * down)[..., None] * (place[..., None] == pixel)
    return matrix


@dataclass(frozen=True)
class RelativeLocation:
    """Pairs of neighbouring patches. What would give their places away without looking at the content is taken out:
    the gap and the jitter (edges that continue), the colours (chromatic aberration, which tells where in the image a
    patch lies), the lost resolution (robust to pixelation), mean and size of the values.

    Args:
        patch: side in pixels, 2 to 256. Default 96.
        gap: pixels between patches. Default 48. For smaller images scale all three: patch 24, gap 12, jitter 2 for 64
            pixels.
        jitter: each patch is moved by up to so many pixels, down and across; at most gap/2. Default 7.
        colour: ``"drop"`` (default): one channel, drawn for each patch, less its mean, and in place of the other two
            uniform noise one grey level wide, as in the released code (the paper's: Gaussian, 1/100 of the channel's
            deviation). ``"projection"``: the green-magenta axis (−1, 2, −1) is projected out. ``"keep"``: as it is.
        downsample_p: probability that a patch is shrunk and resized back, bilinearly. Default 1/3.
        least_pixels: a patch is shrunk to between so many pixels, in all, and (patch − 1)²; their number is drawn
            uniformly. Default 100.
        rms: root mean square of a patch's values in the end. Default 50, about that of bytes less their mean.
        seed: 64 bits. Default 0.

    Raises:
        ValueError: naming the argument.

    Source: Doersch et al. 2015, "Unsupervised Visual Representation Learning by Context Prediction".

    Example:
        >>> task = sslfast.pretext.RelativeLocation(patch=24, gap=12, jitter=2)
        >>> first, second, label = task(torch.rand(2, 3, 96, 96), [0, 1])
        >>> first.shape
        torch.Size([2, 3, 24, 24])
    """

    patch: int = 96
    gap: int = 48
    jitter: int = 7
    colour: str = "drop"
    downsample_p: float = 1 / 3
    least_pixels: int = 100
    rms: float = 50.0
    seed: int = 0

    def __post_init__(self) -> None:
        settle(self, patch=whole_number("patch", self.patch, 2, 256), gap=whole_number("gap", self.gap, 0))
        settle(
            self,
            jitter=whole_number("jitter", self.jitter, 0, self.gap // 2),
            downsample_p=check_share("downsample_p", self.downsample_p),
            rms=real_number("rms", self.rms),
        )
        if self.downsample_p > 0:
            settle(self, least_pixels=whole_number("least_pixels", self.least_pixels, 1, (self.patch - 1) ** 2))
        if self.colour not in COLOURS:
            raise ValueError(f"colour must be one of {', '.join(COLOURS)}, got {self.colour!r}")
        if not 0 < self.rms < float("inf"):
            raise ValueError(f"rms must be positive and finite, got {self.rms!r}")

    def __call__(self, images: Tensor, ids: Ids = None, *, epoch: int | None = None) -> PatchPair:
        """One pair from each image.

        Args:
            images: [B, C, H, W] with H, W ≥ 2·patch + gap + 2·jitter; C is 3, with ``colour="keep"`` any; uint8, or
                floating point on the scale 0 … 1.
            ids: [B], which sample each image is. Default: drawn from torch's CPU generator.
            epoch: the current epoch, below 2³². Without it every epoch repeats the same choices: default 0, with a
                warning where ids are given.

        Returns:
            ``PatchPair(first, second, label)``.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        check_images(images, None if self.colour == "keep" else (3,))
        warn_of_bytes(images)
        least = 2 * (self.patch + self.jitter) + self.gap
        if min(images.shape[2:]) < least:
            height, width = images.shape[2:]
            raise ValueError(
                f"images must be at least 2·patch + gap + 2·jitter = {least} pixels a side, got {height} × {width}: "
                "make patch and gap smaller"
            )
        epoch = epoch_of(epoch, ids)
        ids = sample_ids(ids, len(images), images.device)
        draws = uniforms(ids, DRAWS, seed=self.seed, epoch=epoch, stream=stream_of("relative_location"))
        label = below(draws[:, 0], 8)
        rows, columns = self._places(label, draws[:, 1:7], images.shape[2], images.shape[3])
        patches = unit_scale(cut(images, rows, columns))  # [B, 2, C, patch, patch]
        if self.downsample_p > 0:
            patches = self._shrunk(patches, draws[:, 7:9], draws[:, 9:11])
        patches = self._coloured(patches, draws[:, 11:13], ids, epoch)
        size = patches.square().mean(dim=(2, 3, 4), keepdim=True).sqrt()
        patches = (patches * (self.rms / size.clamp_min(1e-6))).to(torch.float32)
        return PatchPair(patches[:, 0], patches[:, 1], label)

    def _places(self, label: Tensor, draws: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Rows and columns of both patches, [B, 2, 1, patch] each: anywhere that leaves room for the jitter."""
        cell = label + (label >= 4)  # of 3 × 3, without the middle
        step, j = self.patch + self.gap, self.jitter
        pixel = torch.arange(self.patch, device=label.device)
        out = []
        for i, (toward, extent) in enumerate(((cell // 3 - 1, height), (cell % 3 - 1, width))):
            first = j + step * (toward < 0)
            last = extent - self.patch - j - step * (toward > 0)
            start = first + below(draws[:, i], last - first + 1)
            moved = below(draws[:, 2 + i :: 2], 2 * j + 1) - j  # [B, 2]
            out.append((torch.stack([start, start + step * toward], dim=1) + moved)[:, :, None, None] + pixel)
        return out[0], out[1]

    def _shrunk(self, patches: Tensor, coins: Tensor, amounts: Tensor) -> Tensor:
        """Some of them through fewer pixels and back, in float64, which autocast and TF32 do not round."""
        pixels = self.least_pixels + amounts * ((self.patch - 1) ** 2 - self.least_pixels)
        matrix = _there_and_back(pixels.sqrt().floor(), self.patch)[:, :, None]
        shrunk = (matrix @ patches.to(torch.float64) @ matrix.transpose(-1, -2)).to(patches.dtype)
        return torch.where((coins < self.downsample_p)[:, :, None, None, None], shrunk, patches)

    def _coloured(self, patches: Tensor, draws: Tensor, ids: Tensor, epoch: int) -> Tensor:
        """The colours taken out, and each channel's mean (by "drop", the kept channel's)."""
        if self.colour == "projection":
            red, green, blue = patches.unbind(2)
            projection = (2 * green - red - blue) / 6  # less x·a aᵀ/(a aᵀ), with a = (−1, 2, −1)
            patches = torch.stack([red + projection, green - 2 * projection, blue + projection], dim=2)
        centred = patches - patches.mean(dim=(3, 4), keepdim=True)
        if self.colour != "drop":
            return centred
        count, side = patches.shape[0], self.patch
        noise = uniforms(ids, 4 * side**2, seed=self.seed, epoch=epoch, stream=stream_of("color_noise"))
        noise = ((noise.reshape(count, 2, 2, side, side) - 0.5) / 255).to(patches.dtype)
        channel, kept = torch.arange(3, device=patches.device), below(draws, 3)[..., None]  # [3], [B, 2, 1]
        which = ((channel - kept - 1) % 3).clamp_max(1)[..., None, None].expand_as(patches)  # the dropped ones: 0, 1
        return torch.where((channel == kept)[..., None, None], centred, noise.gather(2, which))


def relative_location(
    images: Tensor, ids: Ids = None, *, seed: int = 0, epoch: int | None = None, **options: Any
) -> PatchPair:
    """Pairs of patches of a batch; ``options`` are the arguments of :class:`RelativeLocation`, which says the rest.

    Example:
        >>> images = torch.rand(2, 3, 96, 96)
        >>> pair = sslfast.pretext.relative_location(images, [0, 1], patch=24, gap=12, jitter=2)
        >>> pair.first.shape, pair.label.shape
        (torch.Size([2, 3, 24, 24]), torch.Size([2]))
    """
    return RelativeLocation(seed=seed, **options)(images, ids, epoch=epoch)
