"""Sampling of augmentation parameters: Philox4x32-10 keyed by seed, with (draw, view, epoch, sample id) as its counter.

No state: the same (seed, epoch, view, sample) gives the same parameters on every device, in every batch, worker and
rank, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _backends, _library, reference
from .._checks import readable, whole_number
from .._random.key import key_of
from . import _devices

BACKENDS = ("cpu", "cuda", "reference")
why_not = functools.partial(_devices.why_not, "view_params", "ids")
# In the order of `enum Column` in csrc/common/view_params.h.
COLUMNS = (
    "top",
    "left",
    "height",
    "width",
    "flip",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "order0",
    "order1",
    "order2",
    "order3",
    "grey",
    "sigma",
    "solarize",
)
NUMBERS = 24  # kViewNumbers
MOST_SIDE = 2**24 - 1  # a float32 parameter holds no larger whole number


def _fake(
    ids: Tensor, sizes: Tensor | None, size: Sequence[int], seed: int, epoch: int, view: int, numbers: Sequence[float]
) -> Tensor:
    return ids.new_empty((len(numbers) // NUMBERS, ids.shape[0], len(COLUMNS)), dtype=torch.float32)


_library.define(
    "view_params(Tensor ids, Tensor? sizes, int[] size, int seed, int epoch, int view, float[] numbers) -> Tensor",
    _fake,
)


def _check_sides(sizes: Tensor) -> None:
    for side in (int(sizes.min()), int(sizes.max())):
        whole_number("size", side, 1, MOST_SIDE)


def view_params(
    ids: Tensor,
    size: tuple[int, int] | Tensor,
    numbers: Sequence[Sequence[float]],
    *,
    seed: int = 0,
    epoch: int = 0,
    view: int = 0,
) -> Tensor:
    """Draw the parameters of V views of B images.

    Args:
        ids: [B] int64: which sample each image is, such as its index in the dataset.
        size: (height, width) of every image, or [B, 2] int64 on ``ids``' device.
        numbers: V times what ``ViewSpec.numbers()`` gives.
        seed: any 64-bit whole number. Default 0.
        epoch: 0 to 2³² − 1. Default 0.
        view: number of the first of the views, up to 2¹⁶ − V. Default 0.

    Returns:
        [V, B, 16] float32, columns ``COLUMNS``; see ``sslfast.augment.ViewParams``.

    Raises:
        TypeError, ValueError: ids are not a vector of int64, a size is not positive, or a number is out of range.
    """
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 1:
        got = f"{tuple(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids must be a vector of int64, got {got}")
    seed, epoch, view = key_of(seed, epoch, view, 2**16 - len(numbers) + 1)
    if isinstance(size, Tensor):
        if size.shape != (len(ids), 2) or size.dtype != torch.int64 or size.device != ids.device:
            raise ValueError(
                f"size must be [{len(ids)}, 2] of int64 on {ids.device}, got {tuple(size.shape)} of {size.dtype} on "
                f"{size.device}"
            )
        if len(ids) and readable(size):
            _check_sides(size)
    else:
        size = (whole_number("size", size[0], 1, MOST_SIDE), whole_number("size", size[1], 1, MOST_SIDE))
    flat = [number for of_view in numbers for number in of_view]
    sizes, fixed = (size, []) if isinstance(size, Tensor) else (None, list(size))
    backend = _backends.serve("view_params", ids, "cuda", why_not)
    if backend == "reference":
        return reference.view_params(ids, size, numbers, seed=seed, epoch=epoch, view=view)
    return _library.call("view_params", ids, sizes, fixed, seed, epoch, view, flat)
