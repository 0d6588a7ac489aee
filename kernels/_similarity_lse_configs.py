"""Tile sizes of the similarity kernels, by architecture, element size and number of features.

Chosen so that ptxas spills no register and shared memory fits (tests/gpu/test_triton_aot.py). Keys are those of
``_nt_xent_configs.py``; a narrow D is one product, so block_d equals block_k there.

The forward's logits and the backward's must agree to the last bit: each row of probabilities then sums to one whatever
the rounding. A product adds its features in order, 16-bit ones in any step, so block_k may differ there; float32 takes
three passes over each step, so block_k is the same in both tables. In the interpreter, NumPy rounds by the size of a
product, so its tiles are the same too.
"""

from __future__ import annotations

from ._common import INTERPRETER, Config

FORWARD = {
    (80, 2, False): Config(128, 64, 128, 8, 2),
    (80, 2, True): Config(64, 64, 32, 8, 4),
    (80, 4, False): Config(64, 64, 32, 4, 2),
    (80, 4, True): Config(64, 32, 32, 8, 3),
    (86, 2, False): Config(128, 64, 128, 8, 2),
    (86, 2, True): Config(64, 64, 32, 4, 4),
    (86, 4, False): Config(64, 64, 32, 4, 2),
    (86, 4, True): Config(64, 32, 32, 4, 3),
    (90, 2, False): Config(128, 64, 128, 8, 2),
    (90, 2, True): Config(128, 64, 64, 8, 3),
    (90, 4, False): Config(64, 64, 32, 4, 2),
    (90, 4, True): Config(64, 64, 32, 4, 3),
    (100, 2, False): Config(128, 64, 128, 8, 2),
    (100, 2, True): Config(128, 64, 64, 8, 3),
    (100, 4, False): Config(64, 64, 32, 4, 2),
    (100, 4, True): Config(64, 32, 32, 8, 3),
    (INTERPRETER, 2, False): Config(32, 32, 128, 4, 1),
    (INTERPRETER, 2, True): Config(32, 32, 128, 4, 1),
    (INTERPRETER, 4, False): Config(32, 32, 32, 4, 1),
    (INTERPRETER, 4, True): Config(32, 32, 128, 4, 1),
}
# A program owns rows of the result [rows, block_d] and streams over the other side: both gradients of similarity_lse,
# the attended mean, and similarity_logsigmoid.
OWNER = {
    (80, 2, False): Config(64, 64, 128, 8, 2, 128),
    (80, 2, True): Config(64, 64, 64, 8, 2, 256),
    (80, 4, False): Config(64, 32, 32, 4, 3, 32),
    (80, 4, True): Config(64, 16, 32, 8, 2, 128),
    (86, 2, False): Config(64, 64, 128, 8, 2, 128),
    (86, 2, True): Config(64, 64, 64, 8, 2, 256),
    (86, 4, False): Config(64, 32, 32, 4, 2, 32),
    (86, 4, True): Config(64, 16, 32, 8, 3, 128),
    (90, 2, False): Config(128, 64, 128, 8, 2, 128),
    (90, 2, True): Config(64, 64, 64, 8, 2, 256),
    (90, 4, False): Config(64, 32, 32, 4, 2, 32),
    (90, 4, True): Config(64, 16, 32, 8, 2, 128),
    (100, 2, False): Config(64, 64, 128, 8, 3, 128),
    (100, 2, True): Config(64, 64, 64, 8, 3, 256),
    (100, 4, False): Config(64, 32, 32, 4, 2, 32),
    (100, 4, True): Config(64, 32, 32, 4, 2, 128),
    (INTERPRETER, 2, False): Config(32, 32, 128, 4, 1, 128),
    (INTERPRETER, 2, True): Config(32, 32, 128, 4, 1, 256),
    (INTERPRETER, 4, False): Config(32, 32, 32, 4, 1, 32),
    (INTERPRETER, 4, True): Config(32, 32, 128, 4, 1, 256),
}
# A program forms one tile of the weights of a band; both ways to sum a logit, so the last note above counts here too.
WEIGHTS = {
    (80, 2, False): Config(128, 128, 64, 8, 3),
    (80, 2, True): Config(128, 64, 32, 8, 4),
    (80, 4, False): Config(64, 64, 32, 4, 2),
    (80, 4, True): Config(64, 64, 32, 8, 3),
    (86, 2, False): Config(128, 64, 32, 8, 3),
    (86, 2, True): Config(128, 64, 32, 8, 3),
    (86, 4, False): Config(64, 64, 32, 4, 2),
    (86, 4, True): Config(64, 64, 32, 8, 3),
    (90, 2, False): Config(128, 256, 64, 8, 3),
    (90, 2, True): Config(128, 256, 64, 8, 3),
    (90, 4, False): Config(64, 64, 32, 4, 2),
    (90, 4, True): Config(64, 64, 32, 4, 3),
    (100, 2, False): Config(128, 64, 64, 8, 3),
    (100, 2, True): Config(128, 64, 64, 8, 3),
    (100, 4, False): Config(64, 64, 32, 4, 2),
    (100, 4, True): Config(64, 64, 32, 8, 3),
    (INTERPRETER, 2, False): Config(32, 32, 128, 4, 1),
    (INTERPRETER, 2, True): Config(32, 32, 128, 4, 1),
    (INTERPRETER, 4, False): Config(32, 32, 32, 4, 1),
    (INTERPRETER, 4, True): Config(32, 32, 128, 4, 1),
}
