"""The supervised contrastive loss against the authors' formula and pytorch-metric-learning: labels, masks, modes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers import GRAD_LOSS, roundings, value_and_gradients, within_budget
from sslfast.losses.contrastive.sup_con import SupConLoss, sup_con

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def by_formula(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    contrast_mode: str = "all",
    base_temperature: float = 0.07,
) -> Tensor:
    """Equation 2 with every matrix: rows view by view, as the authors order them."""
    batch, views = features.shape[:2]
    rows = torch.cat(features.flatten(2).unbind(1))
    sample = torch.arange(batch).repeat(views)
    if labels is not None:
        weights = (labels[:, None] == labels).to(rows.dtype)
    else:
        weights = torch.eye(batch, dtype=rows.dtype) if mask is None else mask.to(rows.dtype)
    n = len(rows) if contrast_mode == "all" else batch
    itself = torch.eye(len(rows), dtype=torch.bool)[:n]
    logits = rows[:n] @ rows.T / temperature
    log_p = logits - logits.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    positive = weights[sample[:n]][:, sample].masked_fill(itself, 0.0)
    count = positive.sum(1)
    mean_log_p = (positive * log_p.masked_fill(itself, 0.0)).sum(1) / torch.where(count < 1e-6, 1.0, count)
    return -(temperature / base_temperature) * mean_log_p.mean()


def views_of(batch: int, views: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unit rows [B, V, D], the views of a sample similar, exactly representable in ``dtype``."""
    sample = torch.randn(batch, 1, d, dtype=torch.float64)
    return F.normalize(sample + torch.randn(batch, views, d, dtype=torch.float64), dim=2).to(dtype)


def check(features: Tensor, temperature: float = 0.07, labels: Tensor | None = None, **options) -> None:
    """Value and gradients with respect to features and temperature, within the error budget."""
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    tau, mask = torch.tensor(temperature, dtype=wide), options.pop("mask", None)

    def ours(x: Tensor, t: Tensor) -> Tensor:
        return sup_con(x, labels, mask=mask, temperature=t, **options)

    def plain(x: Tensor, t: Tensor) -> Tensor:
        return by_formula(x, labels, mask, temperature=t, **options)

    kernel = value_and_gradients(ours, features, tau)
    expected = roundings(value_and_gradients, plain, features.to(wide), tau)
    truth = value_and_gradients(plain, features.double(), tau.double())
    assert kernel[0].dtype == wide and kernel[1].dtype == features.dtype
    factor = GRAD_LOSS / 0.07
    floors = (1.0, factor / features.shape[0], factor / temperature)
    for name, k, p, t, floor in zip(
        ("loss", "d features", "d temperature"), kernel, expected, truth, floors, strict=True
    ):
        within_budget(name, k, p.to(k.dtype), t, features.dtype, floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("shape", [(64, 2, 32), (101, 3, 17), (5, 1, 4), (1, 2, 8), (1, 1, 3), (230, 1, 24)], ids=str)
def test_labels(shape: tuple[int, int, int], mode: str, dtype: torch.dtype) -> None:
    """Classes of many, of one and of two members; labels that are neither small, dense nor positive."""
    labels = torch.randint(0, 1 + shape[0] // 3, (shape[0],)) * 7_000_000_001 - 3
    check(views_of(*shape, dtype), 0.07, labels, contrast_mode=mode)


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("temperature", [0.02, 0.5])
def test_without_labels_and_with_every_sample_of_one_class(mode: str, temperature: float) -> None:
    x = views_of(70, 2, 20)
    check(x, temperature, contrast_mode=mode)
    check(x, temperature, torch.zeros(70, dtype=torch.int32), contrast_mode=mode)
    torch.testing.assert_close(sup_con(x), sup_con(x, torch.randperm(70)))


@pytest.mark.parametrize("mode", ["all", "one"])
def test_mask(mode: str) -> None:
    """Not symmetric, weighted, with rows that are empty or hold the sample itself alone, and boolean."""
    mask = (torch.rand(60, 60) < 0.1) * torch.rand(60, 60)
    mask[3], mask[4] = 0, F.one_hot(torch.tensor(4), 60)
    check(views_of(60, 2, 20), mask=mask, contrast_mode=mode)
    check(views_of(60, 1, 20), mask=mask > 0, contrast_mode=mode)
    labels = torch.randint(0, 9, (60,))
    x = views_of(60, 3, 20)
    torch.testing.assert_close(sup_con(x, mask=labels[:, None] == labels), sup_con(x, labels))


def test_anchors_without_positives() -> None:
    """They count as zero in the mean, and neither their loss nor their gradient is NaN."""
    x, labels = views_of(6, 1, 8).double(), torch.tensor([0, 0, 1, 2, 3, 4])
    some = value_and_gradients(lambda x: sup_con(x, labels), x)
    nonzero = value_and_gradients(lambda x: sup_con(x, labels, reduction="mean_nonzero"), x)
    for a, b in zip(some, nonzero, strict=True):
        torch.testing.assert_close(3 * a, b)  # 2 of 6 anchors
    for reduction in ("mean", "mean_nonzero"):
        for t in value_and_gradients(lambda x, r=reduction: sup_con(x, torch.arange(6), reduction=r), x):
            assert torch.equal(t, torch.zeros_like(t))


@pytest.mark.parametrize("classes", [4, 25, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_pytorch_metric_learning(classes: int, dtype: torch.dtype) -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    x, labels = 3 * torch.randn(70, 16, dtype=dtype), torch.randint(0, classes, (70,))
    ours = SupConLoss(0.1, base_temperature=0.1, normalize=True, reduction="mean_nonzero")
    expected = value_and_gradients(lambda x: losses.SupConLoss()(x, labels), x)
    got = value_and_gradients(lambda x: ours(x[:, None], labels), x)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_module_and_shapes() -> None:
    x, labels = views_of(20, 2, 12), torch.randint(0, 5, (20,))
    assert torch.equal(SupConLoss()(x, labels), sup_con(x, labels))
    assert torch.equal(SupConLoss()(x.view(20, 2, 3, 2, 2), labels), sup_con(x, labels))
    learns = torch.nn.Parameter(torch.tensor([0.2]))
    module = SupConLoss(learns, base_temperature=0.2)
    loss = module(x, mask=torch.eye(20))
    loss.backward()
    assert loss.shape == () and list(module.state_dict()) == ["temperature"] and learns.grad != 0


def test_compile_without_graph_breaks() -> None:
    x, labels = views_of(30, 2, 12), torch.randint(0, 5, (30,))
    for options in ({}, {"reduction": "mean_nonzero", "contrast_mode": "one", "normalize": True}):
        module = SupConLoss(**options)
        step = torch.compile(module, fullgraph=True, backend="aot_eager")
        got = value_and_gradients(lambda x, step=step: step(x, labels), x)
        for a, b in zip(got, value_and_gradients(lambda x, m=module: m(x, labels), x), strict=True):
            torch.testing.assert_close(a, b)


X = torch.ones(4, 2, 3)
LABELS = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("features", "options", "error", "message"),
    [
        (torch.ones(4, 3), {}, ValueError, r"features must be \[samples, views, features.*\(4, 3\)"),
        (X.int(), {}, TypeError, "features .*float32.*int32"),
        (torch.ones(4, 0, 3), {}, ValueError, "at least one sample, one view"),
        (X, {"labels": LABELS[:3]}, ValueError, r"labels must have shape \(4,\)"),
        (X, {"labels": LABELS.to(torch.complex64)}, TypeError, "labels must hold integers"),
        (X, {"labels": LABELS * float("nan")}, ValueError, "labels must be no NaN"),
        (X, {"labels": LABELS, "mask": torch.eye(4)}, ValueError, "labels or mask, not both"),
        (X, {"mask": torch.eye(4)[:, :3]}, ValueError, r"mask must have shape \(4, 4\), got \(4, 3\)"),
        (X, {"mask": torch.eye(3)}, ValueError, r"mask must have shape \(4, samples of all ranks\), got \(3, 3\)"),
        (X, {"contrast_mode": "two"}, ValueError, "contrast_mode must be 'all' or 'one', got 'two'"),
        (X, {"reduction": "sum"}, ValueError, "reduction must be"),
        (X, {"temperature": 0.0}, ValueError, "temperature must be finite and not zero"),
        (X, {"base_temperature": 0}, ValueError, "base_temperature must be a number and not zero, got 0"),
    ],
)
def test_wrong_input(features, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sup_con(features, **options)


def test_diagnostics_need_classes() -> None:
    with pytest.raises(ValueError, match="diagnostics=True needs labels"):
        SupConLoss(diagnostics=True)(X, mask=torch.eye(4))


def test_a_nan_comes_out_of_the_mean_over_nonzero_rows() -> None:
    features = torch.randn(4, 2, 8)
    features[2, 0, 1] = float("nan")
    assert sup_con(features, reduction="mean_nonzero").isnan()
