"""What the generators of masks take alike: whose random numbers are drawn, and the grid of patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import is_whole, whole_each
from .._random.ids import sample_ids
from .._random.key import epoch_of

Array = np.ndarray[Any, np.dtype[Any]]
Samples = int | Tensor | Sequence[int] | Array
Grid = int | Sequence[int]


def as_samples(samples: Samples, device: torch.device | str | None) -> Tensor | Array:
    """[B] int64: a NumPy array from one, else a tensor on ``device`` (default: where it is, else the CPU).

    Raises:
        TypeError, ValueError: samples are neither a number of images nor a vector of whole numbers below 2^63.
    """
    if isinstance(samples, np.ndarray):
        if samples.ndim != 1 or samples.dtype.kind not in "iu":
            raise TypeError(f"samples must be a vector of whole numbers, got {samples.shape} of {samples.dtype}")
        if device is not None:
            raise TypeError(f"device is for tensors; samples is a NumPy array, and device is {device}")
        if samples.dtype == np.uint64 and (samples >= np.uint64(2**63)).any():
            raise ValueError("samples must be whole numbers below 2^63, got larger ones")
        return samples.astype(np.int64)
    if isinstance(samples, Tensor):
        if samples.dim() != 1:
            raise TypeError(f"samples must be a vector of whole numbers, got shape {tuple(samples.shape)}")
        return sample_ids(samples, samples.shape[0], samples.device if device is None else torch.device(device))
    place = torch.device("cpu" if device is None else device)
    if is_whole(samples):
        if samples < 0:
            raise ValueError(f"samples must be a number of images or their ids, got {samples}")
        return sample_ids(None, int(samples), place)
    if not isinstance(samples, Sequence):
        raise TypeError(f"samples must be a number of images or a vector of ids, got {type(samples).__name__}")
    return sample_ids(samples, len(samples), place)


def as_tensor(ids: Tensor | Array) -> Tensor:
    """What ``as_samples`` gives, for torch's operators; it shares memory."""
    return torch.from_numpy(ids) if isinstance(ids, np.ndarray) else ids


def like_samples(ids: Tensor | Array, *results: Tensor) -> tuple[Any, ...]:
    """Results as the samples are: arrays for arrays."""
    return tuple(x.numpy() if isinstance(ids, np.ndarray) else x for x in results)


def epoch_for(epoch: int | None, samples: Samples) -> int:
    """``epoch``, or 0 where none was given, with a warning if the samples have ids."""
    return epoch_of(epoch, None if is_whole(samples) else samples)


def rectangle(grid: Grid) -> tuple[int, int]:
    """(height, width) of a grid that is that, or the side of a square.

    Raises:
        ValueError: it is something else, or a side is no whole number.
    """
    height, width = whole_each("grid", grid, 2, "(height, width) or the side of a square")
    return height, width
