"""Small calls of every CUDA operator, forward and backward: one list for all that runs the kernels.

The emulator runs it without a GPU (``tests/gpu/test_cuda_emulated.py``). On one, and under compute-sanitizer, it needs
no pytest (``python -m cuda_cases --help``):

    export PYTHONPATH=tests:tests/helpers
    python -m cuda_cases
    compute-sanitizer --tool racecheck python -m cuda_cases --only masked_rows

Inputs are drawn on the CPU by each case's own seed, so they are the same on every device; memory that an operator
allocates comes filled with NaN or the largest whole number, so that what a kernel leaves unwritten is seen.
"""

from __future__ import annotations

from collections.abc import Iterator

from .case import Case, difference, number_wrong, same_bits
from .images import losses, patches, views
from .masks import lists, masks, words
from .prototypes import assignments, cross_entropies, sinkhorns
from .rows import averages, cosines, gathered_tokens, normalized_rows, scattered_tokens

__all__ = ["Case", "cases", "cases_with", "difference", "number_wrong", "same_bits"]


def cases() -> Iterator[Case]:
    for family in (
        *(normalized_rows, cosines, averages, gathered_tokens, scattered_tokens, masks, lists, words),
        *(patches, losses, views),
        *(sinkhorns, cross_entropies, assignments),
    ):
        yield from family()


def cases_with(text: str) -> list[Case]:
    """Those with ``text`` in their name or in that of an operator."""
    return [case for case in cases() if any(text in name for name in (case.name, *case.operators))]
