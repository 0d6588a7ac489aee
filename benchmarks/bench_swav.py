"""SwAV's loss of two assigned views and six smaller ones, forward and backward, beside lightly's."""

from __future__ import annotations

from torch import Tensor

import sslfast

from . import peers
from .bench_sinkhorn import EXPONENTIAL
from .harness import Case
from .masking import Function, Problem, leaf, normal, of_logits

HIGH, LOW = 2, 6
VISITS = 3  # of an assigned view's scores, for its bias


def _problem(case: Case) -> Problem:
    scores = normal(case, HIGH + LOW, case.shape["B"], case.shape["K"], scale=0.1)
    return Problem(tuple(leaf(x) for x in scores), {})


def _published(case: Case) -> Function:
    criterion = peers.lightly_loss("swav_loss", "SwaVLoss")

    def function(_: dict[str, Tensor], *scores: Tensor) -> tuple[Tensor, ...]:
        return (criterion(list(scores[:HIGH]), list(scores[HIGH:])).sum(),)

    return function


def _fused(case: Case) -> Function:
    return lambda _, *scores: (sslfast.swav(scores[:HIGH], scores[HIGH:]),)


def _cost(case: Case) -> tuple[float, float]:
    """Each view is read forward and backward and its gradient written; assigned ones are visited for their bias."""
    view = float(case.shape["B"] * case.shape["K"])
    assigned, every = HIGH * view, (HIGH + LOW) * view
    exponentials = VISITS * assigned + 2 * (assigned + every)
    return EXPONENTIAL * exponentials, (VISITS * assigned + 3 * every) * case.torch_dtype.itemsize


CALLS = {"problem": _problem, "published": _published, "fused": _fused, "whole_cost": _cost}
BENCHMARK = of_logits("swav", "lightly", (512, 3000), **CALLS)
PROVIDERS, BASELINES, TINY = BENCHMARK.providers, BENCHMARK.baselines, BENCHMARK.tiny
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip
