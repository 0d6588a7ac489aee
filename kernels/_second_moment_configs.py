"""Tile sizes of second_moment's products, by architecture, element size and whether the result is large.

Chosen so that ptxas spills no register and shared memory fits (tests/gpu/test_triton_aot.py). A small result has too
few large tiles to fill a GPU.
"""

from __future__ import annotations

from ._common import INTERPRETER, Config

# From so many entries on a result is large: 128 tiles of 128 × 128.
LARGE = 1 << 21


def _by_row(gpus: dict[int, tuple[Config, Config, Config]]) -> dict[tuple[int, int, bool], Config]:
    """Rows (architecture, bytes of an element, large), from each GPU's tiles of small and large 16-bit results and of
    float32 ones; the interpreter's are added."""
    table = {}
    for architecture, (small, large, float32) in gpus.items():
        table[architecture, 2, False], table[architecture, 2, True] = small, large
        table[architecture, 4, False] = table[architecture, 4, True] = float32
    for size in (2, 4):
        table[INTERPRETER, size, False] = Config(64, 64, 64, 4, 1)
        table[INTERPRETER, size, True] = Config(32, 32, 32, 4, 1)
    return table


# Tiles of M = ÂᵀB̂ or of one Gram matrix: squares, for the symmetric ones; block_k: rows of Â, or its columns.
GRAM = _by_row(
    {
        80: (Config(64, 64, 64, 4, 4), Config(128, 128, 64, 8, 3), Config(64, 64, 32, 8, 3)),
        86: (Config(64, 64, 64, 4, 4), Config(128, 128, 32, 8, 4), Config(64, 64, 32, 8, 3)),
        90: (Config(64, 64, 64, 4, 4), Config(128, 128, 64, 8, 4), Config(64, 64, 32, 4, 3)),
        100: (Config(64, 64, 64, 4, 4), Config(128, 128, 64, 8, 4), Config(64, 64, 32, 8, 3)),
    }
)
# Tiles of the gradient [N, D]: Ŷ·offdiag(M) or ŶŶᵀ·X̂.
PRODUCT = _by_row(
    {
        80: (Config(64, 64, 64, 4, 4), Config(128, 64, 64, 8, 3), Config(64, 64, 32, 4, 3)),
        86: (Config(64, 64, 64, 4, 4), Config(128, 64, 64, 8, 3), Config(64, 64, 32, 4, 3)),
        90: (Config(64, 64, 64, 4, 4), Config(128, 64, 64, 8, 4), Config(64, 64, 32, 4, 3)),
        100: (Config(64, 64, 64, 4, 4), Config(128, 64, 64, 8, 4), Config(64, 64, 32, 4, 3)),
    }
)
