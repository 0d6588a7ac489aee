"""Tile sizes of NT-Xent's kernels, by architecture, element size and number of features.

Chosen so that ptxas spills no register and shared memory fits (tests/gpu/test_triton_aot.py).
"""

from __future__ import annotations

from dataclasses import replace

import triton

from ._common import INTERPRETER, Config

# (architecture, bytes of an element, D > NARROW[bytes]) -> tiles. A narrow D is one product of next_power_of_2(D)
# features, so block_k is an upper limit there, as block_d is everywhere. The forward needs block_n to divide block_m.
NARROW = {2: 128, 4: 32}
FORWARD = {
    (80, 2, False): Config(128, 64, 128, 8, 2),
    (80, 2, True): Config(128, 64, 32, 8, 4),
    (80, 4, False): Config(64, 64, 32, 4, 2),
    (80, 4, True): Config(64, 32, 32, 8, 3),
    (86, 2, False): Config(128, 64, 128, 8, 2),
    (86, 2, True): Config(128, 64, 32, 8, 4),
    (86, 4, False): Config(64, 64, 32, 4, 2),
    (86, 4, True): Config(64, 32, 32, 8, 3),
    (90, 2, False): Config(128, 64, 128, 4, 2),
    (90, 2, True): Config(128, 128, 64, 8, 3),
    (90, 4, False): Config(64, 64, 32, 4, 2),
    (90, 4, True): Config(64, 64, 32, 4, 3),
    (100, 2, False): Config(128, 64, 128, 8, 2),
    (100, 2, True): Config(128, 64, 64, 8, 3),
    (100, 4, False): Config(64, 64, 32, 4, 2),
    (100, 4, True): Config(64, 64, 32, 4, 3),
    (INTERPRETER, 2, False): Config(64, 32, 128, 4, 1),
    (INTERPRETER, 2, True): Config(64, 64, 128, 4, 1),
    (INTERPRETER, 4, False): Config(64, 32, 32, 4, 1),
    (INTERPRETER, 4, True): Config(64, 64, 128, 4, 1),
}
BACKWARD = {
    (80, 2, False): Config(64, 64, 128, 4, 2, 128),
    (80, 2, True): Config(64, 64, 64, 8, 3, 256),
    (80, 4, False): Config(64, 32, 32, 4, 2, 32),
    (80, 4, True): Config(64, 16, 32, 8, 3, 128),
    (86, 2, False): Config(64, 64, 128, 4, 2, 128),
    (86, 2, True): Config(64, 64, 64, 8, 3, 256),
    (86, 4, False): Config(64, 32, 32, 4, 2, 32),
    (86, 4, True): Config(64, 32, 32, 8, 3, 128),
    (90, 2, False): Config(64, 64, 128, 4, 2, 128, resident=2),
    (90, 2, True): Config(64, 64, 64, 8, 3, 256),
    (90, 4, False): Config(64, 32, 32, 4, 2, 32),
    (90, 4, True): Config(64, 32, 32, 8, 2, 128),
    (100, 2, False): Config(128, 64, 128, 8, 3, 128),
    (100, 2, True): Config(64, 64, 64, 8, 3, 256),
    (100, 4, False): Config(64, 32, 32, 4, 2, 32),
    (100, 4, True): Config(64, 32, 32, 8, 2, 128),
    (INTERPRETER, 2, False): Config(64, 32, 128, 4, 1, 128),
    (INTERPRETER, 2, True): Config(64, 64, 128, 4, 1, 256),
    (INTERPRETER, 4, False): Config(64, 32, 32, 4, 1, 32),
    (INTERPRETER, 4, True): Config(64, 64, 128, 4, 1, 256),
}


def config_for(table: dict[tuple[int, int, bool], Config], arch: int, element_size: int, features: int) -> Config:
    """The table's row, with ``block_k`` and ``block_d`` cut to the features there are."""
    wide = features > NARROW[element_size]
    config = table[arch, element_size, wide]
    padded = max(16, triton.next_power_of_2(features))  # tl.dot needs at least 16
    return replace(config, block_k=min(config.block_k, padded), block_d=min(config.block_d, padded))
