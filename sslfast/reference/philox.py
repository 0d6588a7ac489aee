"""Philox4x32-10 and an exponential in NumPy: the same bits as the kernels' (``csrc/common/philox.h``, ``exact.h``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Words = np.ndarray[Any, np.dtype[np.uint64]]
LOW = np.uint64(0xFFFFFFFF)


def philox4x32(counter: Sequence[Any], key: Sequence[int]) -> tuple[Words, ...]:
    """Four random words for each counter (four words each), by Salmon et al., SC 2011."""
    c0, c1, c2, c3 = (np.asarray(c).astype(np.uint64) & LOW for c in counter)
    k0, k1 = (int(k) for k in key)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & LOW,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & LOW,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def exponential(x: float) -> float:
    """eˣ by operations that round alike on every machine, to about one unit in the last place."""
    n = float(np.rint(x * 1.4426950408889634074))
    r = x - n * float.fromhex("0x1.62e42fefa0000p-1")
    r = r - n * float.fromhex("0x1.cf79abc9e3b3ap-40")
    total = 1.0
    for k in range(14, 0, -1):
        total = 1.0 + total * (r / k)
    return math.ldexp(total, int(n))
