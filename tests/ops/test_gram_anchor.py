"""Gram anchoring: every kernel against the formula in float64, against DINOv3's code, and the contracts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from helpers import DTYPES, GRAD_LOSS, roundings, within_budget
from sslfast import _native, reference

pytestmark = pytest.mark.sanitize

TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_TRITON = _native.why_no_triton(torch.device(TRITON_DEVICE))
# Images, rows, features: aligned to the tiles, ragged, prime, tiny, one feature, more than one block, images for all
# threads and for none.
SHAPES = [(2, 64, 64), (1, 70, 40), (3, 127, 61), (2, 5, 3), (9, 4, 1), (9, 130, 33), (1, 400, 30), (2, 200, 257)]
NEGATIVES = ["keep", "clamp", "clamp_teacher"]


def features(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """A teacher and a student that resembles it: similarities of both signs."""
    y = torch.randn(shape, dtype=torch.float64)
    return (y + 0.5 * torch.randn(shape, dtype=torch.float64)).to(device, dtype), y.to(device, dtype)


def value_and_gradient(function: Callable[..., Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    leaf = x.detach().clone().requires_grad_()
    loss = function(leaf, y)
    return [loss.detach(), *torch.autograd.grad(loss, leaf, torch.full_like(loss, GRAD_LOSS))]


def check(x: Tensor, y: Tensor, backend: str, **options: object) -> None:
    dtype, wide = x.dtype, torch.float64 if x.dtype == torch.float64 else torch.float32

    def formula(x: Tensor, y: Tensor) -> Tensor:
        return reference.gram_anchor(x, y, **options)  # type: ignore[arg-type]

    with sslfast.use_backend(backend):
        found = value_and_gradient(lambda x, y: sslfast.gram_anchor(x, y, **options), x, y)
    single = roundings(value_and_gradient, formula, x.to(wide), y.to(wide))
    truth = value_and_gradient(formula, x.double(), y.double())
    assert found[0].dtype == wide and found[1].dtype == dtype
    # Similarities are of size 1 before they cancel, or as long as the rows.
    size = 1.0 if options.get("normalize", True) else float(x.double().square().sum(2).max())
    within_budget("loss", found[0], single[0], truth[0], dtype, size**2)
    entries = x.shape[0] * x.shape[1]
    row = float(x.double().norm(dim=2).min())
    floor = GRAD_LOSS * 4 * size / entries * (1 / row if options.get("normalize", True) else size**0.5)
    within_budget("dx", found[1], single[1].to(dtype), truth[1], dtype, floor)


@pytest.mark.levels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(shape: tuple[int, ...], negatives: str, normalize: bool, dtype: torch.dtype) -> None:
    check(*features(shape, dtype), "cpu", normalize=normalize, negatives=negatives)


@pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "negatives", "normalize"), [
    ((2, 64, 64), "clamp", True), ((1, 70, 40), "keep", True), ((3, 37, 61), "clamp_teacher", True),
    ((2, 5, 3), "clamp", False), ((2, 33, 1), "keep", False), ((1, 40, 200), "clamp_teacher", False),
])  # fmt: skip
def test_triton(shape: tuple[int, ...], negatives: str, normalize: bool, dtype: torch.dtype) -> None:
    check(*features(shape, dtype, TRITON_DEVICE), "triton", normalize=normalize, negatives=negatives)


@pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))
@pytest.mark.parametrize("bands", [40 * 70 * 4, 3 * 70 * 70 * 4, 1])
def test_triton_by_bands(bands: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of an image's rows at a time, several images at a time, a row at a time."""
    from sslfast.kernels import gram_anchor as kernel

    monkeypatch.setattr(kernel, "BAND_BYTES", bands)
    shape = (5, 70, 24) if bands > 1 else (1, 9, 5)
    check(*features(shape, torch.float32, TRITON_DEVICE), "triton")


# ------------------------------------------------------------------------------------------------------------- DINOv3


def dinov3(x: Tensor, y: Tensor, apply_norm: bool, img_level: bool, remove: str) -> Tensor:
    """The class's value: similarities are changed in place, the teacher's first."""
    x, y = (F.normalize(t, dim=-1) if apply_norm else t for t in (x, y))
    if not img_level:
        x, y = x.flatten(0, 1), y.flatten(0, 1)
    s, t = x @ x.mT, y @ y.mT
    if remove == "both":
        t[t < 0] = 0.0
        s[s < 0] = 0.0
    elif remove == "teacher":
        t[t < 0] = 0.0
        s[(s < 0) & (t < 0)] = 0.0  # never
    return F.mse_loss(s, t)


@pytest.mark.levels
@pytest.mark.parametrize("remove", ["both", "teacher", "nothing"])
@pytest.mark.parametrize("img_level", [True, False])
@pytest.mark.parametrize("apply_norm", [True, False])
def test_the_value_of_dinov3(apply_norm: bool, img_level: bool, remove: str) -> None:
    options = {"remove_neg": remove == "both", "remove_only_teacher_neg": remove == "teacher"}
    criterion = sslfast.GramLoss(apply_norm, img_level, **options)
    x, y = features((3, 24, 16))
    found = value_and_gradient(criterion, x, y)
    expected = value_and_gradient(lambda x, y: dinov3(x, y, apply_norm, img_level, remove), x, y)
    torch.testing.assert_close(found, expected)
    other = sslfast.GramLoss(apply_norm, not img_level, **options)
    torch.testing.assert_close(other(x, y, img_level=img_level), found[0])
    if not img_level:
        torch.testing.assert_close(criterion(x.flatten(0, 1), y.flatten(0, 1)), found[0])


def test_both_kinds_of_negatives_are_refused() -> None:
    with pytest.raises(ValueError, match="remove_only_teacher_neg=True needs False there"):
        sslfast.GramLoss(remove_only_teacher_neg=True)


# ---------------------------------------------------------------------------------------------------------- contracts


def test_equal_features_have_no_loss() -> None:
    x, _ = features((2, 150, 48), torch.float32)
    loss, dx = value_and_gradient(sslfast.gram_anchor, x, x.clone())
    assert loss == 0 and (dx == 0).all()  # to the bit: both sides are computed alike


def test_the_teacher_has_no_gradient() -> None:
    x, y = (t.requires_grad_() for t in features((2, 8, 4)))
    sslfast.gram_anchor(x, y).backward()
    assert x.grad is not None and y.grad is None
    assert not sslfast.gram_anchor(x.detach(), y).requires_grad


def test_no_gradient_is_made_where_none_is_asked_for() -> None:
    x, y = features((2, 8, 4), torch.float32)
    assert torch.ops.sslfast.gram_anchor(x, y, True, 1, False)[1].shape == (0, 8, 4)
    with torch.no_grad():
        loss = sslfast.gram_anchor(x.requires_grad_(), y)
    torch.testing.assert_close(loss, sslfast.gram_anchor(x, y).detach())


@pytest.mark.levels
@pytest.mark.parametrize("normalize", [True, False])
def test_nonfinite_features_are_as_in_pytorch(normalize: bool) -> None:
    for value in (float("nan"), float("inf")):
        x, y = features((3, 30, 20), torch.float32)
        x[1, 3, 2] = value
        for negatives in NEGATIVES:
            found = value_and_gradient(
                lambda x, y, n=negatives: sslfast.gram_anchor(x, y, normalize=normalize, negatives=n), x, y
            )
            expected = value_and_gradient(lambda x, y, n=negatives: reference.gram_anchor(x, y, normalize, n), x, y)
            torch.testing.assert_close(found[0], expected[0], equal_nan=True)
            torch.testing.assert_close(found[1][[0, 2]], expected[1][[0, 2]], rtol=1e-4, atol=1e-6)


def test_a_row_of_zeros() -> None:
    x, y = features((2, 20, 8))
    x[0, 3], y[1, 2] = 0, 0
    x[1, 4] *= 1e-13 / x[1, 4].norm()  # shorter than the bound of the norm
    found, expected = (value_and_gradient(f, x, y) for f in (sslfast.gram_anchor, reference.gram_anchor))
    torch.testing.assert_close(found, expected)


def test_strides() -> None:
    base, y = features((4, 30, 24), torch.float32)
    for x in (base.mT.contiguous().mT, base.transpose(0, 1).contiguous().transpose(0, 1), base[:1].expand(4, -1, -1)):
        x = x.detach().requires_grad_()
        loss = sslfast.gram_anchor(x, y)
        found = [loss.detach(), *torch.autograd.grad(loss, x, torch.full_like(loss, GRAD_LOSS))]
        expected = value_and_gradient(sslfast.gram_anchor, x.contiguous(), y)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradcheck_and_double_backward() -> None:
    x, y = features((2, 6, 5))
    x.requires_grad_()
    for negatives in NEGATIVES:
        function = lambda x, n=negatives: sslfast.gram_anchor(x, y, negatives=n)  # noqa: E731
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x, y = features((2, 33, 20), dtype)
    operator = torch.ops.sslfast.gram_anchor.default
    torch.library.opcheck(operator, (x.clone().requires_grad_(), y, True, 1, True))
    torch.library.opcheck(operator, (x, y, False, 2, False))


def test_compile_without_graph_breaks() -> None:
    x, y = features((2, 40, 20), torch.float32)
    compiled = torch.compile(sslfast.gram_anchor, backend="aot_eager", fullgraph=True)
    for mine, true in zip(
        value_and_gradient(compiled, x, y), value_and_gradient(sslfast.gram_anchor, x, y), strict=True
    ):
        assert torch.equal(mine, true)


@pytest.mark.parametrize("shape", [(9, 150, 40), (1, 500, 40)], ids=str)
def test_same_bits_on_any_number_of_threads(shape: tuple[int, ...]) -> None:
    """Images by threads, and blocks of one image by threads."""
    x, y = features(shape, torch.float32)
    first, threads = value_and_gradient(sslfast.gram_anchor, x, y), torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            other = value_and_gradient(sslfast.gram_anchor, x, y)
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_autocast() -> None:
    x, y = features((2, 16, 8), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sslfast.gram_anchor(x.bfloat16(), y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, sslfast.gram_anchor(x.bfloat16().float(), y))


def test_forward_mode_is_the_reference_s() -> None:
    (x, y), t = features((2, 6, 4)), torch.randn(2, 6, 4, dtype=torch.float64)
    found = torch.func.jvp(lambda x: sslfast.gram_anchor(x, y), (x,), (t,))
    torch.testing.assert_close(found, torch.func.jvp(lambda x: reference.gram_anchor(x, y), (x,), (t,)))


def test_bad_input_names_the_argument() -> None:
    x = torch.randn(2, 3, 4)
    with pytest.raises(TypeError, match="student must be a torch.Tensor, got list"):
        sslfast.gram_anchor([[1.0]], x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"teacher must have shape \[images, tokens, features\], got \(3, 4\)"):
        sslfast.gram_anchor(x, x[0])
    with pytest.raises(ValueError, match="student and teacher must have the same shape"):
        sslfast.gram_anchor(x, x[:1])
    with pytest.raises(TypeError, match="student and teacher must have the same dtype"):
        sslfast.gram_anchor(x, x.double())
    with pytest.raises(ValueError, match="student must have at least one image and one row"):
        sslfast.gram_anchor(x[:, :0], x[:, :0])
    with pytest.raises(ValueError, match="negatives must be one of keep, clamp, clamp_teacher, got 'drop'"):
        sslfast.gram_anchor(x, x, negatives="drop")


def test_the_operator_checks_what_it_is_given() -> None:
    x = torch.randn(2, 3, 4)
    forward = torch.ops.sslfast.gram_anchor
    wrong = {
        "student must be .images, rows, features.": lambda: forward(x[0], x[0], True, 0, True),
        "teacher has an unexpected shape": lambda: forward(x, x[:1], True, 0, True),
        "teacher must be Float, got Double": lambda: forward(x, x.double(), True, 0, True),
        "negatives must be 0, 1 or 2, got 3": lambda: forward(x, x, True, 3, True),
        "student must be float32, float64": lambda: forward(x.int(), x.int(), True, 0, True),
    }
    for message, call in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            call()
