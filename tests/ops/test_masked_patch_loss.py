"""The loss of predicted patches: the kernels against the reference in float64, and against the papers' code."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import sslfast
from helpers import DTYPES, GRAD_LOSS, roundings, value_and_gradients, within_budget
from sslfast.masking.compat import forward_loss
from sslfast.ops.masked_patch_loss import by_reference, masked_patch_loss as public

pytestmark = pytest.mark.sanitize

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# (images, patch): MAE's, ragged strips, three channels below a vector, one channel, many, video, prime, one pixel.
CASES = {
    "mae": ((3, 3, 64, 96), (16, 16)),
    "ragged": ((2, 3, 21, 10), (7, 5)),
    "tiny": ((2, 3, 2, 6), (1, 3)),
    "grey": ((2, 1, 16, 24), (8, 8)),
    "many channels": ((1, 5, 26, 13), (13, 13)),
    "video": ((2, 3, 4, 32, 16), (2, 16, 8)),
    "one patch": ((1, 2, 4, 4), (4, 4)),
}


def inputs(
    case: str, dtype: torch.dtype, image_dtype: torch.dtype, masked: float = 0.7
) -> tuple[Tensor, Tensor, Tensor]:
    """images, pred [B, L, n], mask [B, L] with at least one patch masked."""
    shape, patch = CASES[case]
    images = torch.randint(256, shape, dtype=torch.uint8)
    if image_dtype != torch.uint8:
        images = (images.double() / 255 * 4 - 2).to(image_dtype)
    cells = 1
    for n, p in zip(shape[-len(patch) :], patch, strict=True):
        cells *= n // p
    width = images[0].numel() // cells
    mask = torch.rand(shape[0], cells) < masked
    mask[0, -1] = True
    return images, torch.randn(shape[0], cells, width, dtype=torch.float64).to(dtype), mask


def numbers(channels: int) -> dict[str, list[float]]:
    return {"mean": [0.4 + 0.05 * c for c in range(channels)], "std": [0.2 + 0.03 * c for c in range(channels)]}


def check(images: Tensor, pred: Tensor, masks: Any, **options: Any) -> None:
    """Value and gradient within the budget of the reference in the accumulator's dtype."""
    wide = torch.float64 if pred.dtype == torch.float64 else torch.float32

    def function(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        x = images
        if dtype == torch.float64 and images.dtype not in (torch.uint8, torch.float64):
            x = images.to(wide).double()  # the kernel reads pixels in the accumulator's dtype
        return lambda pred: public(x, pred, masks, **options)

    with sslfast.use_backend(images.device.type):
        kernel = value_and_gradients(function(pred.dtype), pred)
    plain = sslfast.use_backend("reference")(value_and_gradients)
    single, truth = roundings(plain, function(wide), pred.to(wide)), plain(function(torch.float64), pred.double())
    assert kernel[0].dtype == wide and kernel[1].dtype == pred.dtype
    within_budget("loss", kernel[0], single[0], truth[0], wide)
    within_budget("dpred", kernel[1], single[1].to(pred.dtype), truth[1], pred.dtype, GRAD_LOSS / pred.numel())


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", ["channels_last", "channels_first"])
@pytest.mark.parametrize("target", ["pixels", "mae", "videomae"])
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient(case: str, target: str, order: str, device: str) -> None:
    shape, patch = CASES[case]
    for loss, scaled in (("mse", False), ("l1", True)):
        images, pred, mask = (t.to(device) for t in inputs(case, torch.float32, torch.float32))
        given = numbers(shape[1]) if scaled else {}
        check(images, pred, mask, patch_size=patch, loss=loss, target=target, order=order, **given)


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("image_dtype", [torch.uint8, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, image_dtype: torch.dtype, device: str) -> None:
    images, pred, mask = (t.to(device) for t in inputs("mae", dtype, image_dtype))
    check(images, pred, mask, patch_size=16, target="mae", **numbers(3))
    check(images, pred, mask, patch_size=16, loss="l1")


@pytest.mark.parametrize("device", DEVICES)
def test_forms_of_masks_agree(device: str) -> None:
    images, pred, _ = (t.to(device) for t in inputs("mae", torch.float32, torch.uint8))
    ids = torch.stack([torch.randperm(24)[:17] for _ in range(3)]).to(device)  # not in order
    mask = torch.zeros(3, 24, dtype=torch.bool, device=device).scatter(1, ids, True)

    def loss(masks: Any) -> Callable[[Tensor], Tensor]:
        return lambda p: public(images, p, masks, patch_size=16, target="mae")

    expected = value_and_gradients(loss(mask), pred)
    for masks in (mask.float(), mask.bfloat16(), ids, SimpleNamespace(ids_mask=ids)):
        for found, wanted in zip(value_and_gradients(loss(masks), pred), expected, strict=True):
            assert torch.equal(found, wanted)
    rows = ids[..., None].expand(-1, -1, pred.shape[2])
    packed = value_and_gradients(loss(ids), pred.gather(1, rows))
    torch.testing.assert_close(packed[0], expected[0])
    torch.testing.assert_close(packed[1], expected[1].gather(1, rows))
    check(images, pred.gather(1, rows).half(), ids, patch_size=16, target="mae")


def mae_forward_loss(imgs: Tensor, pred: Tensor, mask: Tensor, p: int, norm_pix_loss: bool) -> Tensor:
    """As facebookresearch/mae writes it."""
    h, w = imgs.shape[2] // p, imgs.shape[3] // p
    target = torch.einsum("nchpwq->nhwpqc", imgs.reshape(len(imgs), 3, h, p, w, p)).reshape(len(imgs), h * w, p**2 * 3)
    if norm_pix_loss:
        mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        target = (target - mean) / (var + 1.0e-6) ** 0.5
    loss = ((pred - target) ** 2).mean(dim=-1)
    return (loss * mask).sum() / mask.sum()


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_is_the_loss_of_mae(norm_pix_loss: bool) -> None:
    images, pred, mask = inputs("mae", torch.float64, torch.float64)
    images[0, :, -16:, -16:] = 0.3  # a flat patch: the variance is 0, and 1e-6 what is divided by
    mine = value_and_gradients(
        lambda p: forward_loss(images, p, mask.double(), patch_size=16, norm_pix_loss=norm_pix_loss), pred
    )
    theirs = value_and_gradients(lambda p: mae_forward_loss(images, p, mask.double(), 16, norm_pix_loss), pred)
    for found, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(found, wanted)


def test_is_the_loss_of_videomae() -> None:
    """Its engine undoes the normalisation, cuts 'b c (t p0) (h p1) (w p2) -> b (t h w) (p0 p1 p2) c', normalises."""
    video, pred, _ = inputs("video", torch.float64, torch.float64)
    mean, std = (torch.tensor(numbers(3)[name]).double() for name in ("mean", "std"))
    mask = torch.rand(1, 8).argsort(1).expand(2, -1) < 5
    x = video * std[:, None, None, None] + mean[:, None, None, None]
    x = x.reshape(2, 3, 2, 2, 2, 16, 2, 8).permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(2, 8, 2 * 16 * 8, 3)
    norm = (x - x.mean(-2, keepdim=True)) / (x.var(-2, unbiased=True, keepdim=True).sqrt() + 1e-6)
    labels = norm.flatten(2)[mask].reshape(2, 5, -1)
    outputs = pred[mask].reshape(2, 5, -1)
    ids = mask.nonzero()[:, 1].reshape(2, 5)
    undo = {"mean": (-mean / std).tolist(), "std": (1 / std).tolist()}
    found = public(video, outputs, ids, patch_size=(2, 16, 8), target="videomae", **undo)
    torch.testing.assert_close(found, torch.nn.functional.mse_loss(outputs, labels))


def test_is_the_loss_of_simmim() -> None:
    images, _, _ = inputs("mae", torch.float64, torch.float64)
    z = torch.randn(3, 3 * 16 * 16, 4, 6, dtype=torch.float64)
    mask = torch.rand(3, 4, 6) < 0.6
    pixels = mask.double().repeat_interleave(16, 1).repeat_interleave(16, 2).unsqueeze(1)
    theirs = ((images - torch.nn.functional.pixel_shuffle(z, 16)).abs() * pixels).sum() / (pixels.sum() + 1e-5) / 3
    mine = public(images, z.flatten(2).mT, mask.flatten(1), patch_size=16, loss="l1", order="channels_first")
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=0)


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
def test_strides(device: str) -> None:
    images, pred, mask = (t.to(device) for t in inputs("mae", torch.float32, torch.float32))
    longer = torch.cat([pred[:, :1], pred], 1)  # with a class token
    views = {
        "channels last": (images.to(memory_format=torch.channels_last), pred, mask),
        "columns before rows": (images.mT.contiguous().mT, pred, mask),
        "every second pixel": (images.repeat_interleave(2, 3)[..., ::2], pred, mask),
        "one image repeated": (images[:1].expand(3, -1, -1, -1), pred, mask),
        "without a class token": (images, longer[:, 1:], mask),
        "patches last": (images, pred.mT.contiguous().mT, mask),
        "mask": (images, pred, mask.T.contiguous().T),
    }
    for name, (x, p, m) in views.items():
        found = value_and_gradients_of_view(x, p, m)
        expected = value_and_gradients_of_view(x.contiguous(), p.contiguous(), m.contiguous())
        for mine, wanted in zip(found, expected, strict=True):
            assert torch.equal(mine, wanted), name


def value_and_gradients_of_view(images: Tensor, pred: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    pred = pred.detach().requires_grad_()
    loss = public(images, pred, mask, patch_size=16, target="videomae", **numbers(3))
    return loss.detach(), torch.autograd.grad(loss, pred)[0]


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_masked_is_not_read(device: str) -> None:
    images, pred, mask = (t.to(device) for t in inputs("mae", torch.float32, torch.float32))
    mask[0, 0] = mask[1, 1] = False
    expected = value_and_gradients(lambda p: public(images, p, mask, patch_size=16), pred)
    images[0, :, :16, :16] = float("nan")
    pred[1, 1] = float("nan")
    for backend in (device, "reference"):
        with sslfast.use_backend(backend):
            loss, dpred = value_and_gradients(lambda p: public(images, p, mask, patch_size=16), pred)
        torch.testing.assert_close(loss, expected[0])
        torch.testing.assert_close(dpred, expected[1])
    assert (dpred[~mask] == 0).all()
    pred[0, -1, 3] = float("nan")
    for options in ({}, {"loss": "l1"}):
        loss, dpred = value_and_gradients(lambda p: public(images, p, mask, patch_size=16, **options), pred)  # noqa: B023
        assert loss.isnan() and dpred[0, -1, 3].isnan() and int(dpred.isnan().sum()) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_without_a_masked_patch(device: str) -> None:
    images, pred, mask = (t.to(device) for t in inputs("mae", torch.float32, torch.float32))
    for backend in (device, "reference"):
        with sslfast.use_backend(backend):
            loss, dpred = value_and_gradients(lambda p: public(images, p, mask & False, patch_size=16), pred)
            assert loss.isnan() and dpred.shape == pred.shape
            assert public(images[:0], pred[:0], mask[:0], patch_size=16).isnan()
            assert public(
                images, pred[:, :0], torch.zeros(3, 0, dtype=torch.int64, device=device), patch_size=16
            ).isnan()


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck_and_double_backward(device: str) -> None:
    images, pred, _ = (t.to(device) for t in inputs("ragged", torch.float64, torch.uint8))
    # One channel, 2 × 2 patches: a numerical derivative takes two losses for each number of the prediction.
    images, pred = images[:, :1, :14], pred[:, :4, :35].clone().requires_grad_()
    mask = torch.tensor([[True, False, True, True], [False, False, True, False]], device=device)
    with sslfast.use_backend(device):
        assert torch.autograd.gradcheck(lambda p: public(images, p, mask, patch_size=(7, 5), target="mae"), pred)
        assert torch.autograd.gradgradcheck(lambda p: public(images, p, mask, patch_size=(7, 5), target="mae"), pred)
        assert not public(images.double().requires_grad_(), pred.detach(), mask, patch_size=(7, 5)).requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_and_compile(device: str) -> None:
    images, pred, mask = (t.to(device) for t in inputs("ragged", torch.float32, torch.uint8))
    options = ((1, 7, 5), 0, 1, [], [], True)
    ops = torch.ops.sslfast
    torch.library.opcheck(
        ops.masked_patch_loss.default, (images[:, :, None], pred.clone().requires_grad_(), mask, *options)
    )
    loss, count = ops.masked_patch_loss(images[:, :, None], pred, mask, *options)
    assert count == mask.sum()
    torch.library.opcheck(
        ops.masked_patch_loss_backward.default, (loss, images[:, :, None], pred, mask, count, *options)
    )

    def function(p: Tensor) -> Tensor:
        return public(images, p, mask.float(), patch_size=(7, 5), target="mae")

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for found, expected in zip(value_and_gradients(compiled, pred), value_and_gradients(function, pred), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_on_any_number_of_threads(device: str) -> None:
    images, pred, mask = (t.to(device) for t in inputs("mae", torch.float32, torch.float32))
    first = value_and_gradients(lambda p: public(images, p, mask, patch_size=16, target="mae"), pred)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        second = value_and_gradients(lambda p: public(images, p, mask, patch_size=16, target="mae"), pred)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_a_bad_id_on_the_gpu_gives_nan() -> None:
    images, pred, _ = (t.cuda() for t in inputs("mae", torch.float32, torch.float32))
    ids = torch.arange(5, device="cuda").expand(3, -1).contiguous()
    ids[1, 2] = 24
    loss, dpred = value_and_gradients(lambda p: public(images, p, ids, patch_size=16), pred[:, :5])
    assert loss.isnan() and dpred[1, 2].isnan().all() and int(dpred.isnan().sum()) == pred.shape[2]


def test_module() -> None:
    images, pred, mask = inputs("mae", torch.float32, torch.float32)
    options = {"loss": "l1", "target": "mae", "order": "channels_first", **numbers(3)}
    module = sslfast.MaskedPatchLoss(16, **options)
    assert torch.equal(module(images, pred, mask), public(images, pred, mask, patch_size=16, **options))
    assert "patch_size=16, loss='l1', target='mae'" in repr(module)
    with pytest.raises(ValueError, match="target must be one of 'pixels', 'mae', 'videomae', got 'norm'"):
        sslfast.MaskedPatchLoss(16, target="norm")


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"images": [1.0]}, TypeError, "images must be a torch.Tensor, got list"),
    ({"images": torch.zeros(3, 64, 96)}, ValueError, r"images must be \[B, C, H, W\] or"),
    ({"images": torch.zeros(3, 3, 64, 96).int()}, TypeError, "images must be uint8, .* got torch.int32"),
    ({"images": torch.zeros(2, 3, 64, 96)}, ValueError, r"pred must be \[2, patches, 768\]"),
    ({"pred": torch.zeros(3, 24, 700)}, ValueError, r"pred must be \[3, patches, 768\] .* got shape \(3, 24, 700\)"),
    ({"pred": torch.zeros(3, 24, 768).int()}, TypeError, "pred must be float32, .* got torch.int32"),
    ({"pred": torch.zeros(3, 23, 768)}, ValueError, "pred must have a row for each of 24 patches, got 23"),
    ({"patch_size": 15}, ValueError, r"patch_size must divide the images' sides \(64, 96\), got 15"),
    ({"patch_size": (2, 16, 16)}, ValueError, r"patch_size must be p or \(ph, pw\) .* got \(2, 16, 16\)"),
    ({"patch_size": 0}, ValueError, "patch_size must be positive, got 0"),
    ({"mean": [0.5]}, ValueError, r"mean must be one number, or one for each of the images' 3 channels .* got 1"),
    ({"std": [0.5, 0.0, 1.0]}, ValueError, "std must be finite and positive"),
    ({"loss": "l2"}, ValueError, "loss must be one of 'mse', 'l1', got 'l2'"),
    ({"order": "chw"}, ValueError, "order must be one of"),
    ({"masks": [True]}, TypeError, "masks must be Masks or a torch.Tensor, got list"),
    ({"masks": torch.zeros(3, 24).int()}, TypeError, "masks must be bool, .* got torch.int32"),
    ({"masks": torch.full((3, 24), 0.5)}, ValueError, "masks must be of 0 .* and 1"),
    ({"masks": torch.ones(3, 23)}, ValueError, r"masks must be \[3, 24\]"),
    ({"masks": torch.ones(2, 24)}, ValueError, r"masks must be \[3, 24\], or ids \[3, M\], got shape \(2, 24\)"),
    ({"masks": torch.full((3, 4), 24)}, ValueError, "masks must hold patches, 0 to 23, got 24 to 24"),
    ({"masks": torch.full((3, 4), -1)}, ValueError, "masks must hold patches, 0 to 23, got -1 to -1"),
    ({"masks": torch.full((3, 4), 2)}, ValueError, "masks must not hold a patch of an image twice"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_bad_input_names_the_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {
        "images": torch.zeros(3, 3, 64, 96),
        "pred": torch.zeros(3, 24, 768),
        "masks": torch.ones(3, 24),
        "patch_size": 16,
        **change,
    }
    with pytest.raises(error, match=message):
        public(**given)


@pytest.mark.parametrize("device", DEVICES)
def test_operators_check_what_they_are_given(device: str) -> None:
    images, pred, mask = (t.to(device) for t in inputs("mae", torch.float32, torch.float32))
    op, options = torch.ops.sslfast.masked_patch_loss, ((1, 16, 16), 0, 0, [], [], True)
    x = images[:, :, None]
    with pytest.raises(RuntimeError, match="pred has an unexpected shape"):
        op(x, pred[:, :, 1:], mask, *options)
    with pytest.raises(RuntimeError, match="index has an unexpected shape"):
        op(x, pred, mask[:2], *options)
    with pytest.raises(RuntimeError, match="patch must divide the image"):
        op(x, pred, mask, (1, 15, 16), *options[1:])
    if device == "cpu":
        with pytest.raises(RuntimeError, match="ids must be from 0 to 23, got 24"):
            op(x, pred[:, :1], torch.full((3, 1), 24), *options)


def test_reference_in_another_dtype_is_the_reference() -> None:
    """by_reference is what serves without a binary: bytes as shares of 255, and 16 bits summed in float32."""
    images, pred, mask = inputs("mae", torch.bfloat16, torch.uint8)
    found = by_reference(images[:, :, None], pred, mask, (1, 16, 16), 0, 0, [], [], True)
    wanted = by_reference(images[:, :, None].double() / 255, pred.double(), mask, (1, 16, 16), 0, 0, [], [], True)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)
