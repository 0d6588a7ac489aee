"""The masked tokens of a batch as one list, in NumPy."""

from __future__ import annotations

import numpy as np

from .random_mask import Array


def masked_rows(mask: Array, size: int) -> tuple[Array, Array, Array]:
    """rows, weights and count: see ``sslfast.ops.masked_rows``."""
    found = np.flatnonzero(mask)
    if len(found) > size:
        raise RuntimeError(f"sslfast: size must be at least the number of masked tokens, {len(found)}, got {size}")
    rows, weights = np.full(size, -1), np.zeros(size, dtype=np.float32)
    rows[: len(found)] = found
    of_image = np.broadcast_to(mask.sum(axis=1, keepdims=True), mask.shape)[mask]
    weights[: len(found)] = np.float32(1) / of_image.astype(np.float32)
    return rows, weights, np.array([len(found)])
