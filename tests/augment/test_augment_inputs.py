"""Augmentation at its edges: what users hand in, edited parameters, compiled transforms, images of other kinds."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sslfast
from augment_common import BACKENDS, device_of, noise, row, table
from sslfast import _checks, augment
from sslfast.augment import MultiViewTransform, ViewParams, ViewSpec, recipe
from sslfast.ops.augment_views import augment_views

SPEC = ViewSpec(24, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur_p=0.5, blur_kernel=9, grey_p=0.2)
WHOLE = ViewSpec((32, 32), scale=None, flip_p=0)


def test_parameters_of_views() -> None:
    transform = MultiViewTransform([SPEC] * 3)
    params = transform.sample_params(noise(4, 3, 30, 30), range(4))
    assert [len(one) for one in params] == [1, 1, 1]  # iteration ends
    assert torch.equal(params[-1].table, params.table[2:]) and len(params[1:]) == 2
    with pytest.raises(IndexError):
        params[3]
    assert torch.equal(params.to("cpu").table, params.table) and params.clone() is not params
    images = noise(4, 3, 30, 30)
    assert torch.equal(transform.apply(images, params.table)[1], transform.apply(images, params)[1])
    boxes = params.box
    boxes[0, 0] = torch.tensor([1.0, 2.0, 5.0, 6.0])
    assert params.table[0, 0, :4].tolist() == [1, 2, 5, 6]


@pytest.mark.gpu
def test_parameters_brought_back_are_complete() -> None:
    params = ViewParams(torch.zeros(2, 4096, 16, device="cuda"))
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        busy = busy @ busy
    params.table.fill_(3.0)
    assert (params.to("cpu").table == 3).all()


@pytest.mark.parametrize("ids", [[1.7, 2.2], torch.tensor([1.0, 2.0]), [True, False], [2**63, 1], ["a", "b"], 2.0])
def test_ids_that_are_no_whole_numbers(ids: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="ids must be"):
        MultiViewTransform(SPEC)(noise(2, 3, 30, 30), ids)


def test_ids_of_every_kind_are_the_same() -> None:
    images, transform = noise(2, 3, 30, 30), MultiViewTransform(SPEC)
    expected = transform(images, [3, 2**62])[0]
    for ids in [(3, 2**62), np.array([3, 2**62]), np.array([3, 2**62], dtype=np.uint64), torch.tensor([3, 2**62])]:
        assert torch.equal(transform(images, ids)[0], expected)
    for one in [3, np.int64(3), torch.tensor(3), [3]]:
        assert torch.equal(transform(images[0], one)[0], expected[0])


def test_pil_images_of_other_modes_are_refused() -> None:
    pil = pytest.importorskip("PIL.Image", reason="PIL is missing")
    image = pil.fromarray(noise(30, 30, 3).numpy())
    transform = MultiViewTransform(SPEC)
    for mode in ("P", "CMYK", "RGBA", "HSV", "1"):
        remedy = f"images must be PIL images of mode RGB or L, got '{mode}': image.convert\\('RGB'\\)"
        with pytest.raises(ValueError, match=remedy):
            transform(image.convert("RGB").convert(mode) if mode != "HSV" else image.convert("HSV"), 0)
    for mode in ("F", "I", "I;16"):  # conversion would clip them
        remedy = rf"got '{mode}': np.asarray\(image, dtype=np.float32\) / white"
        with pytest.raises(ValueError, match=remedy):
            transform(image.convert("L").convert(mode), 0)
    assert transform(image.convert("L"), 0)[0].shape == (1, 24, 24)


def test_sixteen_bits_as_the_error_says() -> None:
    pil = pytest.importorskip("PIL.Image", reason="PIL is missing")
    levels = (np.arange(32 * 32, dtype=np.uint16) * 64).reshape(32, 32)
    image = pil.fromarray(levels)
    assert image.mode.startswith("I;16")
    (view,) = MultiViewTransform(WHOLE)(np.asarray(image, dtype=np.float32) / 65535, 0, epoch=0)
    assert torch.equal(view, torch.from_numpy(levels.astype(np.float32) / 65535)[None])
    with pytest.raises(TypeError, match=r"images must be uint8, .* got torch.uint16: divide by the value of white"):
        MultiViewTransform(WHOLE)(levels, 0)


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_memory_mapped_arrays(tmp_path: Path, mode: str) -> None:
    """Which have a mode of their own, as images of PIL have."""
    pictures = noise(3, 30, 40, 3).numpy()
    np.save(tmp_path / "pictures.npy", pictures)
    mapped = np.load(tmp_path / "pictures.npy", mmap_mode=mode)  # type: ignore[call-overload]
    transform = MultiViewTransform(SPEC)
    assert isinstance(mapped[1], np.memmap) and mapped[1].mode == mode
    assert torch.equal(transform(mapped[1], 1, epoch=0)[0], transform(pictures[1], 1, epoch=0)[0])
    assert torch.equal(transform(mapped, range(3), epoch=0)[0], transform(pictures, range(3), epoch=0)[0])


def test_arrays_of_a_class_with_a_mode() -> None:
    class Frame(np.ndarray):
        mode = "BGR"

    pictures = noise(30, 40, 3).numpy()
    transform = MultiViewTransform(SPEC)
    assert torch.equal(transform(pictures.view(Frame), 1, epoch=0)[0], transform(pictures, 1, epoch=0)[0])


def test_channels_in_the_wrong_place_are_told_in_the_callers_shape() -> None:
    transform = MultiViewTransform(SPEC)
    first = np.zeros((3, 32, 40), dtype=np.uint8)
    message = r"got 40 in shape \(3, 32, 40\) read as NHWC: arrays are read channels last .* torch.from_numpy"
    with pytest.raises(ValueError, match=message):
        transform(first, 0)
    with pytest.raises(ValueError, match=r"got 40 in shape \(2, 3, 32, 40\) read as NHWC: arrays"):
        transform(np.stack([first, first]), [0, 1])
    with pytest.raises(ValueError, match=r"got 32 in shape \(32, 40, 3\) read as NCHW: layout='NHWC' reads"):
        transform(noise(32, 40, 3), 0)
    with pytest.raises(ValueError, match=r"got 40 in shape \(3, 32, 40\) read as NHWC: layout='NCHW' reads"):
        MultiViewTransform(SPEC, layout="NHWC")(noise(3, 32, 40), 0)
    assert transform(torch.from_numpy(first), 0)[0].shape == (3, 24, 24)  # as it says


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_floats_on_the_scale_of_bytes_are_warned_of_once(dtype: torch.dtype) -> None:
    transform, images = MultiViewTransform(SPEC), noise(4, 3, 50, 60)
    _checks._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        transform(images, range(4), epoch=0)
        transform(images.to(dtype) / 255, range(4), epoch=0)
        transform((images.float() / 255 - 0.45) / 0.22, range(4), epoch=0)  # normalised: another mistake
    assert caught == []
    with pytest.warns(UserWarning, match="images seem to be on the scale 0 … 255") as told:
        transform(images.to(dtype), range(4), epoch=0)
        transform(list(images.to(dtype)), range(4), epoch=0)
    assert [warning.filename for warning in told] == [__file__]
    _checks._warned.clear()
    with pytest.warns(UserWarning, match="0 … 255"):
        augment.sample_params(images[0].float().permute(1, 2, 0).numpy(), SPEC, 0, epoch=0)


def test_ids_without_an_epoch_are_warned_of_once() -> None:
    transform, images = MultiViewTransform(SPEC), noise(2, 3, 30, 30)
    _checks._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        transform(images)
        transform(images, [0, 1], epoch=0)
    assert caught == []
    with pytest.warns(UserWarning, match="ids were given and no epoch: every epoch then repeats") as told:
        same = transform(images, [0, 1])
        augment.sample_params(images, SPEC, [0, 1])
    assert len(told) == 1 and told[0].filename == __file__
    assert torch.equal(same[0], transform(images, [0, 1], epoch=0)[0])


NUMPY = {
    "size": (dict(size=np.int64(24)), dict(size=24)),
    "sides": (dict(size=np.array([24, 20])), dict(size=(24, 20))),
    "scale": (dict(scale=np.array([0.25, 1.0])), dict(scale=(0.25, 1.0))),
    "ratio": (dict(ratio=[np.float32(0.75), np.float32(1.5)]), dict(ratio=(0.75, 1.5))),
    "strengths": (dict(brightness=np.float32(0.5), hue=np.float64(0.25)), dict(brightness=0.5, hue=0.25)),
    "factors": (dict(contrast=np.array([0.5, 1.5])), dict(contrast=(0.5, 1.5))),
    "probabilities": (dict(flip_p=np.float32(0.5), blur_p=np.int64(1)), dict(flip_p=0.5, blur_p=1.0)),
    "blur": (dict(blur_kernel=np.int32(9), sigma=np.array([0.5, 1.5])), dict(blur_kernel=9, sigma=(0.5, 1.5))),
    "threshold": (dict(solarize_threshold=np.float32(0.25)), dict(solarize_threshold=0.25)),
    "mean": (dict(mean=np.float32(0.5), std=np.float64(0.25)), dict(mean=0.5, std=0.25)),
    "means": (dict(mean=np.array([0.5, 0.25, 0.125])), dict(mean=(0.5, 0.25, 0.125))),
    "tensor": (dict(std=torch.tensor([0.5, 0.25, 0.125])), dict(std=(0.5, 0.25, 0.125))),
}


@pytest.mark.parametrize("name", NUMPY)
def test_numbers_of_numpy(name: str) -> None:
    given, expected = (ViewSpec(**{"size": 24, "blur_kernel": 9, **options}) for options in NUMPY[name])
    assert given == expected and hash(given) == hash(expected) and repr(given) == repr(expected)
    images = noise(2, 3, 30, 30)
    views = [
        MultiViewTransform(spec, seed=seed)(images, [0, 1], epoch=epoch)[0]
        for spec, seed, epoch in ((given, np.uint64(2**64 - 1), np.int64(2)), (expected, 2**64 - 1, 2))
    ]
    assert torch.equal(*views)
    assert recipe("simclr", np.int64(32)) == recipe("simclr", 32)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(size=24.0), "size must be"),
        (dict(size=True), "size must be"),
        (dict(size="24"), "size must be"),
        (dict(size=(24, 20, 3)), "size must be"),
        (dict(flip_p="0.5"), "flip_p must be a number, got '0.5'"),
        (dict(flip_p=True), "flip_p must be a number, got True"),
        (dict(mean="0.5"), "mean must be a number"),
        (dict(mean=(0.5, None, 0.5)), "mean must be a number, got None"),
        (dict(blur_kernel=9.0), "blur_kernel must be an odd whole number"),
        (dict(hue=np.float32(0.75)), "hue must be between"),
    ],
)
def test_what_is_no_number(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        ViewSpec(**options)


def test_arrays_with_steps_backwards() -> None:
    """As a picture read as BGR and turned to RGB is."""
    array, transform = noise(30, 40, 3).numpy(), MultiViewTransform(SPEC)
    assert torch.equal(transform(array[..., ::-1], 1)[0], transform(array[..., ::-1].copy(), 1)[0])


EDITS = {
    "hue": ("hue", 1.3, "hue must be from -0.5 to 0.5"),
    "factor": ("brightness", -0.1, "brightness must be from 0.0"),
    "NaN": ("contrast", float("nan"), "contrast must be from 0.0"),
    "order": ("order2", 0.5, "order must hold 0, 1, 2, 3 at most once each"),
    "beyond": ("order2", 7.0, "order must hold"),
    "twice": ("order2", 1.0, "order must hold"),
    "sigma": ("sigma", float("inf"), "sigma must be 0 or positive and finite"),
    "below": ("sigma", -1.0, "sigma must be 0 or positive and finite"),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_that_make_no_sense(name: str) -> None:
    column, value, message = EDITS[name]
    params = table([row((0, 0, 30, 30), [0, 1, 2, 3], brightness=1, contrast=1, saturation=1, hue=0)])
    params[0, 0, augment.ViewParams.COLUMNS.index(column)] = value
    with pytest.raises(ValueError, match=message):
        augment_views([noise(1, 3, 30, 30)], params, size=(8, 8), blur_kernel=3)


WRONG = {
    "seed": (dict(seed=2**70), ValueError, "seed must be"),
    "dtype": (dict(dtype=torch.float64), TypeError, "dtype must be float32, bfloat16 or float16"),
    "layout": (dict(layout="HWC"), ValueError, "layout must be one of NCHW, NHWC"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_told_when_the_transform_is_made(name: str) -> None:
    options, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        MultiViewTransform(SPEC, **options)


def test_images_are_checked_before_sampling() -> None:
    with pytest.raises(ValueError, match="images must have 1 or 3 channels, got 40"):
        augment.sample_params(noise(2, 40, 50, 3), SPEC)
    with pytest.raises(ValueError, match="images must have at least one pixel"):
        augment.sample_params(torch.zeros(2, 3, 0, 8), SPEC)
    with pytest.raises(ValueError, match="mean must be one number or one a channel.*dataclasses.replace"):
        MultiViewTransform(recipe("dino"))(noise(2, 1, 50, 50))
    with pytest.raises(ValueError, match="brightness must be between 0 and"):
        ViewSpec(brightness=float("inf"))
    assert hash(ViewSpec(size=[8, 9], blur_p=0, mean=[0.5])) == hash(ViewSpec(size=(8, 9), blur_p=0, mean=(0.5,)))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_pil_semantics_is_black(backend: str) -> None:
    image = torch.rand(1, 3, 20, 20)
    image[0, 1, 5, 5] = float("nan")
    expected = image.nan_to_num(0)
    params = table([row((0, 0, 20, 20), [0, 3], brightness=1.1, hue=0.1, sigma=1)])
    with sslfast.use_backend(backend):
        got, clean = (
            augment_views([x.to(device_of(backend))], params.to(device_of(backend)), size=(16, 16), pil=True)
            for x in (image, expected)
        )
    assert torch.equal(got, clean) and got.isfinite().all()


def test_made_in_place_or_not() -> None:
    """float32 planes of whole vectors are made where they stand in the result; channels last they cannot be."""
    images = noise(3, 3, 60, 60)
    spec = replace(SPEC, size=(32, 48), blur_p=0.0)
    for semantics in ("torchvision", "pil"):
        views = [replace(spec, semantics=semantics, solarize_p=0.5)] * 2
        plain = MultiViewTransform(views)(images, range(3))
        last = MultiViewTransform(views, channels_last=True)(images, range(3))
        assert all(torch.equal(a, b) for a, b in zip(plain, last, strict=True))


def test_compiled() -> None:
    images, ids = noise(3, 3, 40, 40), torch.arange(3)
    transform = MultiViewTransform([SPEC, replace(SPEC, size=17)])

    def step(images: torch.Tensor, ids: torch.Tensor) -> list[torch.Tensor]:
        return [2 * view for view in transform(images, ids, epoch=1)]

    compiled = torch.compile(step, fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(images, ids), step(images, ids), strict=True))


def test_many_large_pictures_to_few_pixels() -> None:
    """Threads share the work by what is read, too; the result does not show it."""
    images, params = noise(2, 3, 700, 900), table([row((0, 0, 700, 900))] * 2)
    with sslfast.use_backend("reference"):
        expected = augment_views([images], params, size=(5, 5))
    torch.testing.assert_close(augment_views([images], params, size=(5, 5)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])  # on a GPU σ is not read back
def test_a_blur_wider_than_the_view_is_an_error(backend: str) -> None:
    """σ edited in where the spec has no blur, so that the width of its kernel was never checked."""
    images = noise(1, 3, 16, 16)
    with sslfast.use_backend(backend):
        transform = MultiViewTransform([ViewSpec(8)])  # 23 taps
        params = transform.sample_params(images, [0])
        params.sigma[:] = 0.5
        with pytest.raises(ValueError, match="blur_kernel"):
            transform.apply(images, params)
