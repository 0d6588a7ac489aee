"""Which sample each image is: what random numbers are keyed by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .._library import towards

Ids = Sequence[int] | Tensor | int | None


def sample_ids(ids: Ids, count: int, device: torch.device) -> Tensor:
    """[count] int64 on ``device``; drawn from torch's CPU generator where there are none.

    Raises:
        TypeError, ValueError: ids are not whole numbers of 64 bits, or not as many as the images.
    """
    if ids is None:
        given = torch.randint(2**63 - 1, (count,), device="cpu")
    else:
        given = ids if isinstance(ids, Tensor) else _from_host(ids)
    if given.numel() != count:
        raise ValueError(f"ids must be as many as the images, {count}, got {given.numel()}")
    # An empty list has no type: NumPy takes it for floats.
    if count and (given.dtype.is_floating_point or given.dtype.is_complex or given.dtype == torch.bool):
        raise TypeError(f"ids must be whole numbers below 2^63, got {given.dtype}")
    return towards(given.reshape(-1).to(torch.int64), device)


def _from_host(ids: Sequence[int] | int) -> Tensor:
    """Of the type that the numbers have, so that what is not a whole number is seen and not truncated."""
    try:
        numbers = np.array(ids, ndmin=1)
        tensor = torch.from_numpy(numbers)
    except (TypeError, ValueError) as error:
        raise TypeError(f"ids must be whole numbers below 2^63, got {type(ids).__name__}: {error}") from error
    if numbers.dtype == np.uint64 and bool((numbers >= 2**63).any()):
        raise ValueError("ids must be whole numbers below 2^63, got larger ones")
    return tensor
