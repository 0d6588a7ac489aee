"""A mask as lists of its patches, in NumPy."""

from __future__ import annotations

import numpy as np

from .random_mask import Array


def partition_mask(mask: Array, kept: int) -> tuple[Array, Array, Array]:
    """ids of kept and masked patches and where each patch went: see ``sslfast.ops.partition_mask``."""
    kept_of = (~mask).sum(axis=1)
    wrong = np.flatnonzero(kept_of != kept)
    if len(wrong):
        raise RuntimeError(
            f"sslfast: mask must keep the same number of patches in every row, {kept}, but row {wrong[0]} keeps "
            f"{kept_of[wrong[0]]}"
        )
    ids = np.argsort(mask, axis=1, kind="stable")
    return ids[:, :kept], ids[:, kept:], np.argsort(ids, axis=1)
