"""data2vec's regression: the values of fairseq's two models, written out; its spreads; wrong input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from helpers import DTYPES, GRAD_LOSS, check_loss, value_and_gradients

B, L, D, BLOCKS = 3, 9, 20, 5
OPTIONS: list[dict[str, Any]] = [
    {},
    {"loss": "smooth_l1", "beta": 2.0},
    {"normalize_layers": "layer"},
    {"normalize_layers": "instance", "normalize_targets": "layer"},  # data2vec 2.0's image models
    {"normalize_layers": "batch", "normalize_targets": "instance", "scale": 1.0},
    {"normalize_targets": "batch", "loss": "smooth_l1", "beta": 0.3},
]


def inputs(dtype: torch.dtype = torch.float64, kept: int = 4) -> tuple[Tensor, list[Tensor], Tensor]:
    """Predictions of some positions, blocks whose features and positions have other means, and the positions."""
    spread, shift = torch.rand(D, dtype=torch.float64) + 0.5, torch.randn(L, D, dtype=torch.float64)
    layers = [torch.randn(B, L, D, dtype=torch.float64) * spread + shift for _ in range(BLOCKS)]
    ids = torch.rand(B, L).argsort(1)[:, :kept]
    return torch.randn(B, kept, D, dtype=torch.float64).to(dtype), [x.to(dtype) for x in layers], ids


def normed(x: Tensor, norm: str) -> Tensor:
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:])
    if norm == "instance":
        return F.instance_norm(x.transpose(1, 2)).transpose(1, 2)
    if norm == "batch":
        return F.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2)
    return x


def fairseq(pred: Tensor, layers: list[Tensor], ids: Tensor, top_k: int, **how: Any) -> Tensor:
    """data2vec_vision's forward, and its criterion: the sum over the sample size."""
    y = sum(normed(x.to(pred), how.get("normalize_layers", "none")) for x in layers[-top_k:]) / top_k
    y = normed(y, how.get("normalize_targets", "none"))
    mask = torch.zeros(B, L, dtype=torch.bool).scatter(1, ids, True)
    in_order = pred.gather(1, ids.argsort(1)[..., None].expand_as(pred)).flatten(0, 1)
    y = y[mask]
    beta = how.get("beta", 1.0) if how.get("loss") == "smooth_l1" else 0
    terms = (
        F.mse_loss(in_order, y, reduction="none")
        if beta == 0
        else (F.smooth_l1_loss(in_order, y, reduction="none", beta=beta))
    )
    loss = terms.sum(-1) * how.get("scale", 1 / math.sqrt(D))
    return loss.sum() / loss.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_is_fairseqs(top_k: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    pred, layers, ids = inputs(dtype)
    check_loss(
        lambda p: sslfast.data2vec(p, layers, ids, top_k=top_k, **options),
        lambda p: fairseq(p, layers, ids, top_k, **options),
        (pred,),
        floor=math.sqrt(D),
        terms=pred.shape[0] * pred.shape[1],
    )


def test_is_data2vec_2s_with_clones_of_a_batch() -> None:
    """Two masks of each image, one forward of the teacher; the criterion is what sums the features."""
    _, layers, _ = inputs()
    ids = torch.rand(2, B, L).argsort(-1)[..., :4]
    pred = torch.randn(2, B, 4, D, dtype=torch.float64)
    target = F.layer_norm(sum(normed(x, "instance") for x in layers[-2:]) / 2, (D,))
    cloned = torch.cat([target.gather(1, i[..., None].expand(-1, -1, D)) for i in ids])
    each = F.mse_loss(pred.flatten(0, 1), cloned, reduction="none") / math.sqrt(D)
    how: dict[str, Any] = {"top_k": 2, "normalize_layers": "instance", "normalize_targets": "layer"}
    for form in (pred, pred.flatten(0, 1)):
        torch.testing.assert_close(sslfast.data2vec(form, layers, ids, **how), each.sum() / ids.numel())
    criterion = sslfast.Data2VecLoss(**how)
    assert torch.equal(criterion(pred, torch.stack(layers), ids), sslfast.data2vec(pred, layers, ids, **how))
    assert "normalize_layers='instance'" in repr(criterion)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_spreads(options: dict[str, Any]) -> None:
    pred, layers, ids = inputs()
    loss, found = sslfast.Data2VecLoss(3, **options, diagnostics=True)(pred, layers, ids)
    assert torch.equal(loss, sslfast.data2vec(pred, layers, ids, top_k=3, **options))
    y = sum(normed(x, options.get("normalize_layers", "none")) for x in layers[-3:]) / 3
    y = normed(y, options.get("normalize_targets", "none")).gather(1, ids[..., None].expand(-1, -1, D))
    for spread, rows in zip(found, (y, pred), strict=True):
        torch.testing.assert_close(spread, (rows.flatten(0, 1).var(0) + 1e-6).sqrt().mean())
        assert not spread.requires_grad


def test_the_layers_stay_as_they_are_and_get_no_gradient() -> None:
    pred, layers, ids = inputs(torch.float32)
    before = [x.clone().requires_grad_() for x in layers]
    leaf = pred.requires_grad_()
    for norm in ("none", "layer", "instance", "batch"):
        sslfast.data2vec(leaf, before, ids, top_k=1, normalize_layers=norm).backward()
    assert all(x.grad is None and torch.equal(x, y) for x, y in zip(before, layers, strict=True))


def test_mixed_dtypes_autocast_and_compile() -> None:
    pred, layers, ids = inputs(torch.float32)
    expected = value_and_gradients(lambda p: sslfast.data2vec(p, layers, ids, top_k=2, **OPTIONS[3]), pred)
    compiled = torch.compile(sslfast.data2vec, backend="aot_eager", fullgraph=True)
    found = value_and_gradients(lambda p: compiled(p, layers, ids, top_k=2, **OPTIONS[3]), pred)
    torch.testing.assert_close(found, expected)
    with torch.autocast("cpu", torch.bfloat16):
        loss = sslfast.data2vec(pred, layers, ids, top_k=2, **OPTIONS[3])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected[0])
    mixed = sslfast.data2vec(pred.double(), [x.bfloat16() for x in layers], ids, top_k=2)
    assert mixed.dtype == torch.float64
    torch.testing.assert_close(mixed, fairseq(pred.double(), [x.bfloat16() for x in layers], ids, 2))


def test_second_derivatives() -> None:
    pred, layers, ids = inputs()
    leaf = pred[:, :2].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda p: sslfast.data2vec(p, layers, ids[:, :2], top_k=2), leaf)


def test_one_position_and_none() -> None:
    pred, layers, ids = inputs(kept=1)
    how: dict[str, Any] = {"top_k": 1, "normalize_layers": "instance"}
    one = [x[:, :1] for x in layers]  # of one position: no variance, the target is 0
    expected = pred.square().sum(-1).mean() / math.sqrt(D)
    torch.testing.assert_close(sslfast.data2vec(pred, one, torch.zeros_like(ids), **how), expected)
    assert sslfast.data2vec(pred[:, :0], layers, ids[:, :0], **how).isnan()
    layers[-1][:] = float("nan")
    assert sslfast.data2vec(pred, layers, ids, **how).isnan()


def test_bad_input() -> None:
    pred, layers, ids = inputs(torch.float32)
    wrong = [
        (TypeError, "pred must be a torch.Tensor, got list", ([1.0], layers, ids), {}),
        (ValueError, "layers must be at least top_k = 8 blocks' outputs, got 5", (pred, layers, ids), {}),
        (TypeError, r"layers must be a sequence .* got shape \(3, 9, 20\)", (pred, layers[0], ids), {}),
        (TypeError, "layers must be float32.* got torch.int64", (pred, [x.long() for x in layers], ids), {"top_k": 1}),
        (ValueError, r"layers must be \[B, L, D\], all of one", (pred, [layers[0], layers[1][1:]], ids), {"top_k": 2}),
        (
            ValueError,
            "normalize_layers must be one of 'none', 'layer', .* got 'group'",
            (pred, layers, ids),
            {"top_k": 1, "normalize_layers": "group"},
        ),
        (ValueError, "loss must be one of 'smooth_l1', 'mse'", (pred, layers, ids), {"top_k": 1, "loss": "l1"}),
        (ValueError, "scale must be finite", (pred, layers, ids), {"top_k": 1, "scale": float("inf")}),
        (ValueError, "top_k must be a whole number of at least 1, got 0", (pred, layers, ids), {"top_k": 0}),
        (ValueError, "ids must be positions of the teacher", (pred, layers, ids + 9), {"top_k": 1}),
        (ValueError, r"pred must be \[3, 4, 20\]", (pred[:, 1:], layers, ids), {"top_k": 1}),
    ]
    for kind, message, arguments, options in wrong:
        with pytest.raises(kind, match=message):
            sslfast.data2vec(*arguments, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="normalize_targets must be one of"):
        sslfast.Data2VecLoss(normalize_targets="group")
    with pytest.raises(ValueError, match="loss must be one of"):
        sslfast.Data2VecLoss(loss="l1")
    leaf = pred.requires_grad_()
    assert torch.autograd.grad(sslfast.data2vec(leaf, layers, ids, top_k=1) * GRAD_LOSS, leaf)[0].isfinite().all()
