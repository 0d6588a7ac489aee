"""Augmentation on a GPU against the C++ kernel on the CPU: the same parameters bit for bit, the same views, no wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import sslfast
from sslfast.augment import ViewParams, ViewSpec, apply, sample_params
from sslfast.ops.augment_views import augment_views
from sslfast.ops.view_params import COLUMNS, view_params

pytestmark = pytest.mark.gpu

SEMANTICS = ["torchvision", "pil"]
SIGMA, ORDER = COLUMNS.index("sigma"), slice(COLUMNS.index("order0"), COLUMNS.index("order3") + 1)
# The last place of what is written, for values below 2, on top of the tolerance of float32.
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def everything(size: int | tuple[int, int], **changes: Any) -> ViewSpec:
    """A view in which every operation happens to some images and not to others."""
    options = dict(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, jitter_p=0.8, grey_p=0.2)
    options |= dict(blur_p=0.5, blur_kernel=9, solarize_p=0.3)
    return ViewSpec(size, **{**options, **changes})  # type: ignore[arg-type]


def photographs(count: int, channels: int, height: int, width: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Smooth images with some noise, [B, C, H, W]."""
    coarse = torch.rand(count, channels, 5, 5)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    x = (smooth + 0.1 * torch.randn(smooth.shape)).clamp(0, 1)
    return (255 * x).round().to(torch.uint8) if dtype == torch.uint8 else x.to(dtype)


def drawn(images: Sequence[Tensor], spec: ViewSpec, views: int = 2) -> Tensor:
    """[V, B, 16] on the CPU, drawn there."""
    batch = images[0] if images[0].dim() == 4 else list(images)
    return sample_params(batch, [spec] * views, ids=torch.arange(len(batch)), seed=5).table


def views_by(backend: str, images: Sequence[Tensor], params: Tensor, spec: ViewSpec, **options: Any) -> Tensor:
    """[V, B, C, h, w] on the images' device; ``options``: those that are not of the spec."""
    channels = images[0].shape[-3]
    with sslfast.use_backend(backend):
        return augment_views(
            images,
            params.to(images[0].device),
            size=spec.height_width,
            cubic=spec.interpolation == "bicubic",
            blur_kernel=spec.blur_kernel,
            threshold=spec.solarize_threshold,
            mean=spec.channels("mean", channels),
            std=spec.channels("std", channels),
            pil=spec.semantics == "pil",
            **options,
        )


def assert_same(actual: Tensor, expected: Tensor, spec: ViewSpec) -> None:
    """Torchvision's semantics: to 1e-5. PIL's: to one grey level, but for the few pixels where a number fell on the
    other side of a rounding and a later operation made more of it.
    """
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    std = torch.tensor(spec.channels("std", actual.shape[2]), dtype=torch.float64)[:, None, None]
    difference = (actual.cpu().double() - expected.double()).abs() * std
    rounding = ROUNDING[actual.dtype]
    if spec.semantics == "pil":
        assert (difference <= 1.001 / 255 + rounding).double().mean() >= 0.998
        assert difference.mean() <= 1e-4 + rounding
    else:
        assert (difference <= 1e-5 + rounding).all(), f"largest difference {difference.max():.2e}"


def compare(images: Sequence[Tensor], spec: ViewSpec, params: Tensor | None = None, **options: Any) -> Tensor:
    """Views on the GPU, found to be those of the CPU."""
    params = drawn(images, spec) if params is None else params
    views = views_by("cuda", [image.cuda() for image in images], params, spec, **options)
    assert_same(views, views_by("cpu", images, params, spec, **options), spec)
    return views


@pytest.mark.parametrize("ragged", [False, True])
def test_parameters_are_the_same_bits(ragged: bool) -> None:
    ids = torch.randint(-(2**63), 2**63 - 1, (300,))
    size = torch.randint(1, 700, (300, 2)) if ragged else (375, 500)
    specs = [everything(32), ViewSpec(32, scale=None), ViewSpec(32, ratio=(1e-3, 1e3), shuffle=False, contrast=0.4)]
    numbers = [spec.numbers() for spec in specs * 7]  # more views than one launch takes
    table = {}
    for backend in ("cpu", "cuda"):
        with sslfast.use_backend(backend):
            on = [t.to(backend) if isinstance(t, Tensor) else t for t in (ids, size)]
            table[backend] = view_params(*on, numbers, seed=-3, epoch=2**32 - 1, view=11)
    assert table["cuda"].is_cuda and torch.equal(table["cuda"].cpu(), table["cpu"])


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_sources(channels: int, dtype: torch.dtype, semantics: str) -> None:
    compare([photographs(6, channels, 70, 91, dtype)], everything((40, 67), semantics=semantics))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "NHWC": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "sliced": lambda x: x.repeat_interleave(2, 0).repeat_interleave(3, 2).repeat_interleave(2, 3)[::2, :, ::3, ::2],
    "offset": lambda x: torch.nn.functional.pad(x, (3, 0, 1, 2))[..., 1:-2, 3:],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str, semantics: str) -> None:
    x = photographs(5, 3, 60, 83)
    spec = everything(48, semantics=semantics)
    params = drawn([x], spec)
    strided = LAYOUTS[layout](x.cuda())
    assert not strided.is_contiguous()
    plain = views_by("cuda", [x.cuda()], params, spec)
    assert torch.equal(views_by("cuda", [strided], params, spec), plain)


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_results(dtype: torch.dtype, channels_last: bool, semantics: str) -> None:
    spec = everything((33, 50), mean=(0.4, 0.5, 0.6), std=(0.5, 0.6, 0.7), semantics=semantics)
    views = compare([photographs(6, 3, 64, 64)], spec, dtype=dtype, channels_last=channels_last)
    assert views.dtype == dtype
    stride = (33 * 50 * 3, 1, 50 * 3, 3) if channels_last else (33 * 50 * 3, 33 * 50, 50, 1)
    assert views[0].stride() == stride


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("count", [1, 7, 205])
def test_ragged_list(count: int, semantics: str) -> None:
    """205 images: more than one launch takes into the table."""
    images = [photographs(1, 3, 17 + i % 9, 40 - i % 13)[0] for i in range(count)]
    compare(images, everything(24, semantics=semantics))


CASES = {
    "enlarged": ((9, 7), dict(size=(65, 33), scale=None, blur_kernel=3)),
    "shrunk": ((300, 260), dict(size=(32, 20), scale=None)),
    "shrunk, many bands of rows": ((700, 1500), dict(size=(8, 11), scale=None, blur_kernel=3)),
    "bicubic": ((90, 120), dict(size=64, interpolation="bicubic")),
    "bicubic, many bands": ((700, 900), dict(size=(9, 8), interpolation="bicubic", scale=None, blur_kernel=3)),
    "one pixel": ((1, 1), dict(size=(5, 3), scale=None, blur_kernel=3)),
    "to one pixel": ((40, 50), dict(size=1, blur_kernel=1)),
    "another threshold": ((50, 50), dict(size=40, solarize_threshold=0.2, solarize_p=1.0)),
    "wide blur": ((150, 170), dict(size=(140, 150), blur_kernel=255, sigma=(20.0, 40.0), blur_p=1.0)),
    "blur by boxes of radius 0 and 1": ((90, 80), dict(size=(70, 67), sigma=(1.0, 2.4), blur_p=1.0)),
    "several groups": ((120, 120), dict(size=(512, 640), blur_kernel=23)),
}


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("case", CASES)
def test_shapes(case: str, semantics: str) -> None:
    size, options = CASES[case]
    compare([photographs(6, 3, *size)], everything(**options, semantics=semantics))  # type: ignore[arg-type]


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("blur", [0.0, 1.3])
@pytest.mark.parametrize("order", [(-1, -1, -1, -1), (1, 2, 3, 0), (0, 3, 1, 2), (3, 2, 0, 1), (2, 0, 3, -1)], ids=str)
def test_orders(order: tuple[int, ...], blur: float, semantics: str) -> None:
    """Each way through the kernels: with and without contrast, wherever it stands, with and without blur."""
    x, spec = photographs(4, 3, 60, 60), everything(40, semantics=semantics)
    params = drawn([x], spec)
    params[..., ORDER] = torch.tensor(order, dtype=torch.float32)
    params[..., SIGMA] = blur
    compare([x], spec, params)


def test_same_bits_twice() -> None:
    x, spec = photographs(40, 3, 64, 64).cuda(), everything(96)
    params = drawn([x.cpu()], spec)
    assert torch.equal(*(views_by("cuda", [x], params, spec) for _ in range(2)))


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_parameters_of_any_value_stay_inside_the_images(semantics: str) -> None:
    """compute-sanitizer sees reads that do not; without it, a wrong address is an error of the device."""
    x, spec = photographs(2, 3, 30, 31).cuda(), everything(40, semantics=semantics)
    drawn_here = drawn([x.cpu()], spec)
    for value in (float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 2.0**24, -5.0):
        for column in (*range(len(COLUMNS)), slice(None)):
            params = drawn_here.clone()
            params[..., column] = value
            views_by("cuda", [x], params, spec)
    torch.cuda.synchronize()


@pytest.mark.parametrize("ragged", [False, True])
def test_cuda_graph_with_parameters_edited_between_replays(ragged: bool) -> None:
    spec = everything(32)
    batch = photographs(6, 3, 50, 60).cuda()
    images = [image[:, : 20 + 3 * i].contiguous() for i, image in enumerate(batch)] if ragged else batch
    params = ViewParams(drawn(list(images) if ragged else [batch], spec).cuda())
    apply(images, params, [spec] * 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = apply(images, params, [spec] * 2)
    for edit in range(3):
        params.table[..., SIGMA] = 0.5 * edit
        params.flip.logical_not_()
        params.contrast.fill_(0.4 + edit)
        graph.replay()
        expected = apply(images, params, [spec] * 2)
        assert all(torch.equal(*pair) for pair in zip(captured, expected, strict=True))


@pytest.mark.parametrize("ragged", [False, True])
def test_nothing_waits_for_the_device(ragged: bool) -> None:
    spec = everything(32)
    batch = photographs(6, 3, 50, 60).cuda()
    images = list(batch)
    ids = torch.arange(6, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        given = images if ragged else batch
        apply(given, sample_params(given, spec, ids), spec)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_more_than_2_to_31_elements() -> None:
    count = 2**31 // (3 * 224 * 224) + 30
    if torch.cuda.get_device_properties(0).total_memory < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    x, spec = photographs(1, 3, 64, 64), everything(224, semantics="torchvision")
    params = sample_params(x.expand(count, -1, -1, -1), [spec], ids=torch.arange(count)).table
    views = views_by("cuda", [x.cuda().expand(count, -1, -1, -1)], params, spec, dtype=torch.bfloat16)
    for some in (slice(0, 4), slice(count - 40, count)):
        few = x.expand(len(range(count)[some]), -1, -1, -1)
        expected = views_by("cpu", [few], params[:, some], spec, dtype=torch.bfloat16)
        assert_same(views[:, some], expected, spec)
