"""The losses of DINOv2 and DINOv3 with sslfast inside: the same targets, losses, gradients, states and errors.

Both packages are stand-ins (``tests/helpers/dinov2``, ``dinov3``) with the names, arguments and formulas of the
repositories.
"""

from __future__ import annotations

from typing import Any

import dinov2.loss as v2
import dinov3.loss as v3
import pytest
import torch
from torch import Tensor

import sslfast
from adapter_common import same_as_package, served_runs_agree, values_and_gradients
from dino_common import CLOSE, logits, masks_of, targets, tried_once  # noqa: F401  (a fixture)

pytestmark = pytest.mark.usefixtures("tried_once")

DTYPES = [torch.float32, torch.float64]
HALVES = [torch.float16, torch.bfloat16]
SHAPES = [(6, 70), (1, 5), (33, 1), (5, 1024)]


def with_center(cls: Any, prototypes: int, like: Tensor) -> Any:
    loss = cls(prototypes).to(like.dtype)
    loss.center.copy_(0.3 * logits(*loss.center.shape, dtype=like.dtype, seed=3))
    return loss


# ------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("package", [v2, v3], ids=["dinov2", "dinov3"])
def test_centered_targets_and_the_center_after_them(package, shape, dtype):
    def steps(x):
        rows, patches = with_center(package.DINOLoss, shape[1], x), with_center(package.iBOTPatchLoss, shape[1], x)
        found = []
        for scale in (1.0, 0.5):
            found.append(rows.softmax_center_teacher(scale * x, 0.07))
            rows.update_center(scale * x)
            found.append(patches.softmax_center_teacher(scale * x[None], teacher_temp=0.3))
            patches.update_center(scale * x[None])
        assert not rows.updated and not any(t.requires_grad for t in found)
        rows.apply_center_update()
        return *found, rows.center, patches.center, x

    same_as_package(package.__name__.partition(".")[0], steps, logits(*shape, dtype=dtype))


def test_a_center_that_is_not_to_be_updated():
    loss, x = with_center(v3.DINOLoss, 8, logits(1)), logits(5, 8)
    loss.update_center(x)
    with sslfast.patch("dinov3"):
        before = loss.center.clone()
        loss.softmax_center_teacher(x, 0.1, update_centers=False)
        assert torch.equal(loss.center, before) and not loss.updated
        loss.softmax_center_teacher(x, 0.1)
        assert not torch.equal(loss.center, before) and loss.updated


@pytest.mark.parametrize("shape", [*SHAPES, (0, 5)], ids=str)
@pytest.mark.parametrize("package", [v2, v3], ids=["dinov2", "dinov3"])
def test_sinkhorn_targets(package, shape):
    """In float32 whatever the logits are; a rank may have no row."""
    x = logits(*shape)

    def run():
        loss = package.DINOLoss(shape[1])
        found = [loss.sinkhorn_knopp_teacher(0.5 * x, 0.1), loss.sinkhorn_knopp_teacher(x, teacher_temp=0.4)]
        return [*found, loss.sinkhorn_knopp_teacher(x.double(), 0.4, n_iterations=1)]

    served_runs_agree(package.__name__.partition(".")[0], run, **CLOSE)


@pytest.mark.parametrize("package", [v2, v3], ids=["dinov2", "dinov3"])
def test_sinkhorn_of_masked_tokens_needs_no_process_group(package):
    """The package's own sums the caller's count over the ranks, where it stands, and wants a group for that."""
    torch._dynamo.reset()
    x, count = logits(12, 40), torch.tensor([12])
    own = package.iBOTPatchLoss(40).sinkhorn_knopp_teacher
    with pytest.raises((RuntimeError, ValueError), match="process group"):
        getattr(own, "forward", own)(x, 0.2, n_masked_patches_tensor=count)
    rows = package.DINOLoss(40).sinkhorn_knopp_teacher(x, 0.2)
    with sslfast.patch(package.__name__.partition(".")[0]):
        found = package.iBOTPatchLoss(40).sinkhorn_knopp_teacher(x, 0.2, n_masked_patches_tensor=count)
    torch.testing.assert_close(found, rows, **CLOSE)
    assert count == 12


@pytest.mark.parametrize("package", [v2, v3], ids=["dinov2", "dinov3"])
def test_finite_where_the_package_overflows(package):
    """Logits of 4 at τ = 0.04 (exp(100)); a sum of 2,048 logits of 40 in half precision."""
    x = logits(16, 8)
    x[3, 2] = 4.0
    loss = package.DINOLoss(8)
    assert loss.sinkhorn_knopp_teacher(x, 0.04).isnan().any()
    with sslfast.patch(package.__name__.partition(".")[0]):
        found = loss.sinkhorn_knopp_teacher(x, 0.04)
        torch.testing.assert_close(found, sslfast.sinkhorn(x.double(), 0.04).float(), **CLOSE)
        loss.center.zero_()
        loss.update_center(torch.full((2048, 8), 40.0, dtype=torch.float16))
        loss.apply_center_update()
    torch.testing.assert_close(loss.center, torch.full((1, 8), 4.0))


# ------------------------------------------------------------------------------------------------------ cross entropies


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("views", [(8, 2), (1, 1), (3, 1)], ids=str)
def test_pairs_of_dinov2(views, shape, dtype):
    """As its trainer calls it: chunks of the student's logits, and a tensor or a list of the teacher's targets."""
    s, t = views
    q = targets(t, *shape, dtype=dtype)

    def call(x):
        loss = v2.DINOLoss(shape[1])
        listed = loss([x.flatten(0, 1)[: shape[0]]], [q[0].to(x)])
        return listed, loss(student_output_list=x.flatten(0, 1).chunk(s), teacher_out_softmaxed_centered_list=q.to(x))

    same_as_package("dinov2", call, logits(s, *shape, dtype=dtype), floor=10.0 * s * t)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("s", "t", "ignore"), [(8, 2, False), (2, 2, True), (2, 3, True), (3, 1, True), (1, 1, False)], ids=str
)
def test_pairs_of_dinov3(s, t, ignore, shape):
    x, q = logits(s, *shape), targets(t, *shape)
    loss = v3.DINOLoss(shape[1], 0.2)
    for kind in (torch.float32, torch.float64, *HALVES):
        served_runs_agree(
            "dinov3",
            lambda kind=kind: values_and_gradients(lambda y: loss(y, q, ignore_diagonal=ignore), [x.to(kind)]),
            **({"rtol": 1e-2, "atol": 1e-4} if kind in HALVES else CLOSE),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prototypes", [70, 1024])
def test_masked_tokens_of_dinov2(prototypes, dtype):
    """With weights or the masks' own, with rows behind the masked tokens, an image without any, and no token at all."""
    masks = masks_of(3, 0, 7, 1)
    q, w = targets(14, prototypes, dtype=dtype), torch.rand(11, generator=torch.Generator().manual_seed(1))

    def call(x):
        loss, t, weights = v2.iBOTPatchLoss(prototypes), q.to(x), w.to(x)
        return (
            loss.forward_masked(x[:11], t[:11], masks),
            loss.forward_masked(x, t, student_masks_flat=masks, n_masked_patches=11, masks_weight=weights),
            loss.forward_masked(x, t, masks, 11),
            loss.forward_masked(x[:11], t[:11], masks, masks_weight=weights),
            loss.forward_masked(x[:0], t[:0], masks, 0, weights[:0]) + 0 * x.sum(),
        )

    same_as_package("dinov2", call, logits(14, prototypes, dtype=dtype), floor=30.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=str)
def test_all_patches_of_dinov2(kind, dtype):
    masks = masks_of(3, 0, 7, 9).to(kind)
    q = targets(4, 9, 40, dtype=dtype)
    same_as_package(
        "dinov2",
        lambda x: v2.iBOTPatchLoss(40, 0.2)(x, q.to(x), masks),
        logits(4, 9, 40, dtype=dtype),
        floor=30.0,
    )


def test_tokens_of_dinov3():
    masks, q, weights = masks_of(3, 0, 7, 1), targets(4, 9, 40), torch.linspace(0.1, 1, 11)
    loss = v3.iBOTPatchLoss(40)

    def call(x):
        rows, t = x.flatten(0, 1)[:14], q.flatten(0, 1)[:14]
        return (
            loss(x, q, masks),
            loss.forward_masked(rows, t, masks, 11, weights),
            loss.forward_masked(rows[:11], t[:11].double(), masks),
            loss.forward_masked(rows[:11], t[:11], masks, masks_weight=weights.double()),
        )

    for kind in DTYPES:
        served_runs_agree("dinov3", lambda k=kind: values_and_gradients(call, [logits(4, 9, 40, dtype=k)]), **CLOSE)


@pytest.mark.parametrize("teacher", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("student", HALVES, ids=str)
@pytest.mark.parametrize("package", [v2, v3], ids=["dinov2", "dinov3"])
def test_half_precision(package, student, teacher):
    """The dtypes are the package's; the numbers are those of float32, which the package's own may be far from."""
    x, q, masks = logits(11, 300, dtype=student), targets(11, 300, dtype=teacher), masks_of(3, 0, 7, 1)
    rows, patches = package.DINOLoss(300), package.iBOTPatchLoss(300)
    rows.center.zero_()
    losses = {
        "center": lambda x, q: rows.softmax_center_teacher(x, 0.07),
        "sinkhorn": lambda x, q: rows.sinkhorn_knopp_teacher(x, 0.2),
        "masked": lambda x, q: patches.forward_masked(x, q, masks),
        "all": lambda x, q: patches(x[None], q[None], torch.ones(1, 11)),
    }
    if package is v2:
        losses["pairs"] = lambda x, q: rows([x], [q])
    for name, call in losses.items():
        own = call(x, q)
        with sslfast.patch(package.__name__.partition(".")[0]):
            found = call(x, q)
        assert found.dtype == own.dtype, name
        torch.testing.assert_close(found.float(), call(x.float(), q.float()), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("package", [v2, v3], ids=["dinov2", "dinov3"])
def test_autocast(package):
    """The dtypes are the package's, but for DINOv3's pairs, whose own are multiplied in 16 bits."""
    x, q, masks = (
        logits(2, 11, 40, dtype=torch.bfloat16),
        targets(2, 11, 40, dtype=torch.bfloat16),
        masks_of(3, 0, 7, 1),
    )
    rows, patches, spread = package.DINOLoss(40), package.iBOTPatchLoss(40), package.KoLeoLoss()
    rows.center.zero_()

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            found = [rows.softmax_center_teacher(x[0], 0.07), rows.sinkhorn_knopp_teacher(x[0], 0.2), rows(x, q)]
            return [*found, patches.forward_masked(x[0], q[0], masks), patches(x, q, torch.ones(2, 11)), spread(x[0])]

    own = run()
    with sslfast.patch(package.__name__.partition(".")[0]):
        fast = run()
    for i, (found, expected) in enumerate(zip(fast, own, strict=True)):
        assert found.dtype == (torch.float32 if package is v3 and i == 2 else expected.dtype), i
        torch.testing.assert_close(found.float(), expected.float(), rtol=0.03, atol=0.01)


# ------------------------------------------------------------------------------------------- neighbours, Gram matrices


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 32), (2, 5), (33, 7)], ids=str)
@pytest.mark.parametrize("package", [v2, v3], ids=["dinov2", "dinov3"])
def test_koleo(package, shape, dtype):
    name = package.__name__.partition(".")[0]
    same_as_package(name, package.KoLeoLoss(), logits(*shape, dtype=dtype), floor=10.0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("package", [v2, v3], ids=["dinov2", "dinov3"])
def test_koleo_of_equal_rows_in_half_precision(package, dtype):
    """Their distance in float32 is √D·1e-8, and in float16 0: the package's loss is infinite."""
    x = logits(6, 384, dtype=dtype)
    x[1] = x[0]
    with sslfast.patch(package.__name__.partition(".")[0]):
        found = package.KoLeoLoss()(x)
    assert found.dtype == dtype and found.isfinite()
    torch.testing.assert_close(found.float(), package.KoLeoLoss()(x.float()), rtol=1e-2, atol=0)


@pytest.mark.parametrize("topk", [1, 4])
def test_koleo_of_several_neighbours(topk):
    for kind in DTYPES:
        x = logits(20, 6, dtype=kind)
        loss = v3.KoLeoLossDistributed(topk, loss_group_size=20 if topk == 4 else None)
        served_runs_agree("dinov3", lambda x=x, loss=loss: values_and_gradients(loss, [x]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("signs", [(True, False), (False, True), (False, False)], ids=str)
def test_gram_anchoring(norm, signs):
    """Similarities of exactly 0, which are not removed, too."""
    loss = v3.GramLoss(norm, True, *signs)
    x, y = logits(3, 7, 4), logits(3, 7, 4, seed=1)
    x[0, :2] = torch.tensor([[1.0, 0, 0, 0], [0, 2.0, 0, 0]])

    def call(x, y=y):
        return loss(x, y), loss(x, y.double(), img_level=False), loss(x[0], y[1], img_level=False)

    for kind in DTYPES:
        served_runs_agree("dinov3", lambda k=kind: values_and_gradients(call, [x.to(k)]), rtol=1e-4, atol=1e-6)
