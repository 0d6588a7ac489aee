"""SeLa's labels: against the published procedure in float64, chunks, features, what would overflow, wrong input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sslfast
from sslfast.clustering import self_labelling as module

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def published(logits: Tensor, sharpness: float = 25.0, tolerance: float = 0.1) -> Tensor:
    """Algorithm 1, from probabilities in float64."""
    p = torch.softmax(logits.double(), 1) ** sharpness  # [N, K]
    n, k = p.shape
    c = torch.full((n,), 1 / n, dtype=torch.float64)
    step, error = 0, 1e6
    while error > tolerance:
        r = (1 / k) / (p.T @ c)
        new = (1 / n) / (p @ r)
        if step % 10 == 0:
            error = (c / new - 1).abs().nansum().item()
        c, step = new, step + 1
    return (p * r).argmax(1)


@pytest.mark.parametrize("sharpness", [1.0, 5.0, 25.0])
@pytest.mark.parametrize("size", [(60, 7), (301, 13), (40, 40), (1, 1), (5, 1)], ids=str)
def test_labels_are_the_published_ones(size: tuple[int, int], sharpness: float) -> None:
    logits = 0.5 * torch.randn(size) + torch.randn(size[1])
    found = sslfast.self_labelling(logits, sharpness=sharpness)
    assert found.dtype == torch.int64 and torch.equal(found, published(logits, sharpness))


def test_prototypes_have_the_same_share() -> None:
    logits = torch.randn(2000, 10) + torch.linspace(0, 5, 10)  # the last would get most
    counts = torch.bincount(sslfast.self_labelling(logits, tolerance=1e-3), minlength=10)
    assert counts.min() > 150 and counts.max() < 250


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_features_are_streamed(monkeypatch: pytest.MonkeyPatch, bias: bool, dtype: torch.dtype) -> None:
    """In chunks of 7 rows, the last one of 3; strides; no gradient."""
    z = torch.stack([torch.randn(80, 6)] * 2, 2)[..., 1].to(dtype).requires_grad_()
    w, b = torch.randn(9, 6).to(dtype), torch.randn(9).to(dtype) if bias else None
    logits = z.detach().double() @ w.double().T + (b.double() if bias else 0.0)
    monkeypatch.setattr(module, "CHUNK_BYTES", 7 * 8 * 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sslfast.self_labelling(z, w, bias=b)
    assert torch.equal(found, published(logits))
    assert torch.equal(found, sslfast.self_labelling(logits))


def test_logits_whose_probabilities_vanish() -> None:
    """exp(−25·100) is 0 in float64: the published form divides by it."""
    logits = torch.tensor([[100.0, 0.0], [90.0, 0.0], [80.0, 0.0], [70.0, 0.0]])
    assert sslfast.self_labelling(logits).tolist() == [0, 0, 1, 1]


def test_the_iterations_that_were_not_enough_are_told(recwarn: pytest.WarningsRecorder) -> None:
    logits = torch.randn(300, 20) + torch.linspace(0, 9, 20)
    sslfast.self_labelling(logits, max_iterations=11)
    assert "after 11 iterations the error is still above tolerance=0.1" in str(recwarn.pop(UserWarning).message)


X = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X[0],), {}, ValueError, r"outputs must be two-dimensional"),
        ((X.long(),), {}, TypeError, r"outputs must be float32"),
        ((X, torch.ones(5, 2)), {}, ValueError, r"prototypes must have outputs' 3 features, got 2"),
        ((X, X), {"bias": torch.ones(3)}, ValueError, r"bias must have shape \(4,\), got \(3,\)"),
        ((X,), {"bias": torch.ones(3)}, ValueError, r"bias belongs to prototypes"),
        ((X,), {"sharpness": 0.0}, ValueError, r"sharpness must be a positive number, got 0.0"),
        ((X,), {"tolerance": -1}, ValueError, r"tolerance must not be negative, got -1"),
        ((X,), {"max_iterations": 0}, ValueError, r"max_iterations must be a whole number of at least 1, got 0"),
    ],
)
def test_wrong_input(arguments, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sslfast.self_labelling(*arguments, **options)
