"""Sinkhorn assignments of stored logits, three iterations at τ = 0.05, beside DINOv2's passes over exponentials.

1,024 × 65,536 logits are 256 MiB; DINOv2's code reads or writes that 39 times.
"""

from __future__ import annotations

import torch
from torch import Tensor

import sslfast

from .harness import Case
from .masking import Function, Problem, normal, of_logits

TEMPERATURE = 0.05
EXPONENTIAL = 16.0  # operations of one: seven fused multiply-adds, and what rounds the argument


def _problem(case: Case) -> Problem:
    return Problem((), {"logits": normal(case, case.shape["B"], case.shape["K"], scale=0.3)})


def _published(case: Case) -> Function:
    def function(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        q = torch.exp(given["logits"] / TEMPERATURE).t()  # [K, B]
        prototypes, rows = q.shape
        q /= torch.sum(q)
        for _ in range(3):
            q /= torch.sum(q, dim=1, keepdim=True)
            q /= prototypes
            q /= torch.sum(q, dim=0, keepdim=True)
            q /= rows
        q *= rows
        return (q.t(),)

    return function


def _fused(case: Case) -> Function:
    return lambda given: (sslfast.sinkhorn(given["logits"], TEMPERATURE),)


def _cost(case: Case) -> tuple[float, float]:
    """Four visits of the logits with an exponential of each, and the assignments written."""
    entries = float(case.shape["B"] * case.shape["K"])
    return 4 * EXPONENTIAL * entries, 4 * entries * case.torch_dtype.itemsize + 4 * entries


CALLS = {"problem": _problem, "published": _published, "fused": _fused, "whole_cost": _cost}
BENCHMARK = of_logits("sinkhorn", "dinov2", (1024, 65536), (512, 3000), **CALLS)
PROVIDERS, BASELINES, TINY = BENCHMARK.providers, BENCHMARK.baselines, BENCHMARK.tiny
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip
