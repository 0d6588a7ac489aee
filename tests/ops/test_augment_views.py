"""Augmented views: the reference against torchvision and PIL, the kernels against the reference in float64."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import sslfast
from augment_common import (
    ALL_FOUR,
    BACKENDS,
    KERNELS,
    OPERATIONS,
    augment,
    device_of,
    many,
    name_of,
    noise,
    photographs,
    row,
    table,
    truth,
)
from helpers import roundings, within_budget
from sslfast import reference
from sslfast.augment import IMAGENET_MEAN, IMAGENET_STD
from sslfast.ops.augment_views import augment_views

pytestmark = pytest.mark.sanitize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOX = (10, 20, 300, 400)  # of photographs of 427 × 640
NORMALISED = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def check(name: str, backend: str, images: Sequence[Tensor], params: Tensor, **options: Any) -> Tensor:
    """A kernel's views within the error budget; returns them."""
    dtype = options.pop("dtype", torch.float32)
    layout = {"channels_last": options.pop("channels_last")} if "channels_last" in options else {}
    got = augment(backend, images, params, dtype=dtype, **layout, **options)
    assert got.dtype == dtype
    in_dtype = roundings(reference.augment_views, images, params, **options).to(dtype)
    within_budget(name, got, in_dtype, truth(images, params, **options), dtype)
    return got


# ---------------------------------------------------------------------------------------- kernels against float64 truth


@pytest.mark.levels
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str, channels: int, dtype: torch.dtype, backend: str) -> None:
    images = [noise(4, channels, 61, 83)]
    images[0][1:] = torch.stack(
        [p[:channels, 100:161, 100:183] for p in photographs()] + [photographs()[0][:channels, -61:, -83:]]
    )
    rows = [row(box, **OPERATIONS[name]) for box in [(0, 0, 61, 83), (5, 9, 40, 37), (1, 2, 20, 70), (30, 40, 5, 4)]]
    normalised = {key: value[:channels] for key, value in NORMALISED.items()}
    for cubic, layout in [(False, False), (True, True)]:
        options = {"size": (37, 45), "cubic": cubic, "dtype": dtype, "channels_last": layout, **normalised}
        got = check(name, backend, images, table(rows), **options)
        format = torch.channels_last if layout else torch.contiguous_format
        assert got[0].is_contiguous(memory_format=format)


@pytest.mark.levels
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.uint8, *DTYPES], ids=name_of)
def test_what_an_image_may_be(dtype: torch.dtype, backend: str) -> None:
    """Dtypes and strides: batches, channels last, steps, one image for all, crops of a larger tensor, and lists."""
    base, options = noise(4, 3, 50, 70, dtype=dtype), {"size": (33, 29), **NORMALISED}
    rows = [row((3, 4, 20 + 3 * i, 21), **OPERATIONS["all"]) for i in range(4)]
    views = {
        "NCHW": base,
        "NHWC": base.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "steps": noise(8, 3, 100, 140, dtype=dtype)[::2, :, ::2, 1::2],
        "every second channel": noise(4, 6, 50, 70, dtype=dtype)[:, ::2],
        "a slice": noise(4, 3, 51, 77, dtype=dtype)[:, :, 1:, 7:],
        "transposed": noise(4, 3, 70, 50, dtype=dtype).transpose(2, 3),
        "one image": base[:1].expand(4, -1, -1, -1),
        "grey as three": base[:, :1].expand(-1, 3, -1, -1),
        "one pixel": base[:, :, :1, :1].expand(-1, -1, 50, 70),
    }
    for name, images in views.items():
        assert name in ("NCHW",) or not images.is_contiguous()
        check(name, backend, [images], table(rows), **options)
    ragged = [noise(3, 30 + 7 * i, 90 - 11 * i, dtype=dtype) for i in range(3)] + [views["NHWC"][0]]
    rows = [row((1, 2, image.shape[1] - 2, image.shape[2] - 3), **OPERATIONS["all"]) for image in ragged]
    check("ragged list", backend, ragged, table(rows), **options)
    params = torch.tensor([rows, rows[::-1]])[:, :, :].transpose(0, 1).contiguous().transpose(0, 1)
    params[..., :4] = torch.tensor([1.0, 2.0, 25.0, 30.0])
    check("strided parameters", backend, [base], params, **options)


@pytest.mark.levels
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("cubic", [False, True], ids=["bilinear", "bicubic"])
def test_shapes(cubic: bool, backend: str) -> None:
    image = noise(3, 61, 1009)
    boxes = [
        (0, 0, 1, 1),
        (60, 1008, 1, 1),
        (5, 0, 1, 1009),
        (0, 7, 61, 1),
        (0, 0, 61, 1009),
        (9, 9, 8, 8),
        (3, 1, 2, 3),
    ]
    for size in [(1, 1), (7, 13), (96, 96), (5, 300), (300, 2), (2, 2)]:
        for kernel in {1, min(3, 2 * min(size) - 1), min(23, 2 * min(size) - 1)}:
            options = {"size": size, "cubic": cubic, "blur_kernel": kernel}
            for chosen in ({}, OPERATIONS["all"]):
                rows = [row(box, **chosen) for box in boxes]
                check(f"{size} {kernel}", backend, [image.expand(len(boxes), -1, -1, -1)], table(rows), **options)
    large = noise(1, 1000, 1000)
    check("1000 to 7", backend, [large], table([row((0, 0, 1000, 1000))]), size=(7, 7), cubic=cubic, mean=[0], std=[1])


def triangles(length: int, size: int) -> Tensor:
    """[size, length]: the weights of a bilinear, antialiased resizing of one axis."""
    scale, out = length / size, torch.zeros(size, length, dtype=torch.float64)
    for i in range(size):
        distance = (torch.arange(length) + 0.5 - scale * (i + 0.5)).abs() / max(scale, 1.0)
        out[i] = (1 - distance).clamp_min(0)
    return out / out.sum(1, keepdim=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 30), (300, 1), (2, 3), (17, 23), (64, 5)], ids=str)
def test_resizing_by_hand(size: tuple[int, int], backend: str) -> None:
    for shape in [(61, 109), (1, 7), (40, 1), (8, 8)]:
        for channels in (1, 3):
            image, plain = torch.rand(channels, *shape), {"mean": [0.0] * channels, "std": [1.0] * channels}
            got = augment(backend, [image], table([row((0, 0, *shape))]), size=size, **plain)[0, 0]
            expected = triangles(shape[0], size[0]) @ image.double() @ triangles(shape[1], size[1]).T
            # Sums of at most 109 and of 61 products, and weights of positions up to 109, in units of 6e-8.
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
def test_blurs(backend: str) -> None:
    image, box = photographs()[0][:, :150, :150], (0, 0, 131, 131)
    for kernel, sigma in itertools.product([1, 3, 9, 23, 255], [1e-3, 0.1, 0.5, 2.0, 7.0, 42.0]):
        options = {"size": (131, 131), "blur_kernel": kernel}
        check(f"{kernel} {sigma}", backend, [image], table([row(box, sigma=sigma)]), **options)


@pytest.mark.levels
@pytest.mark.parametrize("backend", KERNELS)
def test_every_order_of_the_jitter(backend: str) -> None:
    """All 24, and each with its last one, two or three left out; one batch, so neighbours do not mix."""
    orders = [order[:left] for order in itertools.permutations(range(4)) for left in range(1, 5)]
    image = photographs()[1][:, 100:200, 200:330]
    rows = [row((0, 0, 100, 130), order, **ALL_FOUR) for order in orders]
    got = check("orders", backend, [image.expand(len(rows), -1, -1, -1)], table(rows), size=(24, 31))
    full = got[0, 3::4].flatten(1)
    assert torch.cdist(full, full).fill_diagonal_(1).min() > 1e-3  # they do differ


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.0])
def test_solarize_thresholds(threshold: float, backend: str) -> None:
    image = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)  # 0.3 lies between two grey levels
    params, options = table([row((0, 0, 16, 16), solarize=1)]), {"size": (16, 16), "mean": [0.0], "std": [1.0]}
    check("solarize", backend, [image], params, threshold=threshold, **options)
    pil = 255 * augment(backend, [image], params, threshold=threshold, pil=True, **options)[0, 0, 0]
    bytes_ = image[0, 0].float()
    expected = torch.where(bytes_ >= 256 * threshold, 255 - bytes_, bytes_)
    torch.testing.assert_close(pil, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_values_beyond_0_and_1(dtype: torch.dtype, backend: str) -> None:
    """Held to the range only where torchvision does it; a bicubic view of bytes overshoots as well."""
    image = (3 * torch.randn(6, 3, 40, 40)).to(dtype)
    for name, cubic in itertools.product(OPERATIONS, [False, True]):
        if "hue" in name or name in ("all", "all, grey", "saturated"):
            continue  # torchvision's saturation of a pixel below zero is not defined; see the next test
        params = table([row((2 * i, i, 30, 20 + i), **OPERATIONS[name]) for i in range(6)])
        got = check(name, backend, [image], params, size=(25, 25), cubic=cubic)
        assert got.min() < -0.1 or "order" in OPERATIONS[name] or name == "solarize"


@pytest.mark.parametrize("backend", BACKENDS)
def test_bicubic_overshoot_then_hue_is_finite(backend: str) -> None:
    """One channel below zero and the others zero: a saturation of 1/0 on the way through HSV, which means black."""
    image = torch.zeros(1, 3, 16, 16)
    image[:, 0, :, 8:] = 1
    got = augment(backend, [image], table([row((0, 0, 16, 16), [3], hue=0.2)]), size=(64, 64), cubic=True)
    assert got.isfinite().all() and got.min() >= 0


@pytest.mark.levels
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("cubic", [False, True], ids=["bilinear", "bicubic"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_pixels(value: float, cubic: bool, backend: str) -> None:
    """They spread as far as the reference spreads them and no further, and a NaN is never made finite.

    A weight of exactly zero may be left out, and 0 · NaN with it, so a NaN must stand where its weight is not zero.
    """
    image = torch.rand(3, 3, 40, 40)
    marked = torch.zeros(3, 1, 40, 40)
    marked[:, :, 20, 17] = 1
    for channel in range(3):
        image[channel, channel, 20, 17] = value
    options = {"size": (24, 21), "cubic": cubic}
    for name, operation in OPERATIONS.items():
        params = table([row((4, 5, 33, 31), **operation)] * 3)
        got, expected = (
            augment(backend, [image], params, **options),
            reference.augment_views([image], params, **options),
        )
        geometry = params.clone()
        geometry[..., 9:14] = torch.tensor([-1.0, -1, -1, -1, 0])
        geometry[..., 15] = 0
        touched = augment("reference", [marked.expand(-1, 3, -1, -1)], geometry, **options).abs() > 1e-6
        if 1 in operation.get("order", []):
            touched[:] = True  # through the mean
        compare = expected.isfinite()
        if math.isinf(value) and 3 in operation.get("order", []):
            compare &= ~touched  # the hue of an infinite pixel is not defined
            compare &= augment("reference", [image], geometry, **options).isfinite().all(2, keepdim=True)
        torch.testing.assert_close(got[compare], expected[compare], rtol=1e-4, atol=1e-5)
        if math.isnan(value):
            assert got[expected.isnan() & touched].isnan().all(), f"{name}: a NaN became finite"


@pytest.mark.parametrize("backend", KERNELS)
def test_what_is_off_has_no_influence(backend: str) -> None:
    images, size = [noise(2, 3, 30, 30)], (20, 20)
    clean = table([row((0, 0, 30, 30), [2], saturation=1.3), row((1, 2, 9, 7), [0, 3], brightness=0.8, hue=0.1)])
    dirty = clean.clone()
    for image, used in enumerate([(7,), (5, 8)]):
        for column in set(range(5, 9)) - set(used):
            dirty[0, image, column] = float("nan")
    assert torch.equal(augment(backend, images, clean, size=size), augment(backend, images, dirty, size=size))


# ------------------------------------------------------------------------------------------------------------ contracts


@pytest.mark.levels
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("pil", [False, True], ids=["torchvision", "pil"])
def test_same_bits(pil: bool, backend: str) -> None:
    """Run to run, for any number of threads, in a batch or alone, views together or one by one, batch or list."""
    (images,), params = many()
    options = {"size": (40, 40), "pil": pil, "dtype": torch.float32}
    views = augment(backend, [images], params, **options)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(augment(backend, [images], params, **options), views), f"{count} threads"
    finally:
        torch.set_num_threads(threads)
    for i in range(len(images)):
        assert torch.equal(augment(backend, [images[i]], params[:, i : i + 1], **options)[:, 0], views[:, i]), i
    for v in range(3):
        assert torch.equal(augment(backend, [images], params[v : v + 1], **options)[0], views[v]), v
    assert torch.equal(augment(backend, list(images), params, **options), views)


@pytest.mark.levels
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_narrow_views_are_the_wide_ones_rounded(dtype: torch.dtype, backend: str) -> None:
    images, params = many()
    wide = augment(backend, images, params, size=(40, 40), **NORMALISED)
    for layout in (False, True):
        got = augment(backend, images, params, size=(40, 40), dtype=dtype, channels_last=layout, **NORMALISED)
        assert torch.equal(got, wide.to(dtype))


@pytest.mark.parametrize("backend", KERNELS)
def test_kernel_in_pil_semantics_is_the_reference(backend: str) -> None:
    """To a grey level before the colours, which is several after them in a few pixels."""
    (images,), params = many()
    for cubic in (False, True):
        options = {"size": (40, 40), "cubic": cubic, "pil": True}
        got = augment(backend, [images], params, **options)
        error = 255 * (got - reference.augment_views([images], params, **options)).abs().flatten(2)
        mean, wrong = error.mean(-1), (error > 3.001).float().mean(-1)
        assert mean.max() <= 0.1 and wrong.max() <= 0.02, (mean.max(), wrong.max())


def chosen(device: str, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> tuple[Any, ...]:
    """Arguments of the operator itself."""
    (images,), params = many()
    size, mean, std = [40, 36], list(IMAGENET_MEAN), list(IMAGENET_STD)
    images, params = images.to(device), params.to(device)
    return [images], params, size, True, 5, 0.5, mean, std, False, dtype, channels_last


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend: str) -> None:
    operator, device = torch.ops.sslfast.augment_views.default, device_of(backend)
    arguments = [chosen(device), chosen(device, torch.bfloat16, True)]
    batch, *rest = arguments[0]
    arguments.append((list(batch[0]), *rest))
    for each in arguments:
        utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(operator, each, test_utils=utilities)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_compile_without_graph_breaks(channels_last: bool, backend: str) -> None:
    (images,), params = many()
    images, params = images.to(device_of(backend)), params.to(device_of(backend))

    def function(images: Tensor, params: Tensor) -> Tensor:
        return augment_views([images], params, size=(40, 40), channels_last=channels_last, **NORMALISED) * 2

    with sslfast.use_backend(backend):
        got = torch.compile(function, backend="aot_eager", fullgraph=True)(images, params)
        expected = function(images, params)
    assert torch.equal(got, expected) and got.stride() == expected.stride()


def test_no_parameters_crash() -> None:
    """Any bits as parameters, as an edit by mistake or a GPU's unchecked table has them: some view, no bad access."""
    code = """
import sys, torch
sys.path[:0] = sys.argv[1].split(':')
from augment_common import noise, row
torch.manual_seed(0)
images = [noise(64, 3, 20, 30)]
good = torch.tensor([[row((1, 2, 17, 19), [3, 0, 2, 1], sigma=1.0)] * 64])
wild = torch.randint(-2**31, 2**31, (16, 16), dtype=torch.int64).to(torch.int32).view(torch.float32)
special = torch.tensor([float('nan'), float('inf'), -float('inf'), 1e30, -1e30, 1e10, -1.0, 1e-45] * 2)
wild = torch.cat([wild, special[:, None].expand(-1, 16)])
for pil in (False, True):
    for column in range(16):
        params = good.clone()
        params[0, :32, column] = wild[:, column]
        for cubic in (False, True):
            rest = cubic, 9, 0.5, [0.0] * 3, [1.0] * 3, pil, torch.float32, False
            views = torch.ops.sslfast.augment_views(images, params, [13, 11], *rest)
            clean = torch.ops.sslfast.augment_views(images, good, [13, 11], *rest)
            assert torch.equal(views[:, 32:], clean[:, 32:]), (pil, column)
"""
    done = subprocess.run([sys.executable, "-c", code, ":".join(sys.path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
