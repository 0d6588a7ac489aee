"""DINOv2's and DINOv3's losses with sslfast inside: what is left to them, their errors, and the patch itself."""

from __future__ import annotations

import copy
import warnings

import dinov2.loss as v2
import dinov3.loss as v3
import pytest
import torch
from torch import Tensor

import sslfast
from adapter_common import left_to_package
from dino_common import CLOSE, logits, masks_of, targets, tried_once  # noqa: F401  (a fixture)

pytestmark = pytest.mark.usefixtures("tried_once")


def learning(x: Tensor) -> Tensor:
    return x.detach().softmax(-1).requires_grad_()


LEFT = {
    "a tensor temperature": (v2, lambda x: v2.DINOLoss(6).softmax_center_teacher(x, torch.tensor(0.1)), "temperature"),
    "no iteration": (v2, lambda x: v2.DINOLoss(6).sinkhorn_knopp_teacher(x, 0.5, 0), "no iteration"),
    "several shapes": (v2, lambda x: v2.DINOLoss(6)([x], [x[:1].softmax(-1).detach()]), "views of several shapes"),
    "a teacher that learns": (v2, lambda x: v2.DINOLoss(6)([x], [learning(x)]), "a gradient for the teacher"),
    "weights that broadcast": (
        v2,
        lambda x: v2.iBOTPatchLoss(6).forward_masked(x, targets(4, 6), masks_of(3, 1), None, torch.ones(1)),
        "weights that are not one for each token",
    ),
    "weights that learn": (
        v3,
        lambda x: v3.iBOTPatchLoss(6).forward_masked(
            x, targets(4, 6), masks_of(3, 1), None, torch.ones(4, requires_grad=True)
        ),
        "with a gradient",
    ),
    "other distances": (v2, lambda x: distance_of(v2.KoLeoLoss(), 1)(x), "a distance that is not Euclidean"),
    "two eps": (v3, lambda x: v3.KoLeoLoss()(x, eps=1e-6), "two of them"),
    "all neighbours": (v3, lambda x: v3.KoLeoLossDistributed(4)(x), "more neighbours"),
    "a Gram teacher that learns": (v3, lambda x: v3.GramLoss()(x[None], x[None] + 1), "a gradient for the teacher"),
    "one view without itself": (
        v3,
        lambda x: torch.nan_to_num(v3.DINOLoss(6)(x[None], targets(1, 4, 6), True).detach()),
        "one view",
    ),
}


def distance_of(loss, p):
    loss.pdist.norm = p
    return loss


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_the_package(name):
    package, call, reason = LEFT[name]
    left_to_package(package.__name__.partition(".")[0], lambda x: call(x) + 0 * x.sum(), logits(4, 6), reason=reason)


def test_errors_are_the_package_s_own():
    with sslfast.patch("dinov3"), sslfast.patch("dinov2"), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="a group of 6 rows must consist of whole batches of 4"):
            v3.KoLeoLossDistributed(1, 6)(logits(4, 6))
        with pytest.raises(ValueError, match="4 rows must consist of groups of 8"):
            v3.KoLeoLossDistributed(1, 8)(logits(4, 6))
        with pytest.raises(AssertionError):
            v3.GramLoss()(logits(4, 6), logits(4, 6))
        with pytest.raises(RuntimeError, match="size of tensor"):
            v2.DINOLoss(6)([logits(4, 6)], [logits(3, 6)])
        with pytest.raises(RuntimeError, match="dtype|scalar type"):
            v3.DINOLoss(6)(logits(2, 4, 6), targets(2, 4, 6, dtype=torch.float64))


# ----------------------------------------------------------------------------------------------------------- the patch


def test_what_is_served():
    with sslfast.patch("dinov2") as second, sslfast.patch("dinov3") as third:
        assert second.replaced == ("DINOLoss", "KoLeoLoss", "iBOTPatchLoss")
        more = ("DINOLoss", "GramLoss", "KoLeoLoss", "KoLeoLossDistributed", "SinkhornKnoppTeacher", "iBOTPatchLoss")
        assert third.replaced == more
        own = [
            "DINOLoss.apply_center_update",
            "iBOTPatchLoss.apply_center_update",
            "iBOTPatchLoss.reduce_center_update",
        ]
        assert list(second.unchanged) == list(third.unchanged) == own
        assert str(second).startswith("sslfast.patch: dinov2\n")
    for package in (v2, v3):
        methods = [m for cls in vars(package).values() if isinstance(cls, type) for m in vars(cls).values()]
        assert not any(hasattr(m, "__sslfast__") for m in methods)


def test_adapter_classes_are_importable():
    from sslfast.adapters.dinov2 import DINOLoss
    from sslfast.adapters.dinov3 import GramLoss

    assert isinstance(DINOLoss(6), v2.DINOLoss) and isinstance(GramLoss(), v3.GramLoss)
    x, q = logits(2, 4, 6), targets(2, 4, 6)
    torch.testing.assert_close(DINOLoss(6)(x, q), v2.DINOLoss(6)(x, q))
    assert DINOLoss(6).state_dict().keys() == v2.DINOLoss(6).state_dict().keys()
    with sslfast.patch("dinov2"):  # made anew, of classes that are patched
        from sslfast.adapters.dinov2 import DINOLoss

        torch.testing.assert_close(DINOLoss(6)(x, q), v2.DINOLoss(6)(x, q))
    with pytest.raises(ImportError):
        from sslfast.adapters.dinov2 import GramLoss  # noqa: F401


def test_an_update_under_way_is_no_part_of_a_checkpoint_but_of_a_copy():
    x = logits(5, 6)
    with sslfast.patch("dinov2"):
        loss = v2.DINOLoss(6)
        loss.update_center(x)
        other = copy.deepcopy(loss)
        assert torch.equal(other.softmax_center_teacher(x, 0.1), loss.softmax_center_teacher(x, 0.1))
        assert torch.equal(other.center, loss.center) and list(loss.state_dict()) == ["center"]


@pytest.mark.parametrize("early", [True, False], ids=["compiled before the patch", "after it"])
def test_the_teacher_that_is_compiled(early):
    """Of DINOv3's iBOT loss: ``Module.compile()``; temperatures change from step to step."""
    x, count = logits(12, 40), torch.tensor([12])
    torch._dynamo.reset()
    rows, loss = v3.DINOLoss(40), v3.iBOTPatchLoss(40)
    if early:
        with pytest.raises((RuntimeError, ValueError), match="process group"):
            loss.sinkhorn_knopp_teacher(x, 0.2, n_masked_patches_tensor=count)
    expected = [rows.sinkhorn_knopp_teacher(x, t) for t in (0.2, 0.21, 0.22)]
    with sslfast.patch("dinov3"):
        for temperature, own in zip((0.2, 0.21, 0.22), expected, strict=True):
            found = loss.sinkhorn_knopp_teacher(x, temperature, n_masked_patches_tensor=count)
            torch.testing.assert_close(found, own, **CLOSE)


def test_it_compiles_in_one_graph():
    x, q, masks, weights = logits(2, 6, 40), targets(2, 6, 40), masks_of(3, 3), torch.ones(6)
    second, third, patches = v2.DINOLoss(40), v3.DINOLoss(40), v2.iBOTPatchLoss(40)

    def total(x):
        loss = second(x, q) + third(x, q, True) + patches.forward_masked(x[0], q[0], masks, 6, weights)
        loss = loss + v3.GramLoss()(x, q) + v3.KoLeoLoss()(x[1])
        return loss + second.softmax_center_teacher(x[0], 0.1).sum() + second.sinkhorn_knopp_teacher(x[0], 0.4).sum()

    with sslfast.patch("dinov2"), sslfast.patch("dinov3"):
        torch.testing.assert_close(torch.compile(total, fullgraph=True, backend="eager")(x), total(x))
