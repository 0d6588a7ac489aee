"""Sinkhorn's bias against the published loop in float64, and DINO's centre against the mean of all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from helpers import within_budget
from sslfast import NormalizedPrototypes, center_update_, prototype_sinkhorn
from sslfast.ops import prototype_columns


def published(scores: Tensor, temperature: float, iterations: int) -> Tensor:
    """facebookresearch/swav's distributed_sinkhorn on one process: assignments of scores [N, K]."""
    q = torch.exp(scores / temperature).T  # [K, N]
    q /= q.sum()
    k, n = q.shape
    for _ in range(iterations):
        q /= q.sum(1, keepdim=True)
        q /= k
        q /= q.sum(0, keepdim=True)
        q /= n
    return (q * n).T


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
@pytest.mark.parametrize("shape", [(64, 16, 32), (20, 5, 67), (1, 8, 9), (30, 4, 1)], ids=str)
def test_assignments_are_the_published_ones(shape: tuple[int, int, int], iterations: int) -> None:
    n, d, k = shape
    h, u = unit(n, d), unit(k, d)
    right = published(h @ u.T, 0.05, iterations)
    found = torch.softmax(h @ u.T / 0.05 + prototype_sinkhorn(h, u, 0.05, iterations), 1)
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype: torch.dtype) -> None:
    h, u = unit(100, 32).to(dtype), unit(200, 32).to(dtype)
    f = prototype_sinkhorn(h, u)
    assert f.dtype == torch.float32 and not f.requires_grad
    truth = prototype_sinkhorn(h.double(), u.double())
    with sslfast.use_backend("reference"):
        within_budget("f", f, prototype_sinkhorn(h, u), truth, torch.float32)


def test_logits_that_overflow_the_published_loop() -> None:
    """A logit of 4 at τ = 0.04 is exp(100), which float32 has not; prototypes far from every row stay finite too."""
    h, u = torch.randn(60, 8), 3 * torch.randn(50, 8)
    assert not published(h @ u.T, 0.04, 3).isfinite().all()
    f = prototype_sinkhorn(h, u)
    right = published((h @ u.T).double() - (h @ u.T).double().max(), 0.4, 3)
    assert f.isfinite().all() and right.isfinite().all()
    p = torch.softmax(h @ u.T / 0.04 + f, 1)
    torch.testing.assert_close(p.sum(1), torch.ones(60))
    found = torch.softmax(h @ u.T / 0.4 + prototype_sinkhorn(h, u, 0.4), 1)
    torch.testing.assert_close(found.double(), right, rtol=1e-3, atol=1e-5)


def test_rows_that_take_no_part() -> None:
    h, u = torch.randn(12, 6), torch.randn(9, 6)
    weights = torch.tensor([0.5, 0.0, 0.25] * 4)
    right = prototype_sinkhorn(h[weights != 0], u, 0.5)
    h[weights == 0] = float("nan")
    torch.testing.assert_close(prototype_sinkhorn(h, u, 0.5, row_weights=weights), right)
    center = torch.zeros(9)
    center_update_(center, h, u, 0.5, row_weights=weights)
    torch.testing.assert_close(center, 0.5 * (h[weights != 0] @ u.T).mean(0))
    before = center.clone()
    assert torch.equal(center_update_(center, h, u, row_weights=torch.zeros(12)), before)


def test_more_logits_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the first visit's logits is kept, the rest computed again; and with torch.compile."""
    h, u = unit(300, 12), unit(3000, 12)
    right = published(h @ u.T, 0.05, 3)
    for most in (0, 2 << 20):
        monkeypatch.setattr(prototype_columns, "LEAST_KEPT", most)
        monkeypatch.setattr(prototype_columns, "MOST_KEPT", most)
        monkeypatch.setattr(prototype_columns, "MOST_OF_CHUNK", 0)
        for call in (prototype_sinkhorn, torch.compile(prototype_sinkhorn, fullgraph=True)):
            found = torch.softmax(h @ u.T / 0.05 + call(h, u, 0.05), 1)
            torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(9,), (1, 9), (1, 1, 9)])
def test_center(shape: tuple[int, ...]) -> None:
    teacher, u, center = torch.randn(2, 7, 6), torch.randn(9, 6), torch.randn(shape)
    right = 0.9 * center + 0.1 * (teacher @ u.T).mean((0, 1)).view(shape)
    assert center_update_(center, teacher, u) is center
    torch.testing.assert_close(center, right)
    # Two halves of a step, weighted by their rows, or one: accumulation calls it once, with all of them.
    gain = torch.rand(9) + 0.5
    prototypes = NormalizedPrototypes(u, gain)
    right = 0.9 * center + 0.1 * (teacher @ (gain[:, None] * F.normalize(u)).T).mean((0, 1)).view(shape)
    torch.testing.assert_close(center_update_(center, teacher, prototypes), right)
    f = prototype_sinkhorn(teacher[0], prototypes, 0.5)
    torch.testing.assert_close(f, prototype_sinkhorn(teacher[0], gain[:, None] * F.normalize(u), 0.5))


def test_half_precision_center() -> None:
    """DINO sums a batch's logits in the logits' dtype: 2,048 rows of 40 are infinite in float16."""
    teacher, u, center = torch.full((2048, 4), 10.0).half(), torch.ones(3, 4).half(), torch.zeros(3)
    torch.testing.assert_close(center_update_(center, teacher, u, 0.0), torch.full((3,), 40.0))


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"teacher": torch.randn(3)}, ValueError, "teacher must be two-dimensional"),
        ({"prototypes": torch.randn(9, 5)}, ValueError, "teacher's 6 features, got 5"),
        ({"temperature": 0.0}, ValueError, "temperature must be finite and not zero"),
        ({"temperature": None}, TypeError, "temperature must be a number"),
        ({"iterations": 0}, ValueError, "iterations must be a whole number of at least 1"),
        ({"row_weights": torch.rand(11)}, ValueError, r"row_weights must have shape \(12,\)"),
        ({"row_weights": [1.0] * 12}, TypeError, "row_weights must be a torch.Tensor"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], match: str) -> None:
    given: dict[str, Any] = {"teacher": torch.randn(12, 6), "prototypes": torch.randn(9, 6)} | change
    with pytest.raises(error, match=match):
        prototype_sinkhorn(**given)


def test_bad_centers() -> None:
    h, u = torch.randn(12, 6), torch.randn(9, 6)
    with pytest.raises(ValueError, match="one number for each of 9 prototypes, got 8"):
        center_update_(torch.zeros(8), h, u)
    with pytest.raises(TypeError, match="floating-point"):
        center_update_(torch.zeros(9, dtype=torch.int64), h, u)
    with pytest.raises(ValueError, match="momentum must be between 0 and 1"):
        center_update_(torch.zeros(9), h, u, 1.5)
