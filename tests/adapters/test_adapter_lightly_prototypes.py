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


def embeddings(views: int, batch: int, prototypes: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((views * batch, width), (batch, width), (prototypes, width))
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def uniform(mean: Tensor) -> Tensor:
    return mean.new_ones(len(mean)) / len(mean)


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # lightly's PMSNLoss
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(2, 16, 48, 12), (11, 5, 301, 7), (1, 1, 3, 4)], ids=str)
def test_msn(loss, sizes, dtype):
    inputs = embeddings(*sizes, dtype)
    makers = {
        "MSNLoss": lambda **how: loss.MSNLoss(**how),
        "PMSNLoss": lambda **how: loss.PMSNLoss(power_law_exponent=0.4, **how),
        "PMSNCustomLoss": lambda **how: loss.PMSNCustomLoss(uniform, **how),
    }
    for make in makers.values():
        for how in ({}, {"sinkhorn_iterations": 0, "regularization_weight": 3}, {"regularization_weight": -1.0}):
            criterion = make(**how)
            same_as_package("lightly", lambda *x, f=criterion: f(*x), *inputs, floor=40)
        criterion = make(temperature=0.3)
        same_as_package("lightly", lambda *x, f=criterion: f(*x, 0.5), *inputs, floor=40)


def test_msn_with_a_regulariser_of_its_own(loss):
    class Squared(loss.MSNLoss):
        def regularization_loss(self, mean_anchor_probs):
            return mean_anchor_probs.square().sum()

    same_as_package("lightly", lambda a, t, c: Squared()(a, t, c), *embeddings(3, 8, 20, 6), floor=40)


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_msn_left_to_lightly(loss):
    anchors, targets, prototypes = embeddings(2, 8, 20, 6)
    with sslfast.patch("lightly"):
        with pytest.raises(RuntimeError):
            loss.MSNLoss()(anchors[:15], targets, prototypes)
        with pytest.raises(RuntimeError):
            loss.MSNLoss()(anchors, targets[:, :5], prototypes)
    whole = loss.MSNLoss(sinkhorn_iterations=3)
    whole.regularization_weight = torch.tensor(2.0)
    reason = "a regularization_weight that is no number"
    left_to_package("lightly", lambda a, t, c: whole(a, t, c), anchors, targets, prototypes, reason=reason)
    far = torch.eye(4), -torch.eye(4), torch.eye(4)
    assert loss.MSNLoss(temperature=0.005)(*far).isinf()
    with sslfast.patch("lightly"):
        assert loss.MSNLoss(temperature=0.005)(*far).isfinite()
        half = [x.half() for x in embeddings(2, 8, 20, 6)]
        assert loss.MSNLoss()(*half).dtype == torch.float16 and loss.PMSNLoss()(*half).isfinite()
