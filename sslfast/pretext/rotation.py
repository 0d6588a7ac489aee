"""Rotation prediction (RotNet): which of four quarter turns an image was given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._random.ids import Ids, sample_ids
from .._random.key import epoch_of
from .._random.philox import below, uniforms
from .._random.streams import stream_of
from ._draws import check_images


class Rotated(NamedTuple):
    """Turned images and by how much.

    Attributes:
        images: [4·B or B, C, S, S], as the images were.
        labels: [4·B or B] int64: quarter turns counter-clockwise, 0 … 3.

    Example:
        >>> turned = sslfast.pretext.rotation(torch.zeros(2, 3, 32, 32), [0, 1], all_four=False)
        >>> turned.labels.shape
        torch.Size([2])
    """

    images: Tensor
    labels: Tensor


def _all_four(images: Tensor) -> Tensor:
    """[4·B, C, S, S]: the batch turned by 0, then by 1, 2 and 3 quarter turns."""
    swapped = images.transpose(2, 3)
    return torch.cat([images, swapped.flip(2), images.flip(2, 3), swapped.flip(3)])


def _turned(images: Tensor, turns: Tensor) -> Tensor:
    """Each image by its own number of quarter turns: a transposition and two mirrorings, each taken or not."""
    turns = turns[:, None, None, None]
    out = torch.where(turns % 2 == 1, images.transpose(2, 3), images)
    out = torch.where((turns == 1) | (turns == 2), out.flip(2), out)
    return torch.where(turns >= 2, out.flip(3), out)


@dataclass(frozen=True)
class Rotation:
    """:func:`rotation` with its options held.

    Args:
        all_four: all four turns of each image (default), or one drawn for each.
        seed: 64 bits. Default 0.

    Example:
        >>> images, labels = sslfast.pretext.Rotation()(torch.zeros(2, 3, 32, 32))
        >>> images.shape
        torch.Size([8, 3, 32, 32])
    """

    all_four: bool = True
    seed: int = 0

    def __call__(self, images: Tensor, ids: Ids = None, *, epoch: int | None = None) -> Rotated:
        """See :func:`rotation`."""
        check_images(images)
        count, _, height, width = images.shape
        if height != width:
            raise ValueError(
                f"images must be square, so that quarter turns stack in one batch, got {height} × {width}: crop them"
            )
        if self.all_four:
            return Rotated(_all_four(images), torch.arange(4, device=images.device).repeat_interleave(count))
        epoch = epoch_of(epoch, ids)
        ids = sample_ids(ids, count, images.device)
        labels = below(uniforms(ids, 1, seed=self.seed, epoch=epoch, stream=stream_of("rotation"))[:, 0], 4)
        return Rotated(_turned(images, labels), labels)


def rotation(
    images: Tensor, ids: Ids = None, *, all_four: bool = True, seed: int = 0, epoch: int | None = None
) -> Rotated:
    """Images turned by quarters, and how often: by transposition and mirroring, so no interpolation tells the turn.

    Args:
        images: [B, C, S, S], square, uint8 or floating point, any strides.
        ids: [B], which sample each image is; needed where one turn is drawn for each. Default: drawn from torch's CPU
            generator.
        all_four: all four turns of each image, as the paper trains (default), or one drawn for each.
        seed: 64 bits. Default 0.
        epoch: the current epoch, below 2³². Without it every epoch repeats the same turns: default 0, with a warning
            where ids are given.

    Returns:
        ``Rotated(images, labels)``. With ``all_four``, 4·B images, the whole batch by 0, then by 1, 2, 3 quarter turns;
        else B. Labels count quarter turns counter-clockwise.

    Raises:
        TypeError, ValueError: naming the argument; images that are not square, since a quarter turn of one would have
        another shape.

    Source: Gidaris et al. 2018, "Unsupervised Representation Learning by Predicting Image Rotations".

    Example:
        >>> images, labels = sslfast.pretext.rotation(torch.zeros(2, 3, 32, 32))
        >>> images.shape, labels.tolist()
        (torch.Size([8, 3, 32, 32]), [0, 0, 1, 1, 2, 2, 3, 3])
    """
    return Rotation(all_four, seed)(images, ids, epoch=epoch)
