"""Tile sizes of second_moment's products, by architecture, element size and whether the result is large.

Chosen so that ptxas spills no register and shared memory fits (tests/test_triton_aot.py holds every row to that). A
small result has too few large tiles to fill a GPU.
"""

from __future__ import annotations

from ._common import INTERPRETER, Config

# From so many entries on a result is large: 128 tiles of 128 × 128.
LARGE = 1 << 21
# Tiles of M = ÂᵀB̂ or of one Gram matrix: squares, for the symmetric ones; block_k: rows of Â, or its columns.
GRAM = {
    (80, 2, False): Config(64, 64, 64, 4, 4),
    (80, 2, True): Config(128, 128, 64, 8, 3),
    (80, 4, False): Config(64, 64, 32, 8, 3),
    (80, 4, True): Config(64, 64, 32, 8, 3),
    (86, 2, False): Config(64, 64, 64, 4, 4),
    (86, 2, True): Config(128, 128, 32, 8, 4),
    (86, 4, False): Config(64, 64, 32, 8, 3),
    (86, 4, True): Config(64, 64, 32, 8, 3),
    (90, 2, False): Config(64, 64, 64, 4, 4),
    (90, 2, True): Config(128, 128, 64, 8, 4),
    (90, 4, False): Config(64, 64, 32, 4, 3),
    (90, 4, True): Config(64, 64, 32, 4, 3),
    (100, 2, False): Config(64, 64, 64, 4, 4),
    (100, 2, True): Config(128, 128, 64, 8, 4),
    (100, 4, False): Config(64, 64, 32, 8, 3),
    (100, 4, True): Config(64, 64, 32, 8, 3),
    (INTERPRETER, 2, False): Config(64, 64, 64, 4, 1),
    (INTERPRETER, 2, True): Config(32, 32, 32, 4, 1),
    (INTERPRETER, 4, False): Config(64, 64, 64, 4, 1),
    (INTERPRETER, 4, True): Config(32, 32, 32, 4, 1),
}
# Tiles of the two Gram matrices of a pair in one program.
PAIR = {
    (80, 2, False): Config(64, 64, 64, 4, 3),
    (80, 2, True): Config(64, 64, 64, 4, 3),
    (80, 4, False): Config(64, 64, 32, 8, 3),
    (80, 4, True): Config(64, 64, 32, 8, 3),
    (86, 2, False): Config(64, 64, 64, 4, 3),
    (86, 2, True): Config(64, 64, 64, 4, 3),
    (86, 4, False): Config(64, 64, 32, 8, 3),
    (86, 4, True): Config(64, 64, 32, 8, 3),
    (90, 2, False): Config(64, 64, 64, 4, 4),
    (90, 2, True): Config(64, 64, 64, 4, 4),
    (90, 4, False): Config(64, 64, 32, 8, 3),
    (90, 4, True): Config(64, 64, 32, 8, 3),
    (100, 2, False): Config(64, 64, 64, 4, 4),
    (100, 2, True): Config(64, 64, 64, 4, 4),
    (100, 4, False): Config(64, 64, 32, 8, 3),
    (100, 4, True): Config(64, 64, 32, 8, 3),
    (INTERPRETER, 2, False): Config(64, 64, 64, 4, 1),
    (INTERPRETER, 2, True): Config(32, 32, 32, 4, 1),
    (INTERPRETER, 4, False): Config(64, 64, 64, 4, 1),
    (INTERPRETER, 4, True): Config(32, 32, 32, 4, 1),
}
# Tiles of the gradient [N, D]: Ŷ·offdiag(M) or ŶŶᵀ·X̂.
PRODUCT = {
    (80, 2, False): Config(64, 64, 64, 4, 4),
    (80, 2, True): Config(128, 64, 64, 8, 3),
    (80, 4, False): Config(64, 64, 32, 4, 3),
    (80, 4, True): Config(64, 64, 32, 4, 3),
    (86, 2, False): Config(64, 64, 64, 4, 4),
    (86, 2, True): Config(128, 64, 64, 8, 3),
    (86, 4, False): Config(64, 64, 32, 4, 3),
    (86, 4, True): Config(64, 64, 32, 4, 3),
    (90, 2, False): Config(64, 64, 64, 4, 4),
    (90, 2, True): Config(128, 64, 64, 8, 4),
    (90, 4, False): Config(64, 64, 32, 4, 3),
    (90, 4, True): Config(64, 64, 32, 4, 3),
    (100, 2, False): Config(64, 64, 64, 4, 4),
    (100, 2, True): Config(128, 64, 64, 8, 4),
    (100, 4, False): Config(64, 64, 32, 4, 3),
    (100, 4, True): Config(64, 64, 32, 4, 3),
    (INTERPRETER, 2, False): Config(64, 64, 64, 4, 1),
    (INTERPRETER, 2, True): Config(32, 32, 32, 4, 1),
    (INTERPRETER, 4, False): Config(64, 64, 64, 4, 1),
    (INTERPRETER, 4, True): Config(32, 32, 32, 4, 1),
}
