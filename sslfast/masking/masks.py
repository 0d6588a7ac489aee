"""What a mask of patches is: which are kept, which are masked, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data._utils.collate import default_collate_fn_map

from .. import reference
from .._checks import whole_number
from .._library import towards
from ..ops.partition_mask import check_mask, partition_mask
from ._samples import Array


@dataclass(frozen=True)
class Masks:
    """Masks of B images of L patches, each with K kept and M masked ones: torch tensors, or NumPy arrays.

    A ``DataLoader`` joins those of its items to those of the batch.

    Attributes:
        ids_keep: [B, K] int64.
        ids_mask: [B, M] int64.
        ids_restore: [B, L] int64, where patch l lies in ``cat([ids_keep, ids_mask], 1)``.

    Example:
        >>> masks = sslfast.masking.random_masks([7], grid=4, ratio=0.5)
        >>> masks.ids_keep.shape, masks.mask.sum().item()
        (torch.Size([1, 2]), 2)
    """

    ids_keep: Any
    ids_mask: Any
    ids_restore: Any

    @property
    def mask(self) -> Any:
        """[B, L] bool, True where masked."""
        return self.ids_restore >= self.ids_keep.shape[1]

    def to(self, device: torch.device | str) -> Masks:
        """The same as tensors on ``device``; copies of pinned memory to a GPU do not wait."""
        arrays = (self.ids_keep, self.ids_mask, self.ids_restore)
        return Masks(*(towards(a if isinstance(a, Tensor) else torch.from_numpy(a), device) for a in arrays))

    def pin_memory(self) -> Masks:
        """Copies in pinned memory, for ``DataLoader(pin_memory=True)``."""
        return Masks(*(torch.as_tensor(a).pin_memory() for a in (self.ids_keep, self.ids_mask, self.ids_restore)))

    @classmethod
    def from_mask(cls, mask: Tensor | Array, kept: int | None = None) -> Masks:
        """From a mask, ids in raster order.

        Args:
            mask: [B, L] bool, True where masked; every row masks the same number.
            kept: how many patches each row keeps. Default: counted in the first row, on the CPU alone, since on CUDA
                that would wait for the device.

        Raises:
            TypeError, ValueError: the mask is no matrix of bool, or ``kept`` is missing or out of range.
            RuntimeError: a row keeps another number (CPU; on CUDA see ``sslfast.ops.partition_mask``).
        """
        if isinstance(mask, np.ndarray):
            if mask.ndim != 2 or mask.dtype != np.bool_:
                raise TypeError(f"mask must be [images, patches] of bool, got {mask.shape} of {mask.dtype}")
            kept = _first_row(mask) if kept is None else whole_number("kept", kept, 0, mask.shape[1], "patches")
            return cls(*reference.partition_mask(mask, kept))
        check_mask(mask)
        if kept is None and not mask.is_cpu:
            raise ValueError(f"kept must be given for a mask on {mask.device}: counting it would wait for the device")
        return cls(*partition_mask(mask, _first_row(mask) if kept is None else kept))


def _joined(batch: Sequence[Masks], *, collate_fn_map: Any = None) -> Masks:
    """The masks of several images, or batches of them, as those of one batch of tensors."""
    fields = ("ids_keep", "ids_mask", "ids_restore")
    return Masks(*(torch.cat([torch.as_tensor(getattr(masks, field)) for masks in batch]) for field in fields))


default_collate_fn_map[Masks] = _joined  # so that a DataLoader takes a data set whose items hold them


def _first_row(mask: Any) -> int:
    if len(mask) == 0:
        raise ValueError("kept must be given for a mask of no images")
    return int((~mask[0]).sum())
