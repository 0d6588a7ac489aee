"""Small batches, where plain code may win: packages' own losses, the plain formula, and the losses patched."""

from __future__ import annotations

from .adapters import EAGER, LIGHTLY_NT_XENT, LIGHTLY_VICREG, OPEN_CLIP, PATCHED, TINY, UNPATCHED, Patched

BENCHMARK = Patched(
    op="small_batches",
    providers=(UNPATCHED, EAGER, PATCHED),
    sweep=(
        *((LIGHTLY_NT_XENT, n, 128) for n in (4, 8, 16, 32, 64, 128, 256)),
        *((LIGHTLY_VICREG, n, 128) for n in (16, 32, 64, 128, 256)),
        *((OPEN_CLIP, n, 512) for n in (16, 64, 256)),
    ),
)
PROVIDERS, BASELINES = BENCHMARK.providers, (UNPATCHED, EAGER)
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip

__all__ = ["BASELINES", "BENCHMARK", "PROVIDERS", "TINY", "cases", "cost", "setup", "truth", "why_skip"]
