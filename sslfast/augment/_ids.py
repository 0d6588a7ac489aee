"""Which sample each image is: what random numbers are keyed by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Ids = Sequence[int] | Tensor | int | None


def towards(x: Tensor, device: torch.device | str) -> Tensor:
    """``x`` on ``device``; the copy is waited for only where the host is to read it."""
    return x.to(device, non_blocking=torch.device(device).type != "cpu")


def sample_ids(ids: Ids, count: int, device: torch.device) -> Tensor:
    """[count] int64 on ``device``; drawn from torch's CPU generator where there are none.

    Raises:
        TypeError, ValueError: ids are not whole numbers of 64 bits, or not as many as the images.
    """
    if ids is None:
        ids = torch.randint(2**63 - 1, (count,))
    elif not isinstance(ids, Tensor):
        array = np.array(ids, ndmin=1)
        if array.dtype.kind not in "iu" or array.dtype == np.uint64 and array.size and array.max() >= 2**63:
            raise TypeError(f"ids must be whole numbers below 2^63, got {ids!r}")
        ids = torch.from_numpy(array.astype(np.int64))
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"ids must be whole numbers, got {ids.dtype}")
    if ids.numel() != count:
        raise ValueError(f"ids must be as many as the images, {count}, got {ids.numel()}")
    return towards(ids.reshape(-1).to(torch.int64), device)
