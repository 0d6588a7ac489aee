"""The losses of DINOv2 and DINOv3 with sslfast inside: the same targets, losses, gradients, states and errors.

Both packages are stand-ins (``tests/helpers/dinov2``, ``dinov3``) with the names, arguments and formulas of the
repositories.
"""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import dinov2.loss as v2
import dinov3.loss as v3
import pytest
import torch
from torch import Tensor

import sslfast
from adapter_common import left_to_package, same_as_package, served_runs_agree, values_and_gradients
from sslfast.adapters import dinov2 as adapter2, dinov3 as adapter3

DTYPES = [torch.float32, torch.float64]
HALVES = [torch.float16, torch.bfloat16]
SHAPES = [(6, 70), (1, 5), (33, 1), (5, 1024)]
CLOSE = {"rtol": 2e-5, "atol": 1e-6}


@pytest.fixture(scope="module", autouse=True)
def tried_once():
    """The classes are tried out at every patch; here they stay the same."""
    with pytest.MonkeyPatch.context() as patch:
        for adapter in (adapter2, adapter3):
            patch.setattr(adapter, "contents", functools.cache(adapter.contents))
        yield


def logits(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def targets(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return logits(*shape, dtype=torch.float64, seed=7).mul(2).softmax(-1).to(dtype)


def masks_of(*counts: int, patches: int = 9) -> Tensor:
    return torch.arange(patches) < torch.tensor(counts)[:, None]


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


# ------------------------------------------------------------------------------------------------ what is not served


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
