"""Inpainting (context encoders): what was in the hole."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import check_share, is_real, real_number, real_numbers, warn_of_bytes, whole_number
from .._random.ids import Ids, sample_ids
from .._random.key import epoch_of
from .._random.philox import BLOCKS, below, uniforms
from .._random.streams import stream_of
from ..augment.spec import IMAGENET_MEAN
from ._draws import check_images, settle

HOLES = ("centre", "blocks", "region")
FRACTION = 12  # bits behind the point of interpolation weights
COARSE = 0.13  # the region's noise has a value every so many shorter sides: 1/0.06 pixels of 128 in the released code


class Inpainted(NamedTuple):
    """Images with a hole, the hole, and what was there.

    Attributes:
        images: [B, C, H, W] as the images were, the hole filled.
        mask: [B, 1, H, W] bool, true in the hole.
        target: [B, C, H, W], the images.
        weight: [B, 1, H, W] float32 of the reconstruction: 1 in the hole, more in the band around it, 0 elsewhere.

    Example:
        >>> found = sslfast.pretext.inpainting(torch.rand(2, 3, 32, 32), [0, 1])
        >>> found.target.shape
        torch.Size([2, 3, 32, 32])
    """

    images: Tensor
    mask: Tensor
    target: Tensor
    weight: Tensor


def _centre(count: int, height: int, width: int, share: float, device: torch.device) -> Tensor:
    """[B, H, W]: a rectangle in the middle, of the image's shape."""
    inside = []
    for size in (height, width):
        hole = max(1, round(size * math.sqrt(share)))
        pixel = torch.arange(size, device=device)
        inside.append((pixel >= (size - hole) // 2) & (pixel < (size - hole) // 2 + hole))
    return (inside[0][:, None] & inside[1]).expand(count, height, width)


def _blocks(draws: Tensor, height: int, width: int, share: float) -> Tensor:
    """[B, H, W]: rectangles that may overlap, each of at most A = share · H · W / blocks pixels, from ``draws``
    [B, blocks, 3]. Heights lie between √(A/2) and √(2A) but are at most H, and widths are what the area leaves. Whole
    numbers all along.
    """
    area = int(share * height * width) // draws.shape[1]
    most = min(height, math.isqrt(2 * area))
    least = min(most, max(1, math.isqrt(area // 2)))
    tall = least + below(draws[..., 0], most - least + 1)
    wide = (area // tall).clamp(1, width)
    inside = []
    for i, (extent, size) in enumerate(((tall, height), (wide, width))):
        begin = below(draws[..., 1 + i], size - extent + 1)[..., None]
        pixel = torch.arange(size, device=draws.device)
        inside.append((pixel >= begin) & (pixel < begin + extent[..., None]))  # [B, blocks, size]
    return (inside[0][:, :, :, None] & inside[1][:, :, None, :]).any(1)


def _cubic(offset: Tensor, size: int, step: int) -> tuple[Tensor, list[Tensor]]:
    """For pixels offset, offset + 1, …: [B, size], the first of four noise values, and four weights (Catmull–Rom,
    a = −1/2), as whole numbers times 2^FRACTION."""
    place = offset[:, None] + torch.arange(size, device=offset.device)
    t, s = place % step, step
    twice = (
        2 * t**2 * s - t * s**2 - t**3,
        2 * s**3 - 5 * t**2 * s + 3 * t**3,
        t * s**2 + 4 * t**2 * s - 3 * t**3,
        t**3 - t**2 * s,
    )
    return place // step, [(w << FRACTION) // (2 * s**3) for w in twice]


def _region(ids: Tensor, seed: int, epoch: int, height: int, width: int, share: float) -> Tensor:
    """[B, H, W]: the ``share`` of pixels where smooth noise is highest; see :class:`Inpainting`."""
    step = max(2, round(COARSE * min(height, width)))
    high, wide = ((size + step - 2) // step + 4 for size in (height, width))  # values that pixels can reach
    if 2 + high * wide > 4 * BLOCKS:
        raise ValueError(
            f"images must be less elongated for hole='region', whose noise has at most {4 * BLOCKS} values, "
            f"got {height} × {width}, which would take {2 + high * wide}: crop them"
        )
    draws = uniforms(ids, 2 + high * wide, seed=seed, epoch=epoch, stream=stream_of("region"))
    noise = below(draws[:, 2:], 2**16).reshape(-1, high, wide) - 2**15
    row, down = _cubic(below(draws[:, 0], step), height, step)
    column, across = _cubic(below(draws[:, 1], step), width, step)
    lines = functools.reduce(  # [B, H, wide]
        torch.add, (noise.gather(1, (row + k)[:, :, None].expand(-1, -1, wide)) * down[k][:, :, None] for k in range(4))
    )
    smooth = functools.reduce(
        torch.add,
        (lines.gather(2, (column + k)[:, None, :].expand(-1, height, -1)) * across[k][:, None] for k in range(4)),
    )
    # Whole numbers, below 2^41 in size, and no two alike once the pixel's number stands behind: so the highest are
    # the same pixels on every device.
    pixels = height * width
    rank = (smooth.flatten(1) >> 6) * pixels + torch.arange(pixels, device=ids.device)
    chosen = rank.topk(max(1, round(share * pixels)), dim=1, sorted=False).indices
    mask = torch.zeros(rank.shape, dtype=torch.bool, device=ids.device)
    return mask.scatter_(1, chosen, True).view(-1, height, width)


@dataclass(frozen=True)
class Inpainting:
    """Images with a hole in them.

    Args:
        hole: ``"centre"`` (default): the middle. ``"blocks"``: several rectangles that may overlap. ``"region"``: an
            arbitrary shape that no image has to do with, so that its border is no cue: uniform noise, one value every
            13 % of the shorter side, at a random offset, interpolated bicubically, and of that the highest pixels,
            exactly as many as ``share`` says (the released code puts a threshold to such noise, and draws again until
            20 to 30 % of the pixels are below it).
        share: of the image, for ``"blocks"`` at most. Default 1/4.
        blocks: how many rectangles. Default 5.
        overlap: width in pixels of a band around the hole that is seen, and to be predicted too, with
            ``overlap_weight``. Default 0: none; 7 in the paper.
        overlap_weight: Default 10, the paper's.
        fill: what the hole is filled with, on the scale 0 … 1: one number, or one a channel. Default: ImageNet's mean
            (three channels only).
        seed: 64 bits. Default 0.

    Raises:
        ValueError: naming the argument.

    Source: Pathak et al. 2016, "Context Encoders: Feature Learning by Inpainting".

    Example:
        >>> found = sslfast.pretext.Inpainting(hole="region")(torch.rand(2, 3, 32, 32), [0, 1])
        >>> found.mask.float().mean().item()
        0.25
    """

    hole: str = "centre"
    share: float = 0.25
    blocks: int = 5
    overlap: int = 0
    overlap_weight: float = 10.0
    fill: float | Sequence[float] = IMAGENET_MEAN
    seed: int = 0

    def __post_init__(self) -> None:
        if self.hole not in HOLES:
            raise ValueError(f"hole must be one of {', '.join(HOLES)}, got {self.hole!r}")
        fill = real_numbers("fill", self.fill)
        settle(
            self,
            share=check_share("share", self.share),
            blocks=whole_number("blocks", self.blocks, 1, 4 * BLOCKS // 3),  # three draws each
            overlap=whole_number("overlap", self.overlap, 0),
            overlap_weight=real_number("overlap_weight", self.overlap_weight),
            fill=fill[0] if is_real(self.fill) else fill,
        )
        if not 0 <= self.overlap_weight < math.inf:
            raise ValueError(f"overlap_weight must be finite and not negative, got {self.overlap_weight!r}")

    def __call__(self, images: Tensor, ids: Ids = None, *, epoch: int | None = None) -> Inpainted:
        """Holes in a batch.

        Args:
            images: [B, C, H, W], uint8, or floating point on the scale 0 … 1; fewer than 2^22 pixels.
                With ``"region"``, the longer side at most some 2000 times the shorter.
            ids: [B], which sample each image is. Default: drawn from torch's CPU generator.
            epoch: the current epoch, below 2³². Without it every epoch repeats the same choices: default 0, with a
                warning where ids are given.

        Returns:
            ``Inpainted(images, mask, target, weight)``; the target is the very tensor that was passed.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        check_images(images)
        warn_of_bytes(images)
        height, width = images.shape[2:]
        pixels = height * width
        if pixels >= 2**22:
            raise ValueError(f"images must have fewer than 2^22 pixels, got {height} × {width}")
        least = self.blocks if self.hole == "blocks" else 1
        if not self.share * pixels >= least:
            raise ValueError(
                f"share must leave at least {least} of the image's {height} × {width} pixels, got {self.share!r}"
            )
        fill = self._fill(images)
        mask = self._mask(images, ids, epoch)[:, None]
        weight = mask.to(torch.float32)
        if self.overlap > 0:
            around = F.max_pool2d(weight, 2 * self.overlap + 1, stride=1, padding=self.overlap)
            weight = weight + self.overlap_weight * (around - weight)
        return Inpainted(torch.where(mask, fill, images), mask, images, weight)

    def _mask(self, images: Tensor, ids: Ids, epoch: int | None) -> Tensor:
        count, _, height, width = images.shape
        if self.hole == "centre":
            return _centre(count, height, width, self.share, images.device)
        epoch = epoch_of(epoch, ids)
        ids = sample_ids(ids, count, images.device)
        if self.hole == "region":
            return _region(ids, self.seed, epoch, height, width, self.share)
        draws = uniforms(ids, 3 * self.blocks, seed=self.seed, epoch=epoch, stream=stream_of("inpainting"))
        return _blocks(draws.view(count, self.blocks, 3), height, width, self.share)

    def _fill(self, images: Tensor) -> Tensor:
        channels = images.shape[1]
        values = (self.fill,) * channels if isinstance(self.fill, float) else tuple(self.fill)
        if len(values) != channels:
            raise ValueError(f"fill must be one number or one a channel, {channels}, got {self.fill!r}")
        if images.dtype == torch.uint8:
            values = tuple(round(255 * value) for value in values)
        # Filled number by number: a tensor made of a list would have to be copied to the device, and waited for.
        return torch.stack([images.new_full((), value) for value in values])[:, None, None]


def inpainting(
    images: Tensor, ids: Ids = None, *, seed: int = 0, epoch: int | None = None, **options: Any
) -> Inpainted:
    """Holes in a batch [B, C, H, W]; ``options`` are the arguments of :class:`Inpainting`, which says the rest.

    Example:
        >>> found = sslfast.pretext.inpainting(torch.rand(2, 3, 32, 32), [0, 1])
        >>> found.images.shape, found.mask.float().mean().item()
        (torch.Size([2, 3, 32, 32]), 0.25)
    """
    return Inpainting(seed=seed, **options)(images, ids, epoch=epoch)
