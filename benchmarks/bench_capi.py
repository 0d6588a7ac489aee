"""CAPI's loss of stored logits, forward and backward, beside lightly's: assignments by position, a quarter predicted.

64 images of 32 tokens and 16,384 clusters are 128 MiB of the teacher's logits; lightly's class holds several copies.
"""

from __future__ import annotations

import torch

import sslfast

from . import peers
from .bench_sinkhorn import EXPONENTIAL
from .contrastive import generator
from .harness import Case
from .masking import Benchmark, Function, Problem, leaf, normal

VISITS = 3  # of the teacher's logits, for their bias


def _problem(case: Case) -> Problem:
    b, s, p, k = (case.shape[name] for name in ("B", "S", "P", "K"))
    given = {"teacher": normal(case, b, s, k, scale=0.2)}
    given["index"] = torch.rand(b, s, generator=generator()).argsort(1)[:, :p].to(case.device)
    return Problem((leaf(normal(case, b, p, k)),), given)


def _published(case: Case) -> Function:
    criterion = peers.lightly_loss("capi_loss", "CAPILoss")
    return lambda given, student: (criterion(given["teacher"], student, given["index"]),)


def _fused(case: Case) -> Function:
    return lambda given, student: (sslfast.capi(given["teacher"], student, given["index"]),)


def _cost(case: Case) -> tuple[float, float]:
    """The teacher is visited for its bias, its predicted tokens and the student's are read forward and backward."""
    b, s, p, k = (case.shape[name] for name in ("B", "S", "P", "K"))
    every, predicted = float(b * s * k), float(b * p * k)
    return EXPONENTIAL * (VISITS * every + 4 * predicted), (VISITS * every + 5 * predicted) * case.torch_dtype.itemsize


BENCHMARK = Benchmark(
    op="capi",
    own="lightly",
    sweep=[{"B": 64, "S": 32, "P": 8, "K": 16384}, {"B": 32, "S": 16, "P": 4, "K": 1024}],
    problem=_problem,
    published=_published,
    fused=_fused,
    whole_cost=_cost,
    tiny={"B": 9, "S": 4, "P": 2, "K": 70},
    pictures=False,
)
PROVIDERS, BASELINES, TINY = BENCHMARK.providers, BENCHMARK.baselines, BENCHMARK.tiny
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip
