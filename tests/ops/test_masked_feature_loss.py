"""The loss of predicted features: the kernels against the reference in float64, and against the papers' code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from helpers import DTYPES, GRAD_LOSS, roundings, value_and_gradients, within_budget
from sslfast.ops.masked_feature_loss import masked_feature_loss as public

pytestmark = pytest.mark.sanitize

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# (S masks, B images, K of L positions, D features)
SHAPES = [(4, 3, 5, 16, 64), (1, 2, 7, 7, 61), (3, 1, 1, 4, 5), (2, 5, 3, 9, 130), (2, 2, 2, 3, 2)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"beta": 0.3},
    {"beta": 0.0, "eps": 1e-3},
    {"loss": "mse", "layer_norm": False},
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, teacher_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """pred [S, B, K, D], teacher [B, L, D] whose rows have other means and deviations, ids [S, B, K]."""
    s, b, k, length, d = shape
    teacher = torch.randn(b, length, d, dtype=torch.float64) * torch.rand(b, length, 1) * 3 + torch.randn(b, length, 1)
    pred = torch.randn(s, b, k, d, dtype=torch.float64)
    return pred.to(dtype), teacher.to(teacher_dtype), torch.rand(s, b, length).argsort(2)[..., :k]


def check(pred: Tensor, teacher: Tensor, ids: Tensor, **options: Any) -> None:
    wide = torch.float64 if pred.dtype == torch.float64 else torch.float32
    with sslfast.use_backend(pred.device.type):
        kernel = value_and_gradients(lambda p: public(p, teacher, ids, **options), pred)
    teacher = teacher.to(wide)  # the kernel reads the teacher in the accumulator's dtype

    @sslfast.use_backend("reference")
    def plain(pred: Tensor) -> list[Tensor]:
        return value_and_gradients(lambda p: public(p, teacher.to(p.dtype), ids, **options), pred)

    single, truth = roundings(plain, pred.to(wide)), plain(pred.double())
    assert kernel[0].dtype == wide and kernel[1].dtype == pred.dtype
    within_budget("loss", kernel[0], single[0], truth[0], wide)
    within_budget("dpred", kernel[1], single[1].to(pred.dtype), truth[1], pred.dtype, GRAD_LOSS / pred.numel())


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(shape: tuple[int, ...], options: dict[str, Any], device: str) -> None:
    check(*(t.to(device) for t in inputs(shape, torch.float32, torch.float32)), **options)


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, teacher_dtype: torch.dtype, device: str) -> None:
    check(*(t.to(device) for t in inputs(SHAPES[3], dtype, teacher_dtype)))


def apply_masks(x: Tensor, masks: list[Tensor]) -> Tensor:
    """As facebookresearch/ijepa writes it: mask by mask, along the batch."""
    return torch.cat([torch.gather(x, 1, m.unsqueeze(-1).repeat(1, 1, x.size(-1))) for m in masks])


def test_is_the_loss_of_ijepa_and_vjepa() -> None:
    pred, teacher, ids = inputs(SHAPES[0], torch.float64, torch.float64)
    h = apply_masks(F.layer_norm(teacher, (teacher.size(-1),)), list(ids))
    z = pred.flatten(0, 1)  # [S·B, K, D]
    for form in (pred, z):
        torch.testing.assert_close(public(form, teacher, ids), F.smooth_l1_loss(z, h))
        torch.testing.assert_close(public(form, teacher, ids, beta=0), torch.mean(torch.abs(z - h) ** 1.0) / 1.0)
    torch.testing.assert_close(public(pred[2], teacher, ids[2]), F.smooth_l1_loss(pred[2], h[6:9]))


@pytest.mark.parametrize("device", DEVICES)
def test_strides_leave_the_bits(device: str) -> None:
    pred, teacher, ids = (t.to(device) for t in inputs(SHAPES[0], torch.float32, torch.bfloat16))
    expected = value_and_gradients(lambda p: public(p, teacher, ids), pred)
    longer = torch.cat([teacher[:, :2], teacher], 1)
    for rows in (longer[:, 2:], teacher.mT.contiguous().mT, teacher.transpose(0, 1).contiguous().transpose(0, 1)):
        leaf = pred.transpose(1, 3).contiguous().transpose(1, 3).requires_grad_()
        loss = public(leaf, rows, ids.mT.contiguous().mT)
        (dpred,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, GRAD_LOSS))
        assert torch.equal(loss, expected[0]) and torch.equal(dpred, expected[1])


@pytest.mark.parametrize("device", DEVICES)
def test_constant_rows_and_nan(device: str) -> None:
    pred, teacher, ids = (t.to(device) for t in inputs((1, 2, 2, 2, 9), torch.float32, torch.float32))
    teacher[0] = 0.25  # of no variance: the target is 0
    teacher[1, 1] = float("nan")
    ids[:] = torch.tensor([[[0, 1], [0, 0]]])
    loss, dpred = value_and_gradients(lambda p: public(p, teacher, ids, loss="mse"), pred)
    assert loss.isfinite()  # the row of NaN is not among those that are asked for
    torch.testing.assert_close(dpred[0, 0], GRAD_LOSS * 2 * pred[0, 0] / pred.numel())
    ids[0, 1, 1] = 1
    loss, dpred = value_and_gradients(lambda p: public(p, teacher, ids), pred)
    assert loss.isnan() and int(dpred.isnan().sum()) == 9
    assert public(pred[:, :, :0], teacher, ids[..., :0]).isnan()
    assert public(pred[:, :0], teacher[:0], ids[:, :0]).isnan()


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_opcheck_and_compile(device: str) -> None:
    pred, teacher, ids = (t.to(device) for t in inputs((2, 2, 2, 4, 3), torch.float64, torch.float32))
    pred.requires_grad_()
    with sslfast.use_backend(device):
        for options in OPTIONS[:2] + OPTIONS[3:]:
            assert torch.autograd.gradcheck(lambda p: public(p, teacher, ids, **options), pred)  # noqa: B023
        assert torch.autograd.gradgradcheck(lambda p: public(p, teacher, ids, loss="mse"), pred)
    assert not public(pred.detach(), teacher.requires_grad_(), ids).requires_grad
    flat, ids_flat, teacher = pred.detach().flatten(0, 1), ids.flatten(0, 1), teacher.detach()
    ops, options = torch.ops.sslfast, (2, 1.0, True, 1e-5)
    torch.library.opcheck(ops.masked_feature_loss.default, (flat.clone().requires_grad_(), teacher, ids_flat, *options))
    loss = ops.masked_feature_loss(flat, teacher, ids_flat, *options)
    torch.library.opcheck(ops.masked_feature_loss_backward.default, (loss, flat, teacher, ids_flat, *options))
    compiled = torch.compile(lambda p: public(p, teacher, ids), backend="aot_eager", fullgraph=True)
    found, expected = (value_and_gradients(f, pred) for f in (compiled, lambda p: public(p, teacher, ids)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_module() -> None:
    pred, teacher, ids = inputs(SHAPES[0], torch.float32, torch.float32)
    module = sslfast.MaskedFeatureLoss(beta=0.5, layer_norm=False, eps=1e-3)
    assert torch.equal(module(pred, teacher, ids), public(pred, teacher, ids, beta=0.5, layer_norm=False))
    module = sslfast.MaskedFeatureLoss("mse", eps=1e-2)
    assert torch.equal(module(pred, teacher, ids), public(pred, teacher, ids, loss="mse", eps=1e-2))
    with pytest.raises(ValueError, match="loss must be one of 'smooth_l1', 'mse', got 'l2'"):
        sslfast.MaskedFeatureLoss("l2")


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"pred": [1.0]}, TypeError, "pred must be a torch.Tensor, got list"),
    ({"teacher": torch.zeros(2, 6, 8).int()}, TypeError, "teacher must be float32, .* got torch.int32"),
    ({"teacher": torch.zeros(6, 8)}, ValueError, r"teacher must be \[B, L, D\], .* got shape \(6, 8\)"),
    (
        {"teacher": torch.zeros(2, 6, 7)},
        ValueError,
        r"pred must be \[3, 2, 4, 7\] or \[6, 4, 7\] .* got \[3, 2, 4, 8\]",
    ),
    ({"ids": torch.zeros(3, 2, 4)}, TypeError, "ids must be int64, got torch.float32"),
    ({"ids": torch.zeros(3, 4).long()}, ValueError, r"ids must be \[2, K\] or \[S, 2, K\], got shape \(3, 4\)"),
    ({"ids": torch.full((3, 2, 4), 6)}, ValueError, "ids must be positions of the teacher, 0 to 5, got 6 to 6"),
    ({"ids": torch.full((3, 2, 4), -1)}, ValueError, "ids must be .* 0 to 5, got -1 to -1"),
    ({"beta": -1.0}, ValueError, "beta must be finite and not negative, got -1.0"),
    ({"eps": float("nan")}, ValueError, "eps must be finite and not negative, got nan"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_bad_input_names_the_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {
        "pred": torch.zeros(3, 2, 4, 8),
        "teacher": torch.zeros(2, 6, 8),
        "ids": torch.zeros(3, 2, 4).long(),
        **change,
    }
    with pytest.raises(error, match=message):
        public(**given)


@pytest.mark.parametrize("device", DEVICES)
def test_operators_check_what_they_are_given(device: str) -> None:
    pred, teacher, ids = (t.to(device) for t in inputs((1, 2, 3, 4, 8), torch.float32, torch.float32))
    op, options = torch.ops.sslfast.masked_feature_loss, (2, 1.0, True, 1e-5)
    with pytest.raises(RuntimeError, match="ids has an unexpected shape"):
        op(pred[0], teacher, ids[0, :1], *options)
    with pytest.raises(RuntimeError, match="pred must have a whole number of masks"):
        op(pred[0, :1], teacher, ids[0, :1], *options)
    with pytest.raises(RuntimeError, match="beta must be positive, got 0"):
        op(pred[0], teacher, ids[0], 2, 0.0, True, 1e-5)
    if device == "cpu":
        with pytest.raises(RuntimeError, match="ids must be from 0 to 3, got 4"):
            op(pred[0], teacher, ids[0] * 0 + 4, *options)
