"""Jigsaw puzzles: in which of a fixed set of orders the tiles of an image were laid out."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._checks import check_share, warn_of_bytes, whole_number
from .._library import kept_on_device, on_the_host
from .._random.ids import Ids, sample_ids
from .._random.key import epoch_of, seed_of
from .._random.philox import below, uniforms
from .._random.streams import stream_of
from ._draws import GREY, check_images, cut, settle, unit_scale

LEAST_DEVIATION = 1e-3  # a quarter of a grey level: a tile below it is one colour, and stays 0 rather than noise


class Puzzle(NamedTuple):
    """Shuffled tiles and the order they are in.

    Attributes:
        tiles: [B, grid², C, tile, tile]; ``tiles[:, k]`` comes from cell ``permutation[label][k]``, cells row by row.
        label: [B] int64, row of the permutation set.

    Example:
        >>> puzzle = sslfast.pretext.jigsaw(torch.rand(2, 3, 96, 96), [0, 1], tile=24, cell=30)
        >>> puzzle.label.shape
        torch.Size([2])
    """

    tiles: Tensor
    label: Tensor


@functools.lru_cache(maxsize=16)
def _permutations(count: int, tiles: int, seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """[count, tiles]. The next one taken is at the largest summed Hamming distance from those taken so far.

    Summed distance is tiles · (how many are taken) minus the summed places of agreement, so only the latter is kept,
    and each step adds the agreement with the newest alone. Ties go to the first in lexicographic order.
    """
    total = math.factorial(tiles)
    flat = itertools.chain.from_iterable(itertools.permutations(range(tiles)))
    every = np.fromiter(flat, dtype=np.uint8, count=total * tiles).reshape(total, tiles).T.copy()  # [tiles, total]
    with on_the_host():
        first = uniforms(torch.zeros(1, dtype=torch.int64), 1, seed=seed, stream=stream_of("permutations"))
        taken = [int(below(first, total))]
    agreement = np.zeros(total, dtype=np.int32)
    while len(taken) < count:
        newest = every[:, taken[-1]]
        places = np.zeros(total, dtype=np.uint8)
        for place in range(tiles):
            places += every[place] == newest[place]
        agreement += places
        agreement[taken[-1]] = np.iinfo(np.int32).max // 2  # never again
        taken.append(int(agreement.argmin()))
    return every[:, taken].T.copy()


def permutation_set(count: int, tiles: int = 9, seed: int = 0) -> Tensor:
    """Permutations far from each other: greedily, each of largest mean Hamming distance from those before it.

    Args:
        count: how many, at most ``tiles``!; 100 to 1000 in the paper.
        tiles: of how many, 2 to 9. Default 9.
        seed: chooses the first; the others follow. Default 0.

    Returns:
        [count, tiles] int64, distinct rows, on the CPU. All mean distances come out at the largest possible,
        ``(tiles − 1) · count/(count − 1)``, to a thousandth or so.

    Raises:
        ValueError: naming the argument.

    Source: Noroozi and Favaro 2016, algorithm 1.

    Example:
        >>> sslfast.pretext.permutation_set(100).shape
        torch.Size([100, 9])
    """
    tiles = whole_number("tiles", tiles, 2, 9)
    count = whole_number("count", count, 1, math.factorial(tiles))
    seed = seed_of(seed)
    with torch.inference_mode(False):
        return torch.from_numpy(_permutations(count, tiles, seed).astype(np.int64))


@kept_on_device
def _table(count: int, tiles: int, seed: int, device: torch.device) -> Tensor:
    return permutation_set(count, tiles, seed).to(device)


@dataclass(frozen=True)
class Jigsaw:
    """Tiles of images in one of a set of orders.

    A window of ``grid · cell`` pixels a side is cut at random; in each of its cells a tile at random. What would give
    neighbourhood away without looking at the content is taken out: the gaps between tiles of random width (edges that
    continue), the shifts of the colour channels and the grey images (chromatic aberration), the normalisation of
    each tile by itself (its brightness and contrast).

    Args:
        grid: cells a side, 2 or 3. Default 3.
        permutations: how many orders, i.e. classes. Default 100; 1000 in the paper's best run.
        tile: side of a tile in pixels. Default 64.
        cell: side of a cell in pixels. Default 85 (a window of 255, Goyal et al. 2019); 75 in the paper (225).
        grey_p: probability that an image is grey. Default 0.3.
        colour_shift: each channel of each tile of an image that is not grey is moved by up to so many pixels, down and
            across, but not out of its cell. Default 2.
        normalize: each tile to mean 0 and deviation 1 over its pixels and channels (default), as float32. ``False``:
            the images' dtype and scale.
        permutation_seed: of ``permutation_set``; part of what the labels mean. Default 0.
        seed: 64 bits. Default 0.

    Raises:
        ValueError: naming the argument.

    Source: Noroozi and Favaro 2016, "Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles".

    Example:
        >>> tiles, label = sslfast.pretext.Jigsaw(tile=24, cell=30)(torch.rand(2, 3, 96, 96), [0, 1])
        >>> tiles.shape
        torch.Size([2, 9, 3, 24, 24])
    """

    grid: int = 3
    permutations: int = 100
    tile: int = 64
    cell: int = 85
    grey_p: float = 0.3
    colour_shift: int = 2
    normalize: bool = True
    permutation_seed: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        settle(self, grid=whole_number("grid", self.grid, 2, 3), cell=whole_number("cell", self.cell, 1))
        settle(
            self,
            permutations=whole_number("permutations", self.permutations, 1, math.factorial(self.grid**2)),
            tile=whole_number("tile", self.tile, 1, self.cell),
            grey_p=check_share("grey_p", self.grey_p),
            colour_shift=whole_number("colour_shift", self.colour_shift, 0),
            permutation_seed=seed_of(self.permutation_seed),
        )

    def permutation_table(self, device: torch.device | str = "cpu") -> Tensor:
        """[permutations, grid²] int64: row ``label`` says which cell each tile comes from."""
        return self._table(torch.device(device)).clone()

    def _table(self, device: torch.device) -> Tensor:
        """The cached tensor itself, to be read only."""
        return _table(self.permutations, self.grid**2, self.permutation_seed, device)

    def __call__(self, images: Tensor, ids: Ids = None, *, epoch: int | None = None) -> Puzzle:
        """Puzzles of a batch.

        Args:
            images: [B, 1 or 3, H, W] with H, W ≥ grid · cell; uint8, or floating point on the scale 0 … 1.
            ids: [B], which sample each image is. Default: drawn from torch's CPU generator.
            epoch: the current epoch, below 2³². Without it every epoch repeats the same choices: default 0, with a
                warning where ids are given.

        Returns:
            ``Puzzle(tiles, label)``.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        check_images(images, (1, 3))
        warn_of_bytes(images)
        count, channels, height, width = images.shape
        side, cells = self.grid * self.cell, self.grid**2
        if min(height, width) < side:
            raise ValueError(
                f"images must be at least grid · cell = {side} pixels a side, got {height} × {width}: make cell smaller"
            )
        epoch = epoch_of(epoch, ids)
        ids = sample_ids(ids, count, images.device)
        draws = uniforms(ids, 4 + 2 * cells * (1 + channels), seed=self.seed, epoch=epoch, stream=stream_of("jigsaw"))
        label = below(draws[:, 0], self.permutations)
        grey = draws[:, 1] < self.grey_p
        window = [below(draws[:, 2 + i], size - side + 1) for i, size in enumerate((height, width))]
        slack = self.cell - self.tile
        corner = below(draws[:, 4 : 4 + 2 * cells].reshape(count, 2, cells), slack + 1)
        shift = below(draws[:, 4 + 2 * cells :].reshape(count, 2, cells, channels), 2 * self.colour_shift + 1)
        shift = (shift - self.colour_shift) * ~grey[:, None, None, None]
        inside = (corner[..., None] + shift).clamp(0, slack)  # [B, 2, cells, C]: a channel of a tile in its cell
        order = self._table(images.device)[label]  # [B, cells]
        pixel = torch.arange(self.tile, device=images.device)
        places = [
            (window[i][:, None] + cell * self.cell)[:, :, None, None] + inside[:, i, ..., None] + pixel
            for i, cell in enumerate((order // self.grid, order % self.grid))
        ]
        return Puzzle(self._finished(cut(images, places[0], places[1]), grey), label)

    def _finished(self, tiles: Tensor, grey: Tensor) -> Tensor:
        """Grey where the coin says so, and normalised."""
        pixels = unit_scale(tiles)
        if tiles.shape[2] == 3 and self.grey_p > 0:
            mixed = sum(weight * pixels[:, :, c : c + 1] for c, weight in enumerate(GREY))
            pixels = torch.where(grey[:, None, None, None, None], mixed, pixels)
        if self.normalize:
            deviation, mean = torch.std_mean(pixels, dim=(2, 3, 4), keepdim=True, correction=0)
            return (pixels - mean) / deviation.clamp_min(LEAST_DEVIATION)
        return (pixels * 255).round().to(torch.uint8) if tiles.dtype == torch.uint8 else pixels.to(tiles.dtype)


def jigsaw(images: Tensor, ids: Ids = None, *, seed: int = 0, epoch: int | None = None, **options: Any) -> Puzzle:
    """Puzzles of a batch [B, 1 or 3, H, W]; ``options`` are the arguments of :class:`Jigsaw`, which says the rest.

    Example:
        >>> tiles, label = sslfast.pretext.jigsaw(torch.rand(2, 3, 256, 256), [0, 1])
        >>> tiles.shape, label.shape
        (torch.Size([2, 9, 3, 64, 64]), torch.Size([2]))
    """
    return Jigsaw(seed=seed, **options)(images, ids, epoch=epoch)
