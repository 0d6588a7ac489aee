"""prototype_cross_entropy on the CPU: value and every gradient against the reference in float64, and its contracts."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from helpers import DTYPES, LEVELS, roundings, run_at_level, within_budget
from sslfast import NormalizedPrototypes, prototype_cross_entropy, reference

pytestmark = pytest.mark.sanitize
GRAD_LOSS = 1.7  # not 1: a backward that forgets it fails


class Case(NamedTuple):
    """Views of the student and of the teacher, samples, features, prototypes."""

    views: int
    targets: int
    samples: int
    d: int
    k: int


# Aligned, DINO's crops, ragged everywhere, prime, one of everything, more samples than a tile, many teachers' views,
# more views than half a tile, two blocks of prototypes and a bit.
CASES = [
    Case(2, 2, 32, 64, 256),
    Case(6, 2, 20, 32, 500),
    Case(3, 2, 13, 31, 257),
    Case(1, 1, 1, 1, 1),
    Case(1, 1, 7, 5, 1),
    Case(1, 1, 401, 16, 211),
    Case(5, 4, 9, 24, 193),
    Case(100, 2, 3, 8, 40),
    Case(2, 1, 50, 40, 400),
]


def inputs_of(case: Case, kind: torch.dtype = torch.float64) -> dict[str, Any]:
    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)

    pairs = None if case.views > 1 else [(0, 0)]
    return {
        "student": unit(case.views, case.samples, case.d).to(kind),
        "teacher": unit(case.targets, case.samples, case.d).to(kind),
        "w": unit(case.k, case.d).to(kind),
        "u": unit(case.k, case.d).to(kind),
        "pairs": pairs,
    }


def by(function: Any, given: dict[str, Any], kind: torch.dtype) -> tuple[Tensor, ...]:
    """Loss, and GRAD_LOSS times its gradients for student and prototypes (and the gain where there is one)."""
    wide = torch.float64 if kind == torch.float64 else torch.float32
    tensors = {
        name: x.detach().to(wide if name in ("gain", "bias", "weights") else kind, copy=True)
        for name, x in given.items()
        if isinstance(x, Tensor)
    }
    learning = [tensors[name].requires_grad_() for name in ("student", "w", "gain") if name in tensors]
    w, u = tensors["w"], tensors["u"]
    if "gain" in tensors:
        parts = (w, tensors["gain"]), (u, tensors["gain"].detach())
        make = NormalizedPrototypes if function is prototype_cross_entropy else reference.normalized_prototypes
        w, u = (make(*part) for part in parts)
    pairs = given["pairs"]
    if function is prototype_cross_entropy:
        options: dict[str, Any] = {"pairs": pairs, "teacher_bias": tensors.get("bias"), "row_weights": tensors.get("weights")}
        loss = function(tensors["student"], tensors["teacher"], w, u, **options, **given.get("temperatures", {}))
    else:
        if pairs is None:
            views = itertools.product(range(len(tensors["teacher"])), range(len(tensors["student"])))
            pairs = [(t, v) for t, v in views if t != v]
        of = {"student_temperature": 0.1, "teacher_temperature": 0.04, **given.get("temperatures", {})}
        bias, weights = tensors.get("bias"), tensors.get("weights")
        loss = function(tensors["student"], tensors["teacher"], w, u, pairs, *of.values(), bias, weights)
    return (loss.detach(), *torch.autograd.grad(GRAD_LOSS * loss, learning))


def check(given: dict[str, Any], dtype: torch.dtype) -> None:
    given = {name: x.to(dtype) if name in ("student", "teacher", "w", "u") else x for name, x in given.items()}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mine = by(prototype_cross_entropy, given, dtype)
    truth = by(reference.prototype_cross_entropy, given, torch.float64)
    plain = roundings(by, reference.prototype_cross_entropy, given, wide)
    assert mine[0].dtype == wide
    # A gradient is a difference of two distributions that may cancel: its floor is the size of their terms.
    floors = (1e-3, GRAD_LOSS * 10 / given["student"].shape[1], GRAD_LOSS * 10 / len(given["w"]), 1e-1)
    for name, a, right, own, floor in zip(("loss", "dstudent", "dw", "dgain"), mine, truth, plain, floors, strict=False):
        assert a.dtype == (wide if name in ("loss", "dgain") else dtype)
        within_budget(name, a, own, right, dtype if a.dtype == dtype else wide, floor=floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients(case: Case, dtype: torch.dtype) -> None:
    check(inputs_of(case), dtype)


@pytest.mark.parametrize("case", CASES[1:4], ids=str)
def test_bias_weights_and_gain(case: Case) -> None:
    """DINO's centre, rows of weight 0, weight normalisation with a gain that learns."""
    weights = torch.rand(case.samples).double()
    weights[::3] = 0 if case.samples > 1 else 1
    gain = 0.5 + torch.rand(case.k).double()
    given = inputs_of(case) | {"bias": torch.randn(case.k).double(), "weights": weights, "gain": gain}
    given["w"] = 3 * given["w"]
    check(given, torch.float32)
    check(given, torch.float64)


@pytest.mark.parametrize("scale", [30.0, 1e3])
def test_large_logits(scale: float) -> None:
    """Neither features nor prototypes of norm 1: logits whose exponentials leave float32's range."""
    given = inputs_of(Case(3, 2, 11, 16, 450))
    given["student"], given["u"] = given["student"] * scale, given["u"] * scale
    check(given, torch.float32)


@pytest.mark.levels
@pytest.mark.parametrize("level", LEVELS)
def test_levels(level: str) -> None:
    run_at_level(level, __file__, "test_value_and_gradients or test_bias or test_large")
