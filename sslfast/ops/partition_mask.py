"""A mask as lists of the kept and of the masked patches, in raster order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _backends, _library, reference
from .._checks import whole_number
from . import _devices

BACKENDS = ("cpu", "cuda", "reference")
why_not = functools.partial(_devices.why_not, "partition_mask", "mask")


def _fake(mask: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    count, patches = mask.shape
    sizes = (kept, patches - kept, patches)
    keep, masked, restore = (mask.new_empty((count, size), dtype=torch.int64) for size in sizes)
    return keep, masked, restore


_library.define("partition_mask(Tensor mask, int kept) -> (Tensor, Tensor, Tensor)", _fake)


def check_mask(mask: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise TypeError(f"mask must be [images, patches] of bool, got {tuple(mask.shape)} of {mask.dtype}")


def mask_call(
    backend: str, by_reference: Callable[[Any, int], tuple[Any, ...]], op: str, mask: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator, or the reference, which takes and gives NumPy arrays."""
    if backend == "reference":
        found = [torch.from_numpy(a).to(mask.device) for a in by_reference(mask.cpu().numpy(), size)]
    else:
        found = _library.call(op, mask, size)
    first, second, third = found
    return first, second, third


def partition_mask(mask: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the patches of a mask lie.

    Args:
        mask: [B, L] bool, True where masked.
        kept: K, how many patches every row keeps.

    Returns:
        ids of the kept patches [B, K], of the masked ones [B, L − K], and [B, L], where each patch went in the two of
        them one after the other; all int64.

    Raises:
        TypeError: the mask is no matrix of bool. ValueError: ``kept`` is out of range.
        RuntimeError: a row keeps another number. On CUDA nothing is checked, since that would wait for the device:
        ids that are missing are −1, and what is too much is left out.
    """
    check_mask(mask)
    kept = whole_number("kept", kept, 0, mask.shape[1], "patches")
    backend = _backends.serve("partition_mask", mask, "cuda", why_not)
    return mask_call(backend, reference.partition_mask, "partition_mask", mask, kept)
