"""DINO's loss of two teacher's and ten student's views, with its centre's update, forward and backward.

Beside lightly's. 64 × 65,536 logits of ten views are 160 MiB, and so is their gradient.
"""

from __future__ import annotations

from torch import Tensor

import sslfast

from . import peers
from .bench_sinkhorn import EXPONENTIAL
from .harness import Case
from .masking import Function, Problem, leaf, normal, of_logits

TEACHERS, STUDENTS = 2, 10


def _problem(case: Case) -> Problem:
    size = (case.shape["B"], case.shape["K"])
    student = tuple(leaf(x) for x in normal(case, STUDENTS, *size))
    return Problem(student, {"teacher": 0.2 * normal(case, TEACHERS, *size)})


def _published(case: Case) -> Function:
    criterion = peers.lightly_loss("dino_loss", "DINOLoss", output_dim=case.shape["K"]).to(case.device)

    def function(given: dict[str, Tensor], *student: Tensor) -> tuple[Tensor, ...]:
        criterion.center.detach().zero_()  # the first step's, every time
        return criterion(list(given["teacher"]), list(student)), criterion.center.flatten()

    return function


def _fused(case: Case) -> Function:
    criterion = sslfast.DINOLoss(case.shape["K"]).to(case.device)

    def function(given: dict[str, Tensor], *student: Tensor) -> tuple[Tensor, ...]:
        criterion.center.zero_()
        return criterion(given["teacher"], student), criterion.center.flatten()

    return function


def _cost(case: Case) -> tuple[float, float]:
    """Each view is read forward and backward, the teacher's once more for the centre, and gradients are written."""
    view = float(case.shape["B"] * case.shape["K"])
    exponentials = 2 * (TEACHERS + STUDENTS) * view
    return EXPONENTIAL * exponentials, (3 * TEACHERS + 3 * STUDENTS) * view * case.torch_dtype.itemsize


CALLS = {"problem": _problem, "published": _published, "fused": _fused, "whole_cost": _cost}
BENCHMARK = of_logits("distillation_cross_entropy", "lightly", (64, 65536), **CALLS)
PROVIDERS, BASELINES, TINY = BENCHMARK.providers, BENCHMARK.baselines, BENCHMARK.tiny
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip
