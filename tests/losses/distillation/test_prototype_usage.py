"""Diagnostics of a teacher's assignments from features against those of all logits in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import sslfast
from helpers import roundings, within_budget
from sslfast import NormalizedPrototypes, duplicate_prototypes, prototype_usage


def plain(h: torch.Tensor, u: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    p = torch.softmax(h @ u.T / 0.04 + bias, 1)
    return torch.special.entr(p.mean(0)).sum().exp(), torch.special.entr(p).sum(1).mean()


@pytest.mark.parametrize("backend", [None, "triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_usage(dtype: torch.dtype, backend: str | None) -> None:
    h, u = (F.normalize(torch.randn(n, 24), dim=1).to(dtype) for n in (300, 157))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bias = torch.randn(1, 157).to(wide)
    with sslfast.use_backend(backend):
        found = prototype_usage(h, u, teacher_bias=bias)
    right = plain(h.double(), u.double(), bias.double())
    for name, x, own, truth in zip(
        ("perplexity", "entropy"), found, roundings(plain, h.to(wide), u.to(wide), bias), right, strict=False
    ):
        assert x.dtype == wide and not x.requires_grad
        within_budget(name, x, own, truth, wide, floor=25)
    logits = h.to(wide) @ u.to(wide).T / 0.04 + bias
    chosen = logits.gather(1, found.assignment[:, None])[:, 0]
    torch.testing.assert_close(chosen, logits.amax(1), rtol=0, atol=1e-4)
    assert found.unused == 157 - len(found.assignment.unique())


def test_collapse_and_balance() -> None:
    one = prototype_usage(torch.ones(8, 4), torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0])))
    assert one.usage_perplexity.item() == pytest.approx(1, abs=1e-4) and one.unused == 3
    assert (one.assignment == 0).all()
    even = prototype_usage(torch.zeros(8, 4), torch.eye(4))
    assert even.usage_perplexity.item() == pytest.approx(4) and even.teacher_entropy.item() == pytest.approx(1.3862944)
    sinkhorn = sslfast.prototype_sinkhorn(torch.eye(4)[[0, 0, 0, 1]], torch.eye(4)[:2], 1.0, 50)
    balanced = prototype_usage(torch.eye(4)[[0, 0, 0, 1]], torch.eye(4)[:2], 1.0, teacher_bias=sinkhorn)
    assert balanced.usage_perplexity.item() == pytest.approx(2, rel=1e-4)


def test_rows_that_take_no_part() -> None:
    h, u = torch.randn(12, 6), NormalizedPrototypes(torch.randn(9, 6), torch.rand(9, 1) + 0.5)
    weights = torch.tensor([0.5, 0.0, 0.25] * 4)
    right = prototype_usage(h[weights != 0], u)
    h[weights == 0] = float("nan")
    found = prototype_usage(h, u, row_weights=weights)
    torch.testing.assert_close(found[:3], right[:3])
    assert torch.equal(found.assignment[weights != 0], right.assignment)
    assert (found.assignment[weights == 0] == -1).all()
    assert prototype_usage(h, u, row_weights=torch.zeros(12)).teacher_entropy.isnan()


def test_compiled() -> None:
    h, u = torch.randn(12, 6), torch.randn(9, 6)
    compiled = torch.compile(prototype_usage, fullgraph=True)(h, u)
    torch.testing.assert_close(tuple(compiled), tuple(prototype_usage(h, u)))


def test_duplicates() -> None:
    u = F.normalize(torch.randn(300, 32), dim=1)
    assert duplicate_prototypes(u) == 0
    u[7], u[250], u[30] = 3 * u[8], -u[9], 0.5 * u[8]
    assert duplicate_prototypes(u) == 3 and duplicate_prototypes(NormalizedPrototypes(u)) == 3
    assert duplicate_prototypes(u, -1.5) == 300 and duplicate_prototypes(u[:1]) == 0
    assert duplicate_prototypes(u.half()) == 3


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"teacher": torch.randn(3)}, ValueError, "teacher must be two-dimensional"),
        ({"prototypes": torch.randn(9, 5)}, ValueError, "teacher's 6 features, got 5"),
        ({"temperature": 0.0}, ValueError, "temperature must be finite and not zero"),
        ({"teacher_bias": torch.randn(8)}, ValueError, r"teacher_bias must have shape \(9,\)"),
        ({"row_weights": torch.rand(11)}, ValueError, r"row_weights must have shape \(12,\)"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], match: str) -> None:
    given: dict[str, Any] = {"teacher": torch.randn(12, 6), "prototypes": torch.randn(9, 6)} | change
    with pytest.raises(error, match=match):
        prototype_usage(**given)
    with pytest.raises(TypeError, match="threshold must be a number"):
        duplicate_prototypes(torch.eye(3), "high")  # type: ignore[arg-type]
