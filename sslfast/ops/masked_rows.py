"""The masked tokens of a batch as one list of a fixed size."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import _backends, _library, reference
from .._checks import whole_number
from . import _devices
from .partition_mask import check_mask, mask_call

BACKENDS = ("cpu", "cuda", "reference")
why_not = functools.partial(_devices.why_not, "masked_rows", "mask")


def _fake(mask: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, count = mask.new_empty((size,), dtype=torch.int64), mask.new_empty((1,), dtype=torch.int64)
    return rows, mask.new_empty((size,), dtype=torch.float32), count


_library.define("masked_rows(Tensor mask, int size) -> (Tensor, Tensor, Tensor)", _fake)


def masked_rows(mask: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows of a [B · L, features] matrix are masked, in order, for a gather whose shape depends on no data.

    Args:
        mask: [B, L] bool, True where masked.
        size: length of the list: at least the number of masked tokens.

    Returns:
        rows: [size] int64, b · L + l of the masked tokens, then −1.
        weights: [size] float32, 1 / (masked tokens of image b), then 0: with these every image counts the same.
        count: [1] int64, the number of masked tokens.

    Raises:
        TypeError: the mask is no matrix of bool. ValueError: ``size`` is negative.
        RuntimeError: ``size`` is too small. On CUDA, where nothing waits for the device, all weights are NaN instead,
        so that a part of the sum is never taken for the whole.
    """
    check_mask(mask)
    size = whole_number("size", size, 0)
    backend = _backends.serve("masked_rows", mask, "cuda", why_not)
    return mask_call(backend, reference.masked_rows, "masked_rows", mask, size)
