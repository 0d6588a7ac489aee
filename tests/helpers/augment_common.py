"""What the tests of augmentation share: photographs, rows of parameters, torchvision's and PIL's views."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sslfast
from benchmarks import Unavailable, peers
from sslfast import reference
from sslfast.augment import ViewSpec
from sslfast.ops.augment_views import augment_views
from sslfast.ops.view_params import COLUMNS, view_params

BACKENDS = ["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KERNELS = BACKENDS[1:]
OFF = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, **{f"order{i}": -1.0 for i in range(4)}}
JITTER = ("brightness", "contrast", "saturation", "hue")


ALL_FOUR = {"brightness": 1.4, "contrast": 0.7, "saturation": 1.5, "hue": 0.1}
OPERATIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "flip": {"flip": 1},
    "darker": {"order": [0], "brightness": 0.3},
    "brighter": {"order": [0], "brightness": 1.7},
    "less contrast": {"order": [1], "contrast": 0.2},
    "more contrast": {"order": [1], "contrast": 1.8},
    "less saturation": {"order": [2], "saturation": 0.2},
    "more saturation": {"order": [2], "saturation": 1.8},
    "hue up": {"order": [3], "hue": 0.13},
    "hue down": {"order": [3], "hue": -0.37},
    "grey": {"grey": 1},
    "faint blur": {"sigma": 0.3},
    "blur": {"sigma": 1.3},
    "strong blur": {"sigma": 5.0},
    "solarize": {"solarize": 1},
    "all": {"order": [3, 0, 2, 1], **ALL_FOUR, "flip": 1, "sigma": 1.1, "solarize": 1},
    "all, grey": {"order": [1, 2, 3, 0], **ALL_FOUR, "grey": 1, "sigma": 0.6},
    "saturated": {"order": [1, 2, 3, 0], "brightness": 1.7, "contrast": 1.8, "saturation": 1.8, "hue": -0.2},
}


def name_of(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def noise(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8) if dtype == torch.uint8 else torch.rand(shape).to(dtype)


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def row(box: Sequence[int], order: Sequence[int] = (), **columns: float) -> list[float]:
    """One row of parameters: everything off, but for ``columns`` and the jitter operations in ``order``."""
    filled = [*order, -1, -1, -1, -1][:4]
    values = {**OFF, **dict(zip(COLUMNS[:4], box, strict=True)), **{f"order{i}": o for i, o in enumerate(filled)}}
    return [float({**values, **columns}.get(name, 0.0)) for name in COLUMNS]


def table(rows: Sequence[Sequence[float]]) -> Tensor:
    """[1, B, 16]: one view of B images."""
    return torch.tensor([list(rows)], dtype=torch.float32)


def augment(backend: str, images: Sequence[Tensor], params: Tensor, **options: Any) -> Tensor:
    """``augment_views`` by one backend on its device; the result on the CPU."""
    device = device_of(backend)
    with sslfast.use_backend(backend):
        views = augment_views([image.to(device) for image in images], params.to(device), **options)
    return views.cpu()


def truth(images: Sequence[Tensor], params: Tensor, **options: Any) -> Tensor:
    """The reference in float64."""
    return reference.augment_views(images, params, **{**options, "dtype": torch.float64})


def random_rows(spec: ViewSpec, count: int, size: tuple[int, int]) -> Tensor:
    with sslfast.use_backend("reference"):
        return view_params(torch.arange(count), size, [spec.numbers()])


def many() -> tuple[list[Tensor], Tensor]:
    spec = ViewSpec(
        40, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, jitter_p=0.8, grey_p=0.2, blur_p=0.5, solarize_p=0.3
    )
    with sslfast.use_backend("reference"):
        return [noise(23, 3, 57, 71)], view_params(torch.arange(23), (57, 71), [spec.numbers()] * 3)


def torchvision(module: str) -> Any:
    """A module of torchvision; the test is skipped where it is missing."""
    try:
        peers._import_torchvision()  # declares torchvision's operators first, where its wheel needs that
    except Unavailable as reason:
        pytest.skip(f"torchvision cannot be imported: {reason}")
    return importlib.import_module(f"torchvision.{module}")


@functools.cache
def photographs() -> tuple[Tensor, ...]:
    """Two photographs, [3, 427, 640] uint8."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn, which carries the photographs, is missing")
    return tuple(torch.from_numpy(image.copy()).movedim(-1, 0) for image in datasets.load_sample_images().images)


def torchvision_view(image: Tensor, values: Sequence[float], options: dict[str, Any]) -> Tensor:
    """One view by torchvision's functional operations on ``image`` [C, H, W], float32 in [0, 1]."""
    f = torchvision("transforms.v2.functional")
    p = dict(zip(COLUMNS, values, strict=True))
    x = f.crop(image, int(p["top"]), int(p["left"]), int(p["height"]), int(p["width"]))
    x = f.resize(x, list(options["size"]), interpolation=_mode(options), antialias=True)
    return _colours(f, x, p, options)


def pil_view(image: Tensor, values: Sequence[float], options: dict[str, Any]) -> Tensor:
    """One view by PIL's operations on ``image`` [C, H, W] uint8, as floats in [0, 1]."""
    f = torchvision("transforms.v2.functional")
    p = dict(zip(COLUMNS, values, strict=True))
    x = f.to_pil_image(image)
    x = f.crop(x, int(p["top"]), int(p["left"]), int(p["height"]), int(p["width"]))
    # Columns first, as every PIL did; Pillow 13 takes the rows first where that is less work, which rounds differently.
    for size in ([int(p["height"]), options["size"][1]], list(options["size"])):
        x = f.resize(x, size, interpolation=_mode(options))
    x = _colours(f, x, p, options)
    return torch.from_numpy(np.array(x).reshape(*options["size"], len(image))).movedim(-1, 0) / 255


def _mode(options: dict[str, Any]) -> Any:
    modes = torchvision("transforms").InterpolationMode
    return modes.BICUBIC if options.get("cubic") else modes.BILINEAR


def _colours(f: Any, x: Any, p: dict[str, float], options: dict[str, Any]) -> Any:
    pil = not isinstance(x, Tensor)
    if p["flip"]:
        x = f.horizontal_flip(x)
    for i in range(4):
        if p[f"order{i}"] >= 0:
            name = JITTER[int(p[f"order{i}"])]
            x = getattr(f, f"adjust_{name}")(x, p[name])
    if p["grey"]:
        channels = 3 if (x.mode == "RGB" if pil else len(x) == 3) else 1
        x = f.rgb_to_grayscale(x, num_output_channels=channels)
    if p["sigma"] and pil:
        x = x.filter(importlib.import_module("PIL.ImageFilter").GaussianBlur(radius=p["sigma"]))
    elif p["sigma"]:
        x = f.gaussian_blur(x, [options.get("blur_kernel", 23)] * 2, [p["sigma"]] * 2)
    if p["solarize"]:
        x = f.solarize(x, 128 if pil else options.get("threshold", 0.5))
    if not pil and "mean" in options:
        x = f.normalize(x, list(options["mean"]), list(options["std"]))
    return x
