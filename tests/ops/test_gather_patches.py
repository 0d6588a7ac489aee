"""Patches of images as rows, and back: the kernels against the reference in float64, on every instruction-set level."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import sslfast
from helpers import within_budget
from sslfast import reference
from sslfast.masking import compat, gather_patches, patchify, scatter_patches, unpatchify

pytestmark = pytest.mark.sanitize

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ORDERS = ["channels_first", "channels_last"]
# (B, C, sides, patch, K): square; ragged lines of patches; films; one channel; more patches than a task; one number.
SHAPES = [
    (2, 3, (32, 32), (16, 16), 2),
    (3, 3, (21, 30), (7, 5), 11),
    (2, 3, (4, 12, 10), (2, 3, 5), 7),
    (1, 1, (6, 4), (1, 2), 12),
    (9, 2, (64, 80), (16, 16), 13),
    (2, 1, (1, 1), (1, 1), 1),
]


def some_ids(batch: int, length: int, kept: int) -> Tensor:
    """Kept patches in no order; −1 stands in some rows."""
    ids = torch.stack([torch.randperm(length)[:kept] for _ in range(batch)])
    if kept > 2:
        ids[-1, kept // 2] = -1
    return ids


def make(shape: tuple[int, int, tuple[int, ...], tuple[int, ...], int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, channels, sides, patch, kept = shape
    images = torch.randn(batch, channels, *sides, dtype=torch.float64).to(dtype)
    if dtype == torch.uint8:
        images = torch.randint(0, 256, images.shape, dtype=dtype)
    length = 1
    for side, p in zip(sides, patch, strict=True):
        length *= side // p
    return images, some_ids(batch, length, kept)


def three(patch: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * (3 - len(patch)) + patch


@pytest.mark.levels
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.uint8, *DTYPES], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_and_gradient(shape: tuple, dtype: torch.dtype, order: str) -> None:
    images, ids = make(shape, dtype)
    channels, patch, inner = shape[1], shape[3], order == "channels_last"
    mean, std = [0.3 + 0.1 * c for c in range(channels)], [0.2 + 0.3 * c for c in range(channels)]
    for out in (torch.float32, torch.float64, torch.bfloat16):
        leaf = images.clone().requires_grad_(dtype != torch.uint8)
        rows = gather_patches(leaf, ids, patch_size=patch, mean=mean, std=std, order=order, dtype=out)
        single, truth = (
            reference.gather_patches(images.to(wide) / scale, ids, three(patch), mean, std, inner, wide)
            for wide in (torch.promote_types(dtype, torch.float32), torch.float64)
            for scale in [255 if dtype == torch.uint8 else 1]
        )
        assert rows.dtype == out
        within_budget("rows", rows, single.to(out), truth, out)
        if dtype == torch.uint8:
            continue
        grad = torch.randn(rows.shape, dtype=torch.float64).to(out).mT.contiguous().mT  # not contiguous
        (found,) = torch.autograd.grad(rows, leaf, grad)
        size = (channels, *((1,) * (5 - images.dim())), *images.shape[2:])
        scale = [1 / s for s in std]
        single, truth = (
            reference.scatter_patches(grad.to(wide), ids, size, three(patch), scale, inner).view(images.shape)
            for wide in (torch.promote_types(dtype, torch.float32), torch.float64)
        )
        assert found.dtype == dtype
        within_budget("dimages", found, single.to(dtype), truth, dtype)


def test_what_the_numbers_are() -> None:
    """By hand: the order of a row is the convolution's, or MAE's; without a mean and a deviation pixels are copied."""
    images = torch.arange(2 * 4 * 6, dtype=torch.float32).view(1, 2, 4, 6)
    ids = torch.tensor([[4, -1]])
    corner = images[0, :, 2:4, 2:4]
    assert torch.equal(gather_patches(images, ids, patch_size=2)[0, 0], corner.flatten())
    inner = gather_patches(images, ids, patch_size=2, order="channels_last")
    assert torch.equal(inner[0, 0], corner.permute(1, 2, 0).flatten()) and (inner[0, 1] == 0).all()
    byte = gather_patches(images.to(torch.uint8), ids, patch_size=2, std=0.5)
    torch.testing.assert_close(byte[0, 0], corner.flatten() / 127.5)
    images[0, 0, 2, 2], images[0, 1, 3, 3] = float("nan"), float("inf")
    assert torch.equal(
        gather_patches(images, ids, patch_size=2)[0, 0].isfinite(), images[0, :, 2:4, 2:4].flatten().isfinite()
    )


@pytest.mark.parametrize("order", ORDERS)
def test_scatter_is_the_inverse(order: str) -> None:
    for shape in SHAPES:
        images, _ = make(shape, torch.float32)
        rows = gather_patches(images, patch_size=shape[3], order=order)
        assert torch.equal(scatter_patches(rows, size=images.shape[1:], patch_size=shape[3], order=order), images)
    rows = gather_patches(images := torch.randn(2, 3, 8, 8), ids := torch.tensor([[3, 1], [0, -1]]), patch_size=4)
    back = scatter_patches(rows, ids, size=(3, 8, 8), patch_size=4)
    seen = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    seen[0, :, 4:, 4:] = seen[0, :, :4, 4:] = seen[1, :, :4, :4] = True
    assert torch.equal(back, images.where(seen, torch.zeros(())))


def test_any_strides() -> None:
    ids = torch.tensor([[3, 0], [1, 2]])
    for dtype in (torch.float32, torch.uint8):
        base = (torch.rand(2, 3, 16, 20) * 255).to(dtype)
        views = {
            "channels last": base.contiguous(memory_format=torch.channels_last),
            "a crop": (torch.rand(2, 3, 30, 40) * 255).to(dtype)[:, :, 3:19, 5:25],
            "every second column": (torch.rand(2, 3, 16, 40) * 255).to(dtype)[..., ::2],
            "transposed": base.transpose(0, 1)[:2, :2].mT.contiguous().mT,
            "one image repeated": base[:1].expand(2, -1, -1, -1),
        }
        for name, images in views.items():
            for order in ORDERS:
                found = gather_patches(images, ids.T.contiguous().T, patch_size=(8, 10), order=order)
                assert torch.equal(found, gather_patches(images.contiguous(), ids, patch_size=(8, 10), order=order)), (
                    name
                )
    rows = torch.randn(2, 3 * 80, 2).mT
    assert torch.equal(
        scatter_patches(rows, ids, size=(3, 16, 20), patch_size=(8, 10)),
        scatter_patches(rows.contiguous(), ids, size=(3, 16, 20), patch_size=(8, 10)),
    )


def test_backends_agree_and_reference_serves() -> None:
    images, ids = make(SHAPES[1], torch.float32)
    calls = {"patch_size": (7, 5), "mean": (0.1, 0.2, 0.3), "std": 2.0}
    rows = gather_patches(images, ids, **calls)
    back = scatter_patches(rows, ids, size=(3, 21, 30), patch_size=(7, 5))
    with sslfast.use_backend("reference"):
        torch.testing.assert_close(gather_patches(images, ids, **calls), rows)
        assert torch.equal(scatter_patches(rows, ids, size=(3, 21, 30), patch_size=(7, 5)), back)
        with pytest.raises(ValueError, match="ids must not repeat within a row, got 3 twice"):
            gather_patches(images[:1], torch.tensor([[3, 3]]), patch_size=(7, 5))


def test_gradients_of_gradients() -> None:
    images = torch.randn(2, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[3, 0], [-1, 5]])

    def gather(x: Tensor) -> Tensor:
        return gather_patches(x, ids, patch_size=2, mean=0.5, std=(0.3, 0.7))

    def scatter(x: Tensor) -> Tensor:
        return scatter_patches(x, ids, size=(2, 4, 6), patch_size=2)

    rows = torch.randn(2, 2, 8, dtype=torch.float64, requires_grad=True)
    for function, x in ((gather, images), (scatter, rows)):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


def test_opcheck() -> None:
    images, ids = torch.randn(2, 3, 8, 6, requires_grad=True), torch.tensor([[1, 3], [0, -1]])
    gather, scatter = torch.ops.sslfast.gather_patches.default, torch.ops.sslfast.scatter_patches.default
    torch.library.opcheck(gather, (images, ids, [1, 4, 3], [0.1, 0.2, 0.3], [1.0, 2.0, 3.0], True, torch.float32))
    torch.library.opcheck(gather, (images, None, [1, 4, 3], [], [], False, torch.bfloat16))
    rows = torch.randn(2, 2, 36, requires_grad=True)
    torch.library.opcheck(scatter, (rows, ids, [3, 1, 8, 6], [1, 4, 3], [1.0, 2.0, 3.0], False))


def test_compile_without_graph_breaks() -> None:
    images, ids = torch.randn(2, 3, 8, 8), torch.tensor([[1, 3], [0, 2]])

    def there_and_back(x: Tensor) -> Tensor:
        rows = gather_patches(x, ids, patch_size=4, std=(1.0, 2.0, 3.0))
        return scatter_patches(rows, ids, size=(3, 8, 8), patch_size=4)

    found = []
    for function in (there_and_back, torch.compile(there_and_back, backend="aot_eager", fullgraph=True)):
        leaf = images.clone().requires_grad_()
        out = function(leaf)
        found.append((out, *torch.autograd.grad(out, leaf, images)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_patchify_is_lightlys() -> None:
    images = torch.randn(2, 3, 32, 32)
    rows = images.reshape(2, 3, 2, 16, 2, 16).permute(0, 2, 4, 3, 5, 1).reshape(2, 4, -1)
    assert torch.equal(patchify(images, 16), rows) and torch.equal(unpatchify(rows, 16, grid=2), images)
    assert torch.equal(compat.unpatchify(rows, 16), images)
    wide = torch.randn(2, 1, 8, 24)
    assert torch.equal(unpatchify(patchify(wide, 4), 4, 1, grid=(2, 6)), wide)
    with pytest.raises(ValueError, match="as many as the grid has places, 3 × 3, got 12"):
        unpatchify(patchify(wide, 4), 4, 1, grid=3)
    with pytest.raises(ValueError, match=r"must be those of a square, got 12: sslfast.masking.unpatchify takes"):
        compat.unpatchify(patchify(wide, 4), 4, 1)


def test_a_grid_is_not_guessed() -> None:
    """16 patches are 4 × 4 as well as 2 × 8: the count does not tell."""
    images = torch.randn(2, 3, 8, 32)
    with pytest.raises(TypeError, match="grid"):
        unpatchify(patchify(images, 4), 4)  # type: ignore[call-arg]
    assert torch.equal(unpatchify(patchify(images, 4), 4, grid=(2, 8)), images)
    assert torch.equal(unpatchify(patchify(images, (2, 8)), (2, 8), grid=np.array([4, 4])), images)


def test_bytes_are_not_patchified() -> None:
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(TypeError, match="images must be floating point, got torch.uint8"):
        patchify(images.to(torch.uint8), 16)


def test_empty_and_wrong_input() -> None:
    images, ids = torch.randn(2, 3, 8, 8), torch.tensor([[0, 1], [2, 3]])
    assert gather_patches(images[:0], ids[:0], patch_size=4).shape == (0, 2, 48)
    assert gather_patches(images, ids[:, :0], patch_size=4).shape == (2, 0, 48)
    assert (scatter_patches(torch.empty(2, 0, 48), ids[:, :0], size=(3, 8, 8), patch_size=4) == 0).all()
    wrong: list[tuple[type[Exception], str, dict]] = [
        (ValueError, r"images must be \[B, C, H, W\] or .* got shape \(3, 8, 8\)", {"images": images[0]}),
        (TypeError, "images must be uint8, .* got torch.int64", {"images": images.long()}),
        (ValueError, r"patch_size must divide the images' sides \(8, 8\), got 3", {"patch_size": 3}),
        (ValueError, r"patch_size must be p or \(ph, pw\) .* got \(1, 4, 4\)", {"patch_size": (1, 4, 4)}),
        (ValueError, r"patch_size must be \(pt, ph, pw\) .* got 4", {"images": images[:, :, None]}),
        (TypeError, "ids must be int64, got torch.int32", {"ids": ids.int()}),
        (ValueError, r"ids must be \[2, K\], a row for each image, got shape \(1, 2\)", {"ids": ids[:1]}),
        (
            ValueError,
            "mean must be one number, or one for each of the images' 3 channels .* got 2",
            {"mean": (0.1, 0.2)},
        ),
        (ValueError, "std must be finite and positive, got", {"std": (0.1, 0.0, 1.0)}),
        (ValueError, "order must be 'channels_first' or 'channels_last', got 'HWC'", {"order": "HWC"}),
        (TypeError, "dtype must be float32, .* got torch.int32", {"dtype": torch.int32}),
        (RuntimeError, "ids must be from 0 to 3, or -1 for none, got 4", {"ids": ids + 1}),
        (RuntimeError, "ids must be from 0 to 3, or -1 for none, got -2", {"ids": ids - 2}),
        (RuntimeError, "ids must not repeat within a row, got 0 twice", {"ids": ids * 0}),
    ]
    for kind, message, changed in wrong:
        with pytest.raises(kind, match=message):
            arguments = {"images": images, "ids": ids, "patch_size": 4, **changed}
            gather_patches(arguments.pop("images"), arguments.pop("ids"), **arguments)
    with pytest.raises(ValueError, match=r"patches must be \[B, 2, 48\], got shape \(2, 2, 47\)"):
        scatter_patches(torch.empty(2, 2, 47), ids, size=(3, 8, 8), patch_size=4)
    with pytest.raises(RuntimeError, match="ids must not repeat"):
        scatter_patches(torch.empty(2, 2, 48), ids * 0, size=(3, 8, 8), patch_size=4)


@pytest.mark.gpu
@pytest.mark.parametrize("order", ORDERS)
def test_cuda_is_as_cpu(order: str) -> None:
    for shape in SHAPES:
        for dtype in (torch.uint8, *DTYPES):
            images, ids = make(shape, dtype)
            calls = {"patch_size": shape[3], "mean": 0.4, "std": 0.3, "order": order}
            rows = gather_patches(images, ids, **calls)
            found = gather_patches(images.cuda(), ids.cuda(), **calls)
            torch.testing.assert_close(found.cpu(), rows)
            size = images.shape[1:]
            back = scatter_patches(found, ids.cuda(), size=size, patch_size=shape[3], order=order).cpu()
            assert torch.equal(back, scatter_patches(found.cpu(), ids, size=size, patch_size=shape[3], order=order))
