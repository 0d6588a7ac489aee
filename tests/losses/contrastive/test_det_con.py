"""DetCon against lightly's and against the formula, degenerate masks, modules, and wrong input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers import check_loss, roundings, same_value_and_gradients, value_and_gradients, within_budget
from lightly_common import lightly_loss
from sslfast.losses.contrastive.det_con import DetConBLoss, DetConSLoss, det_con_b, det_con_s

# Images, regions, features; one image, one region, and both.
SHAPES = [(5, 4, 8), (7, 3, 17), (1, 5, 6), (6, 1, 6), (1, 1, 4)]


def views(shape: tuple[int, ...], count: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    z = torch.randn(shape, dtype=torch.float64)
    return [(z + torch.randn(shape, dtype=torch.float64)).to(dtype) for _ in range(count)]


def drawn(shape: tuple[int, ...], masks: int = 4) -> tuple[Tensor, Tensor]:
    """Masks with several regions, with one, and with none in the other view; no small numbers."""
    chosen = torch.tensor([-7, 0, 2**40, 11, 3, 8])[:masks]
    return tuple(chosen[torch.randint(masks, shape[:2])] for _ in range(2))


def one(q: Tensor, t: Tensor, other: Tensor, mask: Tensor, other_mask: Tensor, tau: float | Tensor) -> Tensor:
    """The mean over the regions of one view: rows q, columns t of the same view and those of the other."""
    b, m = mask.shape
    q, t, other = (F.normalize(x.flatten(0, 1)) for x in (q, t, other))
    image = torch.arange(b).repeat_interleave(m)
    here = image[:, None] == image
    beside, across = here & (mask.view(-1, 1) == mask.view(-1)), here & (mask.view(-1, 1) == other_mask.view(-1))
    near, far = (q @ t.T / tau).masked_fill(beside, -torch.inf), q @ other.T / tau
    lse = torch.cat([near, far], 1).logsumexp(1)
    terms = torch.where(across, lse[:, None] - far, 0.0).sum(1) / across.sum(1).clamp(min=1) / beside.sum(1)
    return terms.mean()


def plain_b(
    q0: Tensor, q1: Tensor, t0: Tensor, t1: Tensor, mask0: Tensor, mask1: Tensor, tau: float | Tensor = 0.1
) -> Tensor:
    return one(q0, t0, t1, mask0, mask1, tau) + one(q1, t1, t0, mask1, mask0, tau)


def plain_s(z0: Tensor, z1: Tensor, mask0: Tensor, mask1: Tensor, tau: float | Tensor = 0.1) -> Tensor:
    return plain_b(z0, z1, z0, z1, mask0, mask1, tau)


def lightlys(loss: type, temperature: float):
    return getattr(lightly_loss("detcon_loss"), loss.__name__)(temperature)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(shape: tuple[int, int, int]) -> None:
    masks = drawn(shape)
    for loss, formula, count in ((det_con_s, plain_s, 2), (det_con_b, plain_b, 4)):
        same_value_and_gradients(
            lambda *x, f=loss: f(*x, *masks, 0.3), lambda *x, f=formula: f(*x, *masks, 0.3), *views(shape, count)
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_equals_lightly(temperature: float, shape: tuple[int, int, int]) -> None:
    """To the rounding of its weights, which are float32 whatever the inputs."""
    masks = drawn(shape)
    for loss, count in ((DetConSLoss, 2), (DetConBLoss, 4)):
        both, inputs = (loss(temperature), lightlys(loss, temperature)), views(shape, count)
        found, expected = (value_and_gradients(lambda *x, f=f: f(*x, *masks), *inputs) for f in both)
        for mine, true in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-6, atol=1e-7 * true.abs().max().item())


def test_is_lightlys_where_its_weights_are_exact() -> None:
    """One, two or four regions of a mask."""
    masks = torch.tensor([[0, 0, 1, 2], [5, 5, 5, 5]]), torch.tensor([[1, 0, 1, 0], [5, 5, 5, 5]])
    for loss, count in ((DetConSLoss, 2), (DetConBLoss, 4)):
        calls = [lambda *x, f=f: f(*x, *masks) for f in (loss(0.2), lightlys(loss, 0.2))]
        same_value_and_gradients(*calls, *views((2, 4, 6), count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    masks, terms = drawn((9, 4)), 9 * 4 * 11
    z = [F.normalize(x, dim=2) for x in views((9, 4, 11), 2)]
    inputs = tuple(x.to(dtype) for x in z)  # normalised already, or the formula's float32 rows are not the kernel's
    loss = lambda a, b: det_con_s(a, b, *masks, 0.2)  # noqa: E731
    check_loss(loss, lambda a, b: plain_s(a, b, *masks, 0.2), inputs, floor=10, terms=terms)


@pytest.mark.parametrize("fixed", [False, True], ids=["targets learn", "targets are fixed"])
def test_predictions_against_targets(fixed: bool) -> None:
    masks, (*learn, t0, t1) = drawn((8, 5)), views((8, 5, 12), 4, torch.float32)
    inputs = [*learn, torch.tensor(0.2), *([] if fixed else [t0, t1])]

    def call(loss):
        def function(q0: Tensor, q1: Tensor, tau: Tensor, *targets: Tensor) -> Tensor:
            return loss(q0, q1, *(targets or (t0.to(q0.dtype), t1.to(q0.dtype))), *masks, tau)

        return function

    kernel, single = (
        value_and_gradients(call(det_con_b), *inputs),
        roundings(value_and_gradients, call(plain_b), *inputs),
    )
    truth = value_and_gradients(call(plain_b), *(x.double() for x in inputs))
    for i, (k, r, t) in enumerate(zip(kernel, single, truth, strict=True)):
        within_budget(f"result {i}", k, r, t, torch.float32, 5.0 if t.dim() == 0 else 0.1)


def test_masks_are_of_their_image() -> None:
    """Any numbers serve, and each image may have its own."""
    z, masks = views((6, 4, 5)), drawn((6, 4))
    moved = tuple(mask * 5 - 100 * torch.arange(6)[:, None] for mask in masks)
    assert torch.equal(det_con_s(*z, *masks), det_con_s(*z, *moved))


def test_no_positive_pair() -> None:
    z = [x.requires_grad_() for x in views((3, 4, 5))]
    loss = det_con_s(*z, torch.zeros(3, 4, dtype=torch.int32), torch.ones(3, 4, dtype=torch.int32))
    loss.backward()
    assert loss == 0 and not z[0].grad.any() and not z[1].grad.any()


def test_one_mask_of_one_image() -> None:
    """Every column is a positive: what is left is how unlike they are."""
    z = views((1, 4, 5))
    masks = torch.zeros(2, 1, 4, dtype=torch.int64)
    s = F.normalize(z[0][0]) @ F.normalize(z[1][0]).T / 0.1
    expected = ((s.logsumexp(1) - s.mean(1)).mean() + (s.logsumexp(0) - s.mean(0)).mean()) / 4
    torch.testing.assert_close(det_con_s(*z, *masks), expected)


def test_equal_rows() -> None:
    z = torch.ones(3, 2, 4, requires_grad=True)
    masks = torch.tensor([[0, 1]] * 3)
    loss = det_con_s(z, z, masks, masks)
    loss.backward()
    torch.testing.assert_close(loss, 2 * torch.tensor(11.0).log())  # of 12 columns one is the row itself
    torch.testing.assert_close(z.grad, torch.zeros_like(z), rtol=0, atol=1e-5)


def test_no_number_comes_out_of_nan() -> None:
    z, masks = views((3, 2, 4)), drawn((3, 2), 1)
    z[0][1, 1, 2] = float("nan")
    assert det_con_s(*z, *masks).isnan() and det_con_b(*z, *views((3, 2, 4)), *masks).isnan()


def test_strides_and_autocast() -> None:
    z, masks = views((4, 3, 6), 4, torch.float32), drawn((4, 3))
    true = det_con_b(*z, *masks)
    spread = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in z]
    torch.testing.assert_close(det_con_b(*spread, *(m.T.contiguous().T for m in masks)), true)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = det_con_b(z[0].bfloat16(), *z[1:], *masks)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, true, rtol=2e-2, atol=2e-2)


def test_not_normalised() -> None:
    z, masks = [F.normalize(x, dim=2) for x in views((4, 3, 6))], drawn((4, 3))
    torch.testing.assert_close(det_con_s(*(3 * x for x in z), *masks, 0.9, normalize=False), det_con_s(*z, *masks, 0.1))


def test_second_derivatives() -> None:
    masks = drawn((2, 3))
    inputs = [x.requires_grad_() for x in views((2, 3, 2), 4)]
    assert torch.autograd.gradgradcheck(lambda *x: det_con_s(*x, *masks, 0.5), inputs[:2])
    assert torch.autograd.gradgradcheck(lambda *x: det_con_b(*x, *masks, 0.5), inputs)


def test_compile_without_graph_breaks() -> None:
    masks, inputs = drawn((5, 3)), views((5, 3, 6), 4, torch.float32)
    for loss, count in ((det_con_s, 2), (det_con_b, 4)):
        step = torch.compile(lambda *x, f=loss: f(*x, *masks, 0.2), fullgraph=True, backend="aot_eager")
        same_value_and_gradients(step, lambda *x, f=loss: f(*x, *masks, 0.2), *inputs[:count])


def test_modules_are_the_functions() -> None:
    """Without a process group too, though they gather by default."""
    z, masks = views((5, 3, 6), 4), drawn((5, 3))
    learns = torch.nn.Parameter(torch.tensor(0.2))
    module = DetConSLoss(learns)
    module(*z[:2], *masks).backward()
    assert module.gather_distributed and list(module.state_dict()) == ["temperature"] and learns.grad != 0
    assert torch.equal(DetConSLoss(0.2)(*z[:2], *masks), det_con_s(*z[:2], *masks, 0.2))
    assert torch.equal(DetConBLoss(0.2, False)(*z, *masks), det_con_b(*z, *masks, 0.2))


Z, MASKS = torch.ones(4, 3, 2), torch.ones(4, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"view0": torch.ones(4, 3)}, ValueError, r"view0 must be \[images, regions, features\].*\(4, 3\)"),
        ({"view1": torch.ones(4, 0, 2)}, ValueError, r"view1 must be .*at least one of each.*\(4, 0, 2\)"),
        ({"view1": torch.ones(4, 2, 2)}, ValueError, r"view0 and view1 .*same shape, got \(4, 3, 2\) and \(4, 2, 2\)"),
        ({"view1": Z.double()}, TypeError, r"view0 and view1 .*same dtype"),
        ({"view0": Z.long()}, TypeError, r"view0 must be float32.*int64"),
        ({"view0": Z.numpy()}, TypeError, r"view0 must be a torch.Tensor, got ndarray"),
        ({"mask_view1": MASKS.float()}, TypeError, r"mask_view1 must hold integers, got torch.float32"),
        ({"mask_view0": MASKS > 0}, TypeError, r"mask_view0 must hold integers, got torch.bool"),
        ({"mask_view0": MASKS[:3]}, ValueError, r"mask_view0 must have shape \(4, 3\), got \(3, 3\)"),
        ({"mask_view0": None}, TypeError, r"mask_view0 must be a torch.Tensor, got NoneType"),
        ({"mask_view1": MASKS.to("meta")}, ValueError, r"mask_view1 must be on the features' device cpu, got meta"),
        ({"temperature": 0}, ValueError, r"temperature .*not zero"),
    ],
)
def test_wrong_input(change: dict, error: type[Exception], message: str) -> None:
    given = {"view0": Z, "view1": Z, "mask_view0": MASKS, "mask_view1": MASKS}
    with pytest.raises(error, match=message):
        det_con_s(**(given | change))


def test_wrong_targets() -> None:
    for spoilt in (2, 3):
        views_ = [Z] * 4
        views_[spoilt] = Z[:, :, :1]
        with pytest.raises(ValueError, match=rf"pred_view0 and target_view{spoilt - 2} must have the same shape"):
            det_con_b(*views_, MASKS, MASKS)
