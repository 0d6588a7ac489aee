"""Semantics of augmentation: the reference and the kernels against torchvision's and PIL's own operations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from torch import Tensor

from augment_common import (
    BACKENDS,
    OPERATIONS,
    augment,
    noise,
    photographs,
    pil_view,
    random_rows,
    row,
    table,
    torchvision_view,
)
from sslfast.augment import IMAGENET_MEAN, IMAGENET_STD, ViewSpec

BOX = (10, 20, 300, 400)  # of photographs of 427 × 640
NORMALISED = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cubic", [False, True], ids=["bilinear", "bicubic"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_is_torchvisions(name: str, cubic: bool, backend: str) -> None:
    """On photographs and noise, colour and grey, shrunk, enlarged and cut out; 1e-5 is 1/400 of a grey level."""
    images = [*photographs(), noise(3, 427, 640)]
    for box, size in [(BOX, (96, 80)), ((3, 5, 61, 32), (80, 97)), ((7, 0, 64, 64), (64, 64))]:
        values, options = row(box, **OPERATIONS[name]), {"size": size, "cubic": cubic}
        for image, channels in itertools.product(images, (3, 1)):
            image = image[:channels]
            normalised = {key: value[:channels] for key, value in NORMALISED.items()}
            got = augment(backend, [image[None]], table([values]), **options, **normalised)[0, 0]
            expected = torchvision_view(image.float() / 255, values, {**options, **normalised})
            error = (got - expected).abs() * 0.225  # in units of the image
            largest = 1e-4 if name == "saturated" else 1e-5  # three factors near 2 multiply what is rounded before them
            assert error.max() <= largest and error.mean() <= 1e-6, (box, channels, error.max(), error.mean())


def whole_views(
    backend: str, jitter: tuple[float, float, float, float], **options: bool
) -> Iterator[tuple[Tensor, list[float], Tensor]]:
    """40 views of each photograph by a recipe with every step: (image, parameters, view)."""
    strengths = dict(zip(("brightness", "contrast", "saturation", "hue"), jitter, strict=True))
    spec = ViewSpec(64, **strengths, jitter_p=0.8, grey_p=0.2, blur_p=0.5, solarize_p=0.2)
    for image in photographs():
        params = random_rows(spec, 40, (427, 640))
        got = augment(backend, [image.expand(40, -1, -1, -1)], params, size=(64, 64), **options)[0]
        for view, values in zip(got, params[0].tolist(), strict=True):
            yield image, values, view


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_recipes_are_torchvisions(backend: str) -> None:
    for image, values, view in whole_views(backend, (0.8, 0.8, 0.8, 0.2)):
        expected = torchvision_view(image.float() / 255, values, {"size": (64, 64)})
        assert (view - expected).abs().max() <= 1e-5, values


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cubic", [False, True], ids=["bilinear", "bicubic"])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "saturated"])
def test_pil_semantics_are_pils(name: str, cubic: bool, backend: str) -> None:
    """The kernels after a resizing too. The reference resizes in floating point, so after it a level may be another,
    and a step through HSV several levels off in a few pixels: its hue is a byte too.
    """
    values, options = row((7, 0, 96, 64), **OPERATIONS[name]), {"size": (96, 64), "cubic": cubic}
    resized = row(BOX, **OPERATIONS[name])
    for image, channels in itertools.product(photographs(), (3, 1)):
        plain = {"mean": [0.0] * channels, "std": [1.0] * channels}
        image = image[:channels]
        error = [
            255 * (augment(backend, [image], table([r]), pil=True, **options, **plain)[0, 0] - theirs).abs()
            for r, theirs in ((r, pil_view(image, r, options)) for r in (values, resized))
        ]
        assert error[0].max() <= 1.001 and error[0].mean() <= 0.05, (channels, error[0].max(), error[0].mean())
        allowed = 1e-3 if backend == "reference" else 0
        share = (error[1] > 3.001).float().mean()
        assert error[1].mean() <= 0.05 and share <= allowed, (channels, error[1].max(), error[1].mean(), share)
        if backend != "reference":
            assert all((e > 0.5).float().mean() <= 1e-3 for e in error), (channels, values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_recipes_in_pil_semantics_are_pils(backend: str) -> None:
    """At BYOL's strengths; the reference's one level before the colours is several after them, in a few pixels."""
    for image, values, view in whole_views(backend, (0.4, 0.4, 0.2, 0.1), cubic=True, pil=True):
        error = 255 * (view - pil_view(image, values, {"size": (64, 64), "cubic": True})).abs()
        share = (error > 3.001).float().mean()
        allowed = 5e-3 if backend == "reference" else 0
        assert error.mean() <= 0.1 and share <= allowed, (values, error.max(), error.mean(), share)
