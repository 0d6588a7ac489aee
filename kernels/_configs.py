"""Tile sizes and launch options of the kernels with products, by architecture, element size and size of the problem.

Chosen so that ptxas spills no register and shared memory fits: tests/gpu/test_triton_aot.py holds every row to that.
"""

from __future__ import annotations

from dataclasses import replace

import triton

from ._common import INTERPRETER, Config

Table = dict[tuple[int, int, bool], Config]

# Up to so many features, by bytes of an element, rows are narrow: one product of next_power_of_2(D) features, so
# block_k is an upper limit there, as block_d is everywhere.
NARROW = {2: 128, 4: 32}
# From so many entries on a second moment is large: 128 tiles of 128 × 128. A small one has too few large tiles to fill
# a GPU.
LARGE = 1 << 21


def _table(rows: dict[int, tuple[tuple[int, ...], ...]]) -> Table:
    """(architecture, bytes of an element, wide or large) → tiles.

    A row has the fields of :class:`Config` for 16-bit elements, narrow or small and wide or large, then for float32.
    """
    kinds = ((2, False), (2, True), (4, False), (4, True))
    return {(arch, *kind): Config(*row[i]) for arch, row in rows.items() for i, kind in enumerate(kinds)}


# NT-Xent. The forward needs block_n to divide block_m.
NT_XENT_FORWARD = _table(
    {
        80: ((128, 64, 128, 8, 2), (128, 64, 32, 8, 4), (64, 64, 32, 4, 2), (64, 32, 32, 8, 3)),
        86: ((128, 64, 128, 8, 2), (128, 64, 32, 8, 4), (64, 64, 32, 4, 2), (64, 32, 32, 8, 3)),
        90: ((128, 64, 128, 4, 2), (128, 128, 64, 8, 3), (64, 64, 32, 4, 2), (64, 64, 32, 4, 3)),
        100: ((128, 64, 128, 8, 2), (128, 64, 64, 8, 3), (64, 64, 32, 4, 2), (64, 64, 32, 4, 3)),
        INTERPRETER: ((64, 32, 128, 4, 1), (64, 64, 128, 4, 1), (64, 32, 32, 4, 1), (64, 64, 128, 4, 1)),
    }
)
NT_XENT_BACKWARD = _table(
    {
        80: ((64, 64, 128, 4, 2, 128), (64, 64, 64, 8, 3, 256), (64, 32, 32, 4, 2, 32), (64, 16, 32, 8, 3, 128)),
        86: ((64, 64, 128, 4, 2, 128), (64, 64, 64, 8, 3, 256), (64, 32, 32, 4, 2, 32), (64, 32, 32, 8, 3, 128)),
        90: ((64, 64, 128, 4, 2, 128, 2), (64, 64, 64, 8, 3, 256), (64, 32, 32, 4, 2, 32), (64, 32, 32, 8, 2, 128)),
        100: ((128, 64, 128, 8, 3, 128), (64, 64, 64, 8, 3, 256), (64, 32, 32, 4, 2, 32), (64, 32, 32, 8, 2, 128)),
        INTERPRETER: (
            (64, 32, 128, 4, 1, 128),
            (64, 64, 128, 4, 1, 256),
            (64, 32, 32, 4, 1, 32),
            (64, 64, 128, 4, 1, 256),
        ),
    }
)

# The similarity kernels. The forward's logits and the backward's must agree to the last bit: each row of probabilities
# then sums to one whatever the rounding. A product adds its features in order, 16-bit ones in any step, so block_k may
# differ there; float32 takes three passes over each step, so block_k is the same in both tables. In the interpreter,
# NumPy rounds by the size of a product, so its tiles are the same too.
SIMILARITY_FORWARD = _table(
    {
        80: ((128, 64, 128, 8, 2), (64, 64, 32, 8, 4), (64, 64, 32, 4, 2), (64, 32, 32, 8, 3)),
        86: ((128, 64, 128, 8, 2), (64, 64, 32, 4, 4), (64, 64, 32, 4, 2), (64, 32, 32, 4, 3)),
        90: ((128, 64, 128, 8, 2), (128, 64, 64, 8, 3), (64, 64, 32, 4, 2), (64, 64, 32, 4, 3)),
        100: ((128, 64, 128, 8, 2), (128, 64, 64, 8, 3), (64, 64, 32, 4, 2), (64, 32, 32, 8, 3)),
        INTERPRETER: ((32, 32, 128, 4, 1), (32, 32, 128, 4, 1), (32, 32, 32, 4, 1), (32, 32, 128, 4, 1)),
    }
)
# The same tiles without an exponential; several neighbours are written as 64-bit keys.
NEAREST_NEIGHBOURS = _table(
    {
        80: ((128, 64, 128, 8, 2), (64, 64, 32, 8, 4), (64, 64, 32, 8, 2), (64, 32, 32, 8, 3)),
        86: ((128, 64, 128, 8, 2), (64, 64, 32, 4, 4), (64, 64, 32, 4, 2), (64, 32, 32, 4, 3)),
        90: ((128, 64, 128, 8, 2), (128, 64, 64, 8, 3), (64, 64, 32, 4, 2), (64, 64, 32, 4, 3)),
        100: ((128, 32, 128, 8, 2), (128, 64, 64, 8, 3), (64, 64, 32, 8, 2), (64, 64, 32, 8, 3)),
        INTERPRETER: ((32, 32, 128, 4, 1), (32, 32, 128, 4, 1), (32, 32, 32, 4, 1), (32, 32, 128, 4, 1)),
    }
)
# A program owns rows of the result [rows, block_d] and streams over the other side: both gradients of similarity_lse,
# the attended mean, and similarity_logsigmoid.
SIMILARITY_OWNER = _table(
    {
        80: ((64, 64, 128, 8, 2, 128), (64, 64, 64, 8, 2, 256), (64, 32, 32, 4, 3, 32), (64, 16, 32, 8, 2, 128)),
        86: ((64, 64, 128, 8, 2, 128), (64, 64, 64, 8, 2, 256), (64, 32, 32, 4, 2, 32), (64, 16, 32, 8, 3, 128)),
        90: ((128, 64, 128, 8, 2, 128), (64, 64, 64, 8, 2, 256), (64, 32, 32, 4, 2, 32), (64, 16, 32, 8, 2, 128)),
        100: ((64, 64, 128, 8, 3, 128), (64, 64, 64, 8, 3, 256), (64, 32, 32, 4, 2, 32), (64, 32, 32, 4, 2, 128)),
        INTERPRETER: (
            (32, 32, 128, 4, 1, 128),
            (32, 32, 128, 4, 1, 256),
            (32, 32, 32, 4, 1, 32),
            (32, 32, 128, 4, 1, 256),
        ),
    }
)
# A program forms one tile of the weights of a band; both ways to sum a logit, so the note above counts here too.
SIMILARITY_WEIGHTS = _table(
    {
        80: ((128, 128, 64, 8, 3), (128, 64, 32, 8, 4), (64, 64, 32, 4, 2), (64, 64, 32, 8, 3)),
        86: ((128, 64, 32, 8, 3), (128, 64, 32, 8, 3), (64, 64, 32, 4, 2), (64, 64, 32, 8, 3)),
        90: ((128, 256, 64, 8, 3), (128, 256, 64, 8, 3), (64, 64, 32, 4, 2), (64, 64, 32, 4, 3)),
        100: ((128, 64, 64, 8, 3), (128, 64, 64, 8, 3), (64, 64, 32, 4, 2), (64, 64, 32, 8, 3)),
        INTERPRETER: ((32, 32, 128, 4, 1), (32, 32, 128, 4, 1), (32, 32, 32, 4, 1), (32, 32, 128, 4, 1)),
    }
)

# Second moments: tiles of M = ÂᵀB̂ or of one Gram matrix, squares for the symmetric ones; block_k: rows of Â, or its
# columns.
MOMENT_GRAM = _table(
    {
        80: ((64, 64, 64, 4, 4), (128, 128, 64, 8, 3), (64, 64, 32, 8, 3), (64, 64, 32, 8, 3)),
        86: ((64, 64, 64, 4, 4), (128, 128, 32, 8, 4), (64, 64, 32, 8, 3), (64, 64, 32, 8, 3)),
        90: ((64, 64, 64, 4, 4), (128, 128, 64, 8, 4), (64, 64, 32, 4, 3), (64, 64, 32, 4, 3)),
        100: ((64, 64, 64, 4, 4), (128, 128, 64, 8, 4), (64, 64, 32, 8, 3), (64, 64, 32, 8, 3)),
        INTERPRETER: ((64, 64, 64, 4, 1), (32, 32, 32, 4, 1), (64, 64, 64, 4, 1), (32, 32, 32, 4, 1)),
    }
)
# Tiles of the gradient [N, D]: Ŷ·offdiag(M) or ŶŶᵀ·X̂.
MOMENT_PRODUCT = _table(
    {
        80: ((64, 64, 64, 4, 4), (128, 64, 64, 8, 3), (64, 64, 32, 4, 3), (64, 64, 32, 4, 3)),
        86: ((64, 64, 64, 4, 4), (128, 64, 64, 8, 3), (64, 64, 32, 4, 3), (64, 64, 32, 4, 3)),
        90: ((64, 64, 64, 4, 4), (128, 64, 64, 8, 4), (64, 64, 32, 4, 3), (64, 64, 32, 4, 3)),
        100: ((64, 64, 64, 4, 4), (128, 64, 64, 8, 4), (64, 64, 32, 4, 3), (64, 64, 32, 4, 3)),
        INTERPRETER: ((64, 64, 64, 4, 1), (32, 32, 32, 4, 1), (64, 64, 64, 4, 1), (32, 32, 32, 4, 1)),
    }
)

# Gram anchoring: both products of a tile at once, so two of its sizes in registers; square, for it is transposed.
GRAM_ANCHOR = _table(
    {
        80: ((64, 64, 64, 8, 3), (64, 64, 64, 8, 3), (64, 64, 32, 8, 2), (64, 64, 32, 8, 3)),
        86: ((64, 64, 64, 8, 2), (64, 64, 64, 8, 2), (64, 64, 32, 8, 2), (64, 64, 32, 8, 2)),
        90: ((128, 128, 64, 8, 3), (128, 128, 64, 8, 3), (64, 64, 32, 8, 2), (64, 64, 32, 8, 3)),
        100: ((64, 64, 64, 8, 3), (64, 64, 64, 8, 3), (64, 64, 32, 8, 2), (64, 64, 32, 8, 3)),
        INTERPRETER: ((32, 32, 128, 4, 1), (32, 32, 128, 4, 1), (32, 32, 32, 4, 1), (32, 32, 128, 4, 1)),
    }
)


def config_for(table: Table, arch: int, element_size: int, features: int) -> Config:
    """The table's row for rows of so many features, ``block_k`` and ``block_d`` cut to those there are."""
    wide = features > NARROW[element_size]
    config = table[arch, element_size, wide]
    padded = max(16, triton.next_power_of_2(features))  # tl.dot needs at least 16
    return replace(config, block_k=min(config.block_k, padded), block_d=min(config.block_d, padded))
