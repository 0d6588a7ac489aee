"""``sslfast.patch``: packages' own losses with sslfast in them, over the same losses without; forward and backward."""

from __future__ import annotations

from .adapters import (
    LIGHTLY_BARLOW_TWINS,
    LIGHTLY_DET_CON_B,
    LIGHTLY_DET_CON_S,
    LIGHTLY_MACL,
    LIGHTLY_NT_XENT,
    LIGHTLY_VICREG,
    METRIC_LEARNING_NT_XENT,
    OPEN_CLIP,
    PATCHED,
    SOLO_SIMCLR,
    SOLO_VICREG,
    TINY,
    UNPATCHED,
    Patched,
)

BENCHMARK = Patched(
    op="adapters",
    providers=(UNPATCHED, PATCHED),
    sweep=(
        (LIGHTLY_NT_XENT, 2048, 128),
        (METRIC_LEARNING_NT_XENT, 256, 128),  # 512 embeddings, 256 classes of two
        (LIGHTLY_VICREG, 256, 2048),
        (LIGHTLY_VICREG, 256, 8192),
        (LIGHTLY_MACL, 2048, 128),
        (LIGHTLY_DET_CON_S, 128, 256),  # 16 regions of each of 128 images
        (LIGHTLY_DET_CON_B, 128, 256),
        (LIGHTLY_BARLOW_TWINS, 256, 2048),
        (LIGHTLY_BARLOW_TWINS, 256, 8192),
        (OPEN_CLIP, 2048, 128),
        (OPEN_CLIP, 4096, 512),
        (SOLO_SIMCLR, 2048, 128),
        (SOLO_VICREG, 256, 2048),
    ),
)
PROVIDERS, BASELINES = BENCHMARK.providers, (UNPATCHED,)
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip

__all__ = ["BASELINES", "BENCHMARK", "PROVIDERS", "TINY", "cases", "cost", "setup", "truth", "why_skip"]
