"""lightly's losses over prototypes with sslfast inside: the same losses, gradients, centres and errors."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import sslfast
from adapter_common import left_to_package, peer, same_as_package
from lightly_common import lightly_loss

DTYPES = [torch.float32, torch.float64]


@pytest.fixture(scope="module")
def loss():
    return peer("lightly.loss")


def views(count: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, size: float = 1.0) -> list[Tensor]:
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 7, 70), (5 * 7, 70)], ids=str)
def test_ibot_plus_plus(loss, shape, dtype):
    mask = torch.rand(5, 7) < 0.4
    mask[2], mask[3] = False, True

    def call(teacher, student, **how):
        criterion = loss.IBOTPlusPlusPatchLoss(70).to(dtype)
        first = criterion(teacher.detach(), student, **how)
        return first, criterion(teacher.detach(), student, **how, teacher_temp=0.1), criterion.center.value

    for how in (
        {"mask": mask},
        {"mask": mask.view(5, 7, 1), "visible_loss_weight": 0.3},
        *([{}] if len(shape) == 3 else []),
    ):
        same_as_package("lightly", lambda *x, how=how: call(*x, **how), *views(2, shape, dtype), floor=40)


def test_ibot_plus_plus_left_to_lightly(loss):
    teacher, student = views(2, (2, 3, 6))
    masked = torch.ones(2, 3, dtype=torch.bool)

    def call(teacher, student, **how):
        return loss.IBOTPlusPlusPatchLoss(6)(teacher.detach(), student, **how)

    for how, reason in (
        ({"mask": masked.float()}, "a mask that is no bool tensor"),
        ({"mask": masked, "visible_loss_weight": torch.tensor(0.5)}, "a visible_loss_weight that is no number"),
    ):
        left_to_package("lightly", partial(call, **how), teacher, student, reason=reason)
    with sslfast.patch("lightly"), pytest.raises(ValueError, match="mask is required"):
        call(teacher.flatten(0, 1), student.flatten(0, 1))
    with sslfast.patch("lightly"), pytest.raises(ValueError, match="same shape"):
        call(teacher, student[:1])


def as_lightly_without_epsilon(monkeypatch, capi_loss):
    """Its own function with an epsilon of 0 in place of 1e-8, which float64 shows."""
    own = capi_loss.sinkhorn_knopp
    monkeypatch.setattr(capi_loss, "sinkhorn_knopp", lambda **how: own(**how, epsilon=0.0))


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("shape", [(8, 5, 48), (17, 3, 301), (1, 4, 5), (2, 1, 1)], ids=str)
def test_capi(loss, shape, index, monkeypatch):
    batch, tokens, _ = shape
    meets = torch.rand(batch, tokens).argsort(1)[:, : max(1, tokens // 2)] if index else None
    teacher, student = views(2, shape, size=0.3)
    student = student if meets is None else student[:, : meets.shape[1]]

    def call(teacher, student, **how):
        return loss.CAPILoss(**how)(teacher, student, meets)

    as_lightly_without_epsilon(monkeypatch, lightly_loss("capi_loss"))
    for how in ({}, {"teacher_temperature": 0.3, "student_temperature": 1.0, "sinkhorn_iterations": 1}):
        patched = partial(call, **how)
        same_as_package("lightly", patched, teacher, student, floor=40)


def test_the_epsilon_that_is_left_out_is_below_float32_of_recipes(loss):
    """At 64 images and 1,024 clusters; logits of cosines, as the head's are, and far apart."""
    for size in (0.1, 1.0):
        teacher, student = views(2, (64, 3, 1024), size=size)
        own = loss.CAPILoss()(teacher, student)
        with sslfast.patch("lightly"):
            torch.testing.assert_close(loss.CAPILoss()(teacher, student), own, rtol=3e-6, atol=0)


def test_a_token_that_is_far_from_all_clusters():
    """Every logit 30 below its cluster's largest: the epsilon leaves nothing of it, and here it counts."""
    logits = torch.zeros(4, 1, 6)
    logits[0] -= 30
    capi = lightly_loss("capi_loss")
    assert capi.sinkhorn_knopp(logits, iterations=1)[0].sum() < 1e-4
    with sslfast.patch("lightly"):
        torch.testing.assert_close(capi.sinkhorn_knopp(logits, iterations=1).sum(2), torch.ones(4, 1))


def test_capi_left_to_lightly(loss):
    teacher, student = views(2, (4, 3, 6))
    criterion, meets = loss.CAPILoss(), torch.tensor([[0, 2]] * 4)
    left_to_package("lightly", criterion, teacher.double(), student.double(), reason="float64, whose last digits")
    none = loss.CAPILoss(sinkhorn_iterations=0)
    left_to_package("lightly", none, teacher, student, reason="no iteration of Sinkhorn's")
    with sslfast.patch("lightly"):
        with pytest.raises(RuntimeError):
            criterion(teacher, student[:, :2], meets + 1)
        assert criterion(300 * teacher, student).isfinite()
    own = criterion(teacher, student[:1])
    with sslfast.patch("lightly"), pytest.warns(UserWarning, match="logits of several shapes"):
        torch.testing.assert_close(criterion(teacher, student[:1]), own)  # its own code, which calls a served function


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinkhorns_of_a_script(dtype):
    """The two functions where a user calls them; lightly's name for its module's own is the served one, too."""
    swav, capi = lightly_loss("swav_loss"), lightly_loss("capi_loss")
    out, logits = views(1, (32, 48), dtype, 0.3)[0], views(1, (9, 4, 30), dtype)[0]
    same_as_package("lightly", lambda x: swav.sinkhorn(x, 2, epsilon=0.1) + 0 * x, out, floor=1)
    same_as_package("lightly", lambda x: swav.sinkhorn(out=x) + 0 * x, out, floor=1)
    same_as_package("lightly", lambda x: capi.sinkhorn_knopp(x, epsilon=0.0) + 0 * x, logits, floor=1)
    left_to_package(
        "lightly", lambda x: capi.sinkhorn_knopp(x, epsilon=1e-3) + 0 * x, logits, reason="epsilon of 0.001"
    )
    left_to_package("lightly", lambda x: swav.sinkhorn(x, 0) + 0 * x, out, reason="no iteration")
    if dtype == torch.float64:
        left_to_package("lightly", lambda x: capi.sinkhorn_knopp(x) + 0 * x, logits, reason="float64, whose last")
    with sslfast.patch("lightly") as patched:
        assert {"sinkhorn", "sinkhorn_knopp"} <= set(patched.replaced)
        assert not swav.sinkhorn(out.requires_grad_()).requires_grad
        assert swav.sinkhorn(out.detach().half()).dtype == torch.float16
        if dtype == torch.float32:
            torch.testing.assert_close(capi.sinkhorn_knopp(logits), capi.sinkhorn_knopp.__wrapped__(logits))


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
