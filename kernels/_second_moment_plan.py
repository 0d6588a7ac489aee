"""By which products second_moment is computed: the library's or tiles', by a count of launches, operations and bytes.

The numbers are predictions from published peaks and from counts, not measurements; ``docs/second_moment.md`` has the
model and what follows from it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import INTERPRETER, architecture, dot_precision
from .second_moment_columns import Options

# Seconds that a CPU needs for a launch: of one of PyTorch's operators, and of a Triton kernel.
OPERATOR, LAUNCH = 6e-6, 20e-6
# Operations a second of products, (the library's, tiles'), by architecture: of 16-bit numbers, of float32 in TF32, of
# float32 as exact as float32 is. The library multiplies float32 numbers one by one, tiles in three products of TF32.
RATES = {
    80: ((250e12, 150e12), (110e12, 70e12), (17e12, 23e12)),
    86: ((60e12, 45e12), (28e12, 18e12), (28e12, 6e12)),
    90: ((650e12, 200e12), (330e12, 100e12), (55e12, 33e12)),
    100: ((1500e12, 300e12), (700e12, 150e12), (65e12, 50e12)),
}
# Bytes a second of memory.
BANDWIDTH = {80: 1.5e12, 86: 0.8e12, 90: 3e12, 100: 6e12}


def seconds(a: Tensor, options: Options, views: int, whole: bool) -> tuple[float, float]:
    """Predicted time of a step's products, forward and backward: (the library's, tiles').

    Args:
        a: [N, D]; views: 1 or 2 batches.
        whole: M or G is kept from forward to backward; else it is computed again, a band at a time.
    """
    (n, d), gpu = a.shape, architecture(a)
    gpu = 90 if gpu == INTERPRETER else gpu
    kind = 0 if a.element_size() == 2 else 2 if dot_precision(a.dtype) == "tf32x3" else 1
    library_rate, tile_rate = RATES[gpu][kind]
    matrices = 1 if options.cross and not options.dual else views
    side = n if options.dual else d
    operations = 2.0 * n * d * side  # of one full product
    half = 1.0 if options.cross and not options.dual else 0.5
    recomputed = 0 if whole else views
    library = matrices * (1.0 if whole else half) + views + recomputed
    tiles = matrices * half + views + recomputed
    # Of an M that is not kept, bands go through memory, which tiles need in the backward alone.
    entries = 0.0 if whole else 8.0 * d * d
    return (
        OPERATOR * (1 + views) + library * operations / library_rate + entries * 2 * views / BANDWIDTH[gpu],
        LAUNCH * (1 + views) + tiles * operations / tile_rate + entries * views / BANDWIDTH[gpu],
    )


def by_library(a: Tensor, options: Options, views: int, whole: bool) -> bool:
    """Whether the library multiplies; never where the user asked for deterministic algorithms alone.

    The library is deterministic as well, as long as one stream is in use; but under that setting PyTorch refuses its
    products on a GPU unless a variable of the environment says so too.
    """
    if a.is_cuda and torch.are_deterministic_algorithms_enabled():
        return False
    library, tiles = seconds(a, options, views, whole)
    return library <= tiles
