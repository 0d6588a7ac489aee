"""The augmentation transform: what it takes, grouping of views, replaying, workers, wrong input, memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sslfast
from augment_common import BACKENDS, device_of, noise
from sslfast import augment
from sslfast.augment import MultiViewTransform, ViewParams, ViewSpec
from sslfast.ops.augment_views import augment_views

COLOURS = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "grey_p": 0.2, "solarize_p": 0.2}
GLOBAL = ViewSpec(32, scale=(0.4, 1.0), blur_p=0.5, blur_kernel=9, **COLOURS)
LOCAL = ViewSpec(20, scale=(0.05, 0.4), blur_p=0.5, blur_kernel=9, interpolation="bicubic", **COLOURS)
VIEWS = [GLOBAL, LOCAL, GLOBAL, LOCAL, LOCAL]  # sizes alternate: four calls


def spread(images: Any, backend: str) -> Any:
    """Tensors on the backend's device."""
    if isinstance(images, list):
        return [spread(image, backend) for image in images]
    return images.to(device_of(backend)) if isinstance(images, Tensor) else images


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(a, b, strict=True))


# -------------------------------------------------------------------------------------------------------- what it takes


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_kind_of_input_gives_the_same_views(backend: str) -> None:
    """A batch, channels last, lists of tensors, of NumPy arrays and of PIL images, and one image at a time."""
    pil = pytest.importorskip("PIL.Image", reason="PIL is missing")
    batch, ids = noise(4, 3, 40, 50), [7, 3, 2**40, 0]
    arrays = [image.permute(1, 2, 0).contiguous().numpy() for image in batch]
    readonly = arrays[0].copy()
    readonly.setflags(write=False)
    with sslfast.use_backend(backend):
        transform = MultiViewTransform(VIEWS, seed=3)
        views = transform(spread(batch, backend), ids)
        assert [tuple(view.shape) for view in views] == [(4, 3, s, s) for s in (32, 20, 32, 20, 20)]
        assert all(view.dtype == torch.float32 and view.is_contiguous() for view in views)
        assert same(transform(spread(list(batch), backend), ids), views)
        assert same(transform(tuple(spread(list(batch), backend)), torch.tensor(ids)), views)
        last = MultiViewTransform(VIEWS, seed=3, layout="NHWC")
        assert same(last(spread(batch.permute(0, 2, 3, 1), backend), ids), views)
        assert same(last(spread([image.permute(1, 2, 0) for image in batch], backend), ids), views)
        if backend != "cuda":  # NumPy and PIL stay on the CPU
            assert same(transform(np.stack(arrays), ids), views)
            assert same(transform([readonly, *arrays[1:]], ids), views)
            assert same(last([pil.fromarray(array) for array in arrays], ids), views)
            one = transform(pil.fromarray(arrays[2]), ids[2])
            assert same(one, [view[2] for view in views])
            assert same(transform(arrays[2], ids[2:3]), one)
        alone = transform(spread(batch[2], backend), ids[2])
        assert [tuple(view.shape) for view in alone] == [(3, s, s) for s in (32, 20, 32, 20, 20)]
        assert same(alone, [view[2] for view in views])
        for begin, end in [(0, 1), (1, 4)]:  # any split of the batch
            part = transform(spread(batch[begin:end], backend), ids[begin:end])
            assert same(part, [view[begin:end] for view in views])


def test_stacked() -> None:
    """One tensor of what would be a list, from one call and from several."""
    batch, ids = noise(3, 3, 40, 50), [7, 3, 9]
    for views in ([GLOBAL, GLOBAL], [GLOBAL, ViewSpec(32, interpolation="bicubic"), GLOBAL]):
        stacked, apart = MultiViewTransform(views, stacked=True), MultiViewTransform(views)
        assert torch.equal(stacked(batch, ids), torch.stack(apart(batch, ids)))
        assert torch.equal(stacked(batch[1], 3), torch.stack(apart(batch[1], 3)))
    with pytest.raises(ValueError, match="stacked must be False for views of several sizes"):
        MultiViewTransform(VIEWS, stacked=True)(batch, ids)


@pytest.mark.parametrize("backend", BACKENDS)
def test_grey_images(backend: str) -> None:
    pil = pytest.importorskip("PIL.Image", reason="PIL is missing")
    grey = noise(2, 1, 40, 50)
    with sslfast.use_backend(backend):
        transform = MultiViewTransform([GLOBAL])
        (view,) = transform(spread(grey, backend), [1, 2])
        assert view.shape == (2, 1, 32, 32)
        if backend != "cuda":
            images = [pil.fromarray(image[0].numpy()) for image in grey]
            assert images[0].mode == "L" and same(transform(images, [1, 2]), [view])
            assert same(transform(grey[0, 0].numpy(), 1), [view[0]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_and_memory_format(dtype: torch.dtype, backend: str) -> None:
    images = spread(noise(3, 3, 40, 50), backend)
    with sslfast.use_backend(backend):
        plain = MultiViewTransform(VIEWS)(images, range(3))
        views = MultiViewTransform(VIEWS, dtype=dtype, channels_last=True)(images, range(3))
    for view, wide in zip(views, plain, strict=True):
        assert view.dtype == dtype and view.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(view, wide.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_images(backend: str) -> None:
    images = spread([noise(3, 30 + 5 * i, 70 - 9 * i) for i in range(4)], backend)
    with sslfast.use_backend(backend):
        transform = MultiViewTransform(VIEWS)
        views = transform(images, [5, 6, 7, 8], epoch=2)
        for i, image in enumerate(images):
            assert same(transform(image, 5 + i, epoch=2), [view[i] for view in views])


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_other_groups_do_not_matter(backend: str) -> None:
    """Alternating sizes come back in their order, and a view is the same whatever its neighbours are."""
    images = spread(noise(3, 3, 40, 50), backend)
    with sslfast.use_backend(backend):
        views = MultiViewTransform(VIEWS)(images, range(3))
        alike = MultiViewTransform([GLOBAL] * 5)(images, range(3))
        for i in (0, 2):
            assert torch.equal(views[i], alike[i])
        assert not torch.equal(views[0], views[2]) and not torch.equal(views[3], views[4])
        changed = [GLOBAL, LOCAL, ViewSpec(32, scale=None, mean=0.5), LOCAL, LOCAL]
        others = MultiViewTransform(changed)(images, range(3))
        assert same([others[i] for i in (0, 1, 3, 4)], [views[i] for i in (0, 1, 3, 4)])
        assert not torch.equal(others[2], views[2])


def test_every_field_of_a_group_is_its_own() -> None:
    """Two views that differ in one field that is not drawn: each gets its own value."""
    images = noise(2, 3, 40, 40)
    base: dict[str, Any] = dict(size=24, blur_p=1, blur_kernel=5, solarize_p=1, sigma=(2.0, 2.0), brightness=0.4)
    for field in (
        {"interpolation": "bicubic"},
        {"blur_kernel": 11},
        {"solarize_threshold": 0.25},
        {"mean": 0.3},
        {"std": (0.2, 0.3, 0.4)},
        {"semantics": "pil"},
        {"size": (24, 25)},
    ):
        a, b = ViewSpec(**base), ViewSpec(**{**base, **field})
        with sslfast.use_backend("reference"):
            pair = MultiViewTransform([a, b])(images, [0, 1])
            assert torch.equal(pair[0], MultiViewTransform([a, a])(images, [0, 1])[0])
            assert torch.equal(pair[1], MultiViewTransform([b, b])(images, [0, 1])[1])
            assert pair[0].shape != pair[1].shape or not torch.equal(
                pair[1], MultiViewTransform([a, a])(images, [0, 1])[1]
            )


# ------------------------------------------------------------------------------------------------------------ replaying


@pytest.mark.parametrize("backend", BACKENDS)
def test_replay_and_edit(backend: str, tmp_path: Path) -> None:
    images = spread(noise(6, 3, 40, 50), backend)
    with sslfast.use_backend(backend):
        transform = MultiViewTransform(VIEWS, seed=1)
        params = transform.sample_params(images, range(6), epoch=4)
        views = transform(images, range(6), epoch=4)
        assert params.table.shape == (5, 6, 16) and params.table.device == images.device
        assert same(transform.apply(images, params), views) and same(transform.apply(images, params), views)
        torch.save(params.table, tmp_path / "params.pt")
        assert same(transform.apply(images, ViewParams(torch.load(tmp_path / "params.pt"))), views)
        assert same(augment.apply(images, params[1], VIEWS[1]), views[1:2])
        assert same(augment.apply(images, params[-1], VIEWS[-1]), views[-1:])
        assert same(augment.apply(images, params[1:4], VIEWS[1:4]), views[1:4])
        assert same(
            augment.apply(images, augment.sample_params(images, VIEWS, range(6), seed=1, epoch=4), VIEWS), views
        )

        sharp = ViewSpec(32, scale=(0.4, 1.0), blur_p=0.0, blur_kernel=9, **COLOURS)
        edited = params.clone()
        assert (edited.sigma[0] > 0).any()
        edited.sigma[0] = 0
        assert (params.sigma[0] > 0).any()  # a copy
        expected = MultiViewTransform([sharp, *VIEWS[1:]], seed=1)(images, range(6), epoch=4)
        assert same(transform.apply(images, edited), expected) and not same(expected, views)
        edited.flip[:] = 1 - edited.flip  # mirrors every view of uniform steps
        edited.grey[:] = 1
        turned = transform.apply(images, edited)
        assert all((view[:, 0] - view[:, 1]).abs().max() < 1e-6 for view in turned)


def test_properties_are_the_columns() -> None:
    params = ViewParams(torch.arange(2 * 3 * 16, dtype=torch.float32).reshape(2, 3, 16))
    names = ["flip", "brightness", "contrast", "saturation", "hue", None, None, None, None, "grey", "sigma", "solarize"]
    for column, name in enumerate(names, start=4):
        assert name is None or torch.equal(getattr(params, name), params.table[..., column])
    assert torch.equal(params.box, params.table[..., :4]) and torch.equal(params.order, params.table[..., 9:13])
    assert len(params) == 2 and torch.equal(params.to("cpu").table, params.table)
    for bad in (torch.zeros(3, 16), torch.zeros(1, 3, 15), torch.zeros(1, 3, 16, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"table must be \[views, images, 16\] of float32, got"):
            ViewParams(bad)


def test_without_ids_torchs_generator_rules() -> None:
    images = noise(3, 3, 40, 50)
    with sslfast.use_backend("reference"):
        transform = MultiViewTransform([GLOBAL])
        torch.manual_seed(11)
        first, second = transform(images), transform(images)
        torch.manual_seed(11)
        assert same(transform(images), first) and same(transform(images), second)
        assert not same(first, second)


# ---------------------------------------------------------------------------------------------------------- wrong input

IMAGES = torch.zeros(2, 3, 16, 16)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, r"images must hold at least one image"),
        (torch.zeros(0, 3, 8, 8), ValueError, r"images must hold at least one image.*\(0, 3, 8, 8\)"),
        (torch.zeros(2, 4, 8, 8), ValueError, r"images must have 1 or 3 channels, got 4"),
        (torch.zeros(2, 8, 8, 3), ValueError, r"images must have 1 or 3 channels, got 8"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.float64), TypeError, r"images must be uint8, float32.*got torch.float64"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), TypeError, r"images must be uint8, float32.*got torch.int64"),
        (torch.zeros(2, 3, 0, 8), ValueError, r"images must have at least one pixel"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 0)], ValueError, r"images.* one pixel"),
        (torch.zeros(8, 8), ValueError, r"images must be \[C, H, W\] or a batch.*\(8, 8\)"),
        (torch.zeros(2, 3, 8, 8, requires_grad=True), ValueError, r"images requires a gradient.*detach"),
        ([torch.zeros(3, 8, 8), torch.zeros(2, 3, 8, 8)], ValueError, r"images must be one batch, or a list"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 8).half()], ValueError, r"images must agree.*images\[1\] .*float16"),
        ([torch.zeros(3, 8, 8), torch.zeros(1, 8, 8)], ValueError, r"images must agree.*1 channels"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 8, device="meta")], ValueError, r"images must agree.*meta"),
        ("photo.jpg", TypeError, r"images must be tensors, NumPy arrays or PIL images, got str"),
        ([np.zeros((8, 8, 3)), "photo.jpg"], TypeError, r"images must be tensors.*got str"),
        (np.zeros((8, 8, 3)), TypeError, r"images must be uint8.*got torch.float64"),
    ],
)
def test_wrong_images(images, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), sslfast.use_backend("reference"):
        MultiViewTransform([ViewSpec(8, blur_p=0.5, blur_kernel=3)])(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, r"size must be a positive whole number.*got 0"),
        ({"size": (8, 8, 8)}, r"size must be"),
        ({"size": 2.5}, r"size must be"),
        ({"scale": (0.0, 1.0)}, r"scale must begin above 0"),
        ({"scale": (0.5, 1.5)}, r"scale must be \(low, high\) with"),
        ({"scale": (0.9, 0.1)}, r"scale must be"),
        ({"ratio": (0.0, 1.0)}, r"ratio must lie between"),
        ({"ratio": (1.0, float("nan"))}, r"ratio must be"),
        ({"interpolation": "nearest"}, r"interpolation must be one of bilinear, bicubic, got 'nearest'"),
        ({"flip_p": 1.5}, r"flip_p must be between 0 and 1.*1\.5"),
        ({"blur_p": -0.1}, r"blur_p must be between 0 and 1"),
        ({"grey_p": float("nan")}, r"grey_p must be between 0 and 1"),
        ({"brightness": -0.1}, r"brightness must be between 0 and"),
        ({"contrast": (1.2, 0.8)}, r"contrast must be \(low, high\)"),
        ({"saturation": (-1.0, 1.0)}, r"saturation must be"),
        ({"hue": 0.6}, r"hue must be between 0 and 0\.5"),
        ({"hue": (-0.6, 0.1)}, r"hue must be \(low, high\) with -0\.5"),
        ({"blur_kernel": 4}, r"blur_kernel must be an odd whole number from 1 to 255, got 4"),
        ({"blur_kernel": 257}, r"blur_kernel must be an odd"),
        ({"size": 8, "blur_p": 0.5, "blur_kernel": 23}, r"blur_kernel must be below.*23 is too wide for size 8"),
        ({"sigma": (0.0, 1.0)}, r"sigma must begin above 0"),
        ({"sigma": (1.0, 100.0)}, r"sigma must be"),
        ({"solarize_threshold": 1.1}, r"solarize_threshold must be between 0 and 1"),
        ({"mean": (0.5, 0.5)}, r"mean must be one number or one a channel"),
        ({"std": 0.0}, r"std must be finite and not 0"),
        ({"mean": float("inf")}, r"mean must be finite"),
        ({"semantics": "kornia"}, r"semantics must be one of torchvision, pil, got 'kornia'"),
    ],
)
def test_wrong_spec(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViewSpec(**options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t, p: MultiViewTransform([]), TypeError, r"views must be a ViewSpec or a sequence"),
        (lambda t, p: MultiViewTransform(["simclr"]), TypeError, r"views must be"),
        (lambda t, p: t(IMAGES, [1]), ValueError, r"ids must be as many as the images, 2, got 1"),
        (lambda t, p: t(IMAGES, [1, 2], epoch=-1), ValueError, r"epoch must be a whole number"),
        (lambda t, p: t.apply(IMAGES, p[0:0]), ValueError, r"params must describe 1 views, got 0"),
        (lambda t, p: t.apply(IMAGES[:1], p), ValueError, r"params must be \[views, 1, 16\]"),
        (lambda t, p: t.apply(IMAGES[..., :8, :8], outside(p)), ValueError, r"params: the crop .*of view 0 of image 1"),
        (lambda t, p: t.apply(IMAGES, outside(p, -1)), ValueError, r"params: the crop .*must lie in its 16 × 16"),
        (lambda t, p: t.apply(IMAGES, outside(p, float("nan"))), ValueError, r"params: the crop"),
        (
            lambda t, p: MultiViewTransform([GLOBAL], layout="HWC")(IMAGES),
            ValueError,
            r"layout must be one of NCHW, NHWC",
        ),
        (lambda t, p: MultiViewTransform([GLOBAL], dtype=torch.float64)(IMAGES), TypeError, r"dtype must be float32"),
        (lambda t, p: augment_views([IMAGES], p.table, size=(0, 8)), ValueError, r"size must be"),
        (
            lambda t, p: augment_views([IMAGES], p.table, size=(8, 8), blur_kernel=4),
            ValueError,
            r"blur_kernel must",
        ),
        (
            lambda t, p: augment_views([IMAGES], p.table, size=(8, 8), mean=[0.0]),
            ValueError,
            r"mean and std must have",
        ),
    ],
)
def test_wrong_calls(call: Any, error: type[Exception], message: str) -> None:
    with sslfast.use_backend("reference"):
        transform = MultiViewTransform([ViewSpec(8)])
        params = transform.sample_params(IMAGES, [1, 2])
        with pytest.raises(error, match=message):
            call(transform, params)


def outside(params: ViewParams, top: float = 5.0) -> ViewParams:
    params = params.clone()
    params.box[0] = torch.tensor([[0.0, 0.0, 4.0, 4.0], [top, 0.0, 4.0, 4.0]])
    return params


# --------------------------------------------------------------------------------------------------------------- memory


def test_extra_memory_is_the_views_and_a_little_for_each_thread() -> None:
    """Peak resident memory of one call: what it returns and at most 16 MiB a thread."""
    code = """
import ctypes, pathlib, torch, sslfast
from sslfast.augment import IMAGENET_MEAN, IMAGENET_STD, MultiViewTransform, ViewSpec

def status(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])
view = ViewSpec(224, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, jitter_p=0.8, grey_p=0.2, blur_p=1.0,
                solarize_p=0.2, mean=IMAGENET_MEAN, std=IMAGENET_STD)
transform = MultiViewTransform([view, view])
def call(images):
    start = status("VmRSS:")
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    views = transform(images, range(len(images)))
    return (status("VmHWM:") - start) / 1024, sum(view.nbytes for view in views) / 2**20
images = torch.randint(256, (48, 3, 256, 256), dtype=torch.uint8)
call(images[:2])
ctypes.CDLL(None).malloc_trim(0)
print(*call(images), torch.get_num_threads())
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads the peak resident set from /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    extra, returned, threads = (float(number) for number in done.stdout.split())
    assert returned > 50 and extra <= returned + 16 * threads, f"{extra} MiB for {returned} MiB of views"
