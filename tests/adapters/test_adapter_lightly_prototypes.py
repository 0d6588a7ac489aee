"""lightly's losses over prototypes with sslfast inside: the same losses, gradients, centres and errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sslfast
from adapter_common import left_to_package, peer, same_as_package

DTYPES = [torch.float32, torch.float64]


@pytest.fixture(scope="module")
def loss():
    return peer("lightly.loss")


def views(count: int, shape: tuple[int, int], dtype: torch.dtype = torch.float32, size: float = 1.0) -> list[Tensor]:
    return [(size * torch.randn(shape, dtype=torch.float64)).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(32, 48), (17, 301), (2, 5), (1, 3)], ids=str)
def test_swav(loss, shape, dtype):
    def call(*scores, queued=False, **how):
        queue = [s.detach().flip(0) / 2 for s in scores[:2]] if queued else None
        return loss.SwaVLoss(**how)(list(scores[:2]), list(scores[2:]), queue)

    scores = views(5, shape, dtype, size=0.3)
    same_as_package("lightly", call, *scores, floor=10)
    same_as_package("lightly", lambda *s: call(*s, queued=True), *scores, floor=10)
    same_as_package("lightly", lambda *s: call(*s, temperature=0.3, sinkhorn_iterations=1), *scores[:2], floor=10)


def test_swav_left_to_lightly(loss):
    a, b = views(2, (8, 6), size=0.3)
    no_step = loss.SwaVLoss(sinkhorn_iterations=0)
    left_to_package("lightly", lambda a, b: no_step([a, b], []), a, b, reason="no iteration of Sinkhorn's")
    with sslfast.patch("lightly"):
        assert loss.SwaVLoss()([a, b], []).shape == (1,)
        assert loss.SwaVLoss()([100 * a, 100 * b], []).isfinite().all()  # where lightly's is NaN
    assert loss.SwaVLoss()([100 * a, 100 * b], []).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(32, 48), (17, 301), (1, 3)], ids=str)
def test_dino(loss, shape, dtype):
    def call(*logits, **how):
        criterion = loss.DINOLoss(shape[1], 0.04, 0.07, 5).to(dtype)
        first = criterion([x.detach() for x in logits[:2]], list(logits), **how)
        again = criterion([x.detach().flip(0) for x in logits[:2]], list(logits), **how)  # with another centre
        return first, again, criterion.center

    for how in ({}, {"epoch": 3}, {"epoch": 9}, {"teacher_temp": 0.1}):
        same_as_package("lightly", lambda *x, how=how: call(*x, **how), *views(4, shape, dtype), floor=40)


def test_dino_left_to_lightly(loss):
    a, b = views(2, (8, 6))

    class Frozen(loss.DINOLoss):
        def update_center(self, teacher_out):
            pass

    left_to_package(
        "lightly", lambda a, b: Frozen(6)([a, b], [a, b]), a, b, reason="Frozen has a update_center of its own"
    )
    with sslfast.patch("lightly"), pytest.raises(ValueError, match="requires at least two views"):
        loss.DINOLoss(6)([a], [b])
    with sslfast.patch("lightly"), pytest.raises(IndexError):
        loss.DINOLoss(6)([a, b], [a, b], epoch=-31)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ibot(loss, dtype):
    mask = torch.rand(5, 4, 4) < 0.4
    mask[2] = False
    rows = int(mask.sum())

    def call(teacher, student):
        criterion = loss.IBOTPatchLoss(70).to(dtype)
        first = criterion(teacher.detach(), student, mask)
        return first, criterion(teacher.detach(), student, mask, teacher_temp=0.1), criterion.center.value

    same_as_package("lightly", call, *views(2, (rows, 70), dtype), floor=40)
    with sslfast.patch("lightly"), pytest.raises((RuntimeError, IndexError)):
        loss.IBOTPatchLoss(70)(*views(2, (rows + 1, 70)), mask)
