"""Patch kernel alignment against lightly's and against centred kernels, by either form; masks, samples, wrong input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import sslfast
from benchmarks import Unavailable, peers
from helpers import DTYPES, GRAD_LOSS, roundings, within_budget
from sslfast.losses.distillation.patch_kernel_alignment import EPS

# Fewer tokens than features, as many and one off, more; one image, two tokens, one feature.
SHAPES = [(3, 20, 50), (2, 33, 33), (2, 33, 32), (2, 32, 33), (3, 70, 24), (1, 2, 5), (2, 9, 1)]


def tokens(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A student that resembles the teacher, both far from a mean of zero."""
    y = 2 + torch.randn(shape, dtype=torch.float64)
    return (1 + y + 0.7 * torch.randn(shape, dtype=torch.float64)).to(dtype), y.to(dtype)


def formula(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """Kernels of the tokens that count, image by image, centred by H K H."""
    losses = []
    for i in range(len(x)):
        kept = slice(None) if mask is None else ~mask[i]
        own, other = x[i][kept], y[i][kept]
        if len(own) < 2:
            continue
        h = torch.eye(len(own), dtype=x.dtype) - 1 / len(own)
        s, t = (h @ (z @ z.T) @ h for z in (own, other))
        norms = [(k * k).sum().clamp_min(EPS).sqrt() for k in (s, t)]
        losses.append(1 - (s * t).sum() / (norms[0] * norms[1]))
    return torch.stack(losses).mean()


def value_and_gradient(function: Callable[..., Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    leaf = x.detach().clone().requires_grad_()
    loss = function(leaf, y)
    return [loss.detach(), *torch.autograd.grad(loss, leaf, torch.full_like(loss, GRAD_LOSS))]


def masks(shape: tuple[int, ...]) -> Tensor:
    """A third of the tokens ignored; of one image all but one, of another all."""
    mask = torch.rand(shape[:2]) < 1 / 3
    if shape[0] > 2:
        mask[0] = torch.arange(shape[1]) > 0
        mask[1] = True
    mask[-1, :2] = False
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(shape: tuple[int, ...], dtype: torch.dtype, masked: bool) -> None:
    x, y = tokens(shape, dtype)
    mask = masks(shape) if masked else None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found = value_and_gradient(lambda x, y: sslfast.patch_kernel_alignment(x, y, mask), x, y)
    plain = lambda x, y: formula(x, y, mask)  # noqa: E731
    single = roundings(value_and_gradient, plain, x.to(wide), y.to(wide))
    truth = value_and_gradient(plain, x.double(), y.double())
    assert found[0].dtype == wide and found[1].dtype == dtype
    within_budget("loss", found[0], single[0], truth[0], dtype, 1.0)
    within_budget("dx", found[1], single[1].to(dtype), truth[1], dtype, GRAD_LOSS / (shape[0] * shape[1]))
    if mask is not None:
        assert (found[1][mask] == 0).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_lightly(shape: tuple[int, ...], masked: bool) -> None:
    """Which computes in float32, whatever it is given."""
    try:
        theirs = peers.lightly_loss("patch_kernel_alignment_loss", "PatchKernelAlignmentLoss")
    except Unavailable as reason:
        pytest.skip(f"lightly 1.6.0 cannot be imported: {reason}")
    mask = masks(shape) if masked else None
    x, y = tokens(shape)
    found = value_and_gradient(lambda x, y: sslfast.PatchKernelAlignmentLoss()(x, y, mask), x, y)
    expected = value_and_gradient(lambda x, y: theirs(x, y, mask), x, y)
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true.double(), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("most", [2, 7, 19, 20])
@pytest.mark.parametrize("masked", [False, True])
def test_samples_are_lightlys(masked: bool, most: int) -> None:
    try:
        theirs = peers.lightly_loss("patch_kernel_alignment_loss", "PatchKernelAlignmentLoss", max_tokens=most)
    except Unavailable as reason:
        pytest.skip(f"lightly 1.6.0 cannot be imported: {reason}")
    shape = (3, 20, 12)
    mask = masks(shape) if masked else None
    x, y = tokens(shape, torch.float32)
    results = []
    for criterion in (sslfast.PatchKernelAlignmentLoss(most), theirs):
        torch.manual_seed(3)
        results.append([*value_and_gradient(lambda x, y, c=criterion: c(x, y, mask), x, y), torch.rand(1)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 9, 20), (2, 20, 9)], ids=str)
def test_rotations_and_scales_do_not_count(shape: tuple[int, ...]) -> None:
    x, _ = tokens(shape)
    rotation = torch.linalg.qr(torch.randn(shape[2], shape[2], dtype=torch.float64)).Q
    loss, gradient = value_and_gradient(sslfast.patch_kernel_alignment, 3 * x @ rotation - 5, x)
    assert abs(loss) < 1e-12 and gradient.abs().max() < 1e-12


@pytest.mark.parametrize("shape", [(3, 6, 9), (3, 9, 6)], ids=str)
def test_degenerate_images(shape: tuple[int, ...]) -> None:
    """Tokens that are all the same: a kernel of zeros, and a loss of 1; one token, or none that counts: no loss."""
    x, y = tokens(shape)
    x[0] = 3.0
    deviations = x[1] - x[1].mean(0)
    x[1] = 3 + deviations * (5e-4 / torch.linalg.matrix_norm(deviations @ deviations.T)).sqrt()  # half of the bound
    found = value_and_gradient(sslfast.patch_kernel_alignment, x, y)
    torch.testing.assert_close(found, value_and_gradient(formula, x, y), rtol=1e-7, atol=1e-9)
    assert found[1].isfinite().all() and (found[1][0] == 0).all()
    for images, mask in ((x[:, :1], None), (x, torch.ones(shape[:2], dtype=torch.bool))):
        loss, gradient = value_and_gradient(
            lambda a, b, m=mask: sslfast.patch_kernel_alignment(a, b, m), images, y[:, : images.shape[1]]
        )
        assert loss == 0 and (gradient == 0).all()


def test_ignored_tokens_may_hold_anything() -> None:
    x, y = tokens((2, 8, 5))
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, 3] = True
    expected = value_and_gradient(lambda a, b: sslfast.patch_kernel_alignment(a, b, mask), x, y)
    x[:, 3], y[:, 3] = float("nan"), float("inf")
    found = value_and_gradient(lambda a, b: sslfast.patch_kernel_alignment(a, b, mask), x, y)
    torch.testing.assert_close(found, expected)
    assert sslfast.patch_kernel_alignment(x, y).isnan()


def test_the_teacher_does_not_learn() -> None:
    x, y = (t.requires_grad_() for t in tokens((2, 6, 4)))
    sslfast.patch_kernel_alignment(x, y).backward()
    assert x.grad is not None and y.grad is None


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 5, 3)], ids=str)
def test_twice_differentiable(shape: tuple[int, ...], masked: bool) -> None:
    x, y = tokens(shape)
    mask = torch.arange(shape[1]).expand(shape[:2]) == 1 if masked else None
    function = lambda x: sslfast.patch_kernel_alignment(x, y, mask)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x.requires_grad_(),))
    assert torch.autograd.gradgradcheck(function, (x,))


@pytest.mark.parametrize("shape", [(2, 6, 9), (2, 9, 6)], ids=str)
def test_autocast_and_strides_change_nothing(shape: tuple[int, ...]) -> None:
    x, y = tokens(shape, torch.float32)
    expected = value_and_gradient(sslfast.patch_kernel_alignment, x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for mine, true in zip(value_and_gradient(sslfast.patch_kernel_alignment, x, y), expected, strict=True):
            assert torch.equal(mine, true)
    spread = torch.stack([x, x], 3)[..., 1]
    torch.testing.assert_close(value_and_gradient(sslfast.patch_kernel_alignment, spread, y), expected)


def test_compile_without_graph_breaks() -> None:
    x, y = tokens((2, 9, 6), torch.float32)
    mask = masks((2, 9))
    for given in (None, mask):
        loss = lambda x, y, given=given: sslfast.patch_kernel_alignment(x, y, given)  # noqa: E731
        step = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(value_and_gradient(step, x, y), value_and_gradient(loss, x, y))


X = torch.ones(2, 4, 3)


@pytest.mark.parametrize(
    ("student", "teacher", "mask", "error", "message"),
    [
        (X, X[:, :3], None, ValueError, r"student and teacher .*same shape"),
        (X, X.double(), None, TypeError, r"student and teacher .*same dtype"),
        (X[0], X[0], None, ValueError, r"student must have shape \[images, tokens, features\]"),
        (X[:0], X[:0], None, ValueError, r"student must have at least one image and one token, got shape \(0, 4, 3\)"),
        (X, X, torch.zeros(2, 4), TypeError, r"mask must be a bool tensor, got torch.float32"),
        (X, X, torch.zeros(2, 3, dtype=torch.bool), ValueError, r"mask must have shape \(2, 4\) on cpu, got \(2, 3\)"),
    ],
)
def test_wrong_input(student, teacher, mask, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sslfast.patch_kernel_alignment(student, teacher, mask)


def test_wrong_number_of_tokens() -> None:
    with pytest.raises(ValueError, match="max_tokens must be a whole number of at least 2, got 1"):
        sslfast.PatchKernelAlignmentLoss(max_tokens=1)
