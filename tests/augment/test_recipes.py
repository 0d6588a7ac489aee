"""Named recipes against a table of their own, and what is drawn from them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sslfast.augment import ViewSpec, apply, recipe, sample_params
from sslfast.augment.recipes import RECIPES

IMAGES = 4000
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SWAV = ((0.485, 0.456, 0.406), (0.228, 0.224, 0.225))
RAW = (0.0, 1.0)
OFF, BYOL, MOCO, SIMCLR = (0, 0, 0, 0), (0.4, 0.4, 0.2, 0.1), (0.4, 0.4, 0.4, 0.1), (0.8, 0.8, 0.8, 0.2)

# One row a kind of view: how many, size, least and largest area, resampling, brightness … hue, P(jitter), P(grey),
# P(blur), taps (None: PIL's blur), P(solarize), normalisation.
LINEAR, CUBIC = "bilinear", "bicubic"
PUBLISHED = {
    "simclr": [(2, 224, 0.08, 1.0, CUBIC, SIMCLR, 0.8, 0.2, 0.5, 23, 0.0, RAW)],
    "moco_v2": [(2, 224, 0.2, 1.0, LINEAR, MOCO, 0.8, 0.2, 0.5, None, 0.0, IMAGENET)],
    "moco_v3": [
        (1, 224, 0.08, 1.0, LINEAR, BYOL, 0.8, 0.2, 1.0, None, 0.0, IMAGENET),
        (1, 224, 0.08, 1.0, LINEAR, BYOL, 0.8, 0.2, 0.1, None, 0.2, IMAGENET),
    ],
    "byol": [
        (1, 224, 0.08, 1.0, CUBIC, BYOL, 0.8, 0.2, 1.0, 23, 0.0, IMAGENET),
        (1, 224, 0.08, 1.0, CUBIC, BYOL, 0.8, 0.2, 0.1, 23, 0.2, IMAGENET),
    ],
    "barlow_twins": [
        (1, 224, 0.08, 1.0, CUBIC, BYOL, 0.8, 0.2, 1.0, None, 0.0, IMAGENET),
        (1, 224, 0.08, 1.0, CUBIC, BYOL, 0.8, 0.2, 0.1, None, 0.2, IMAGENET),
    ],
    "vicreg": [
        (1, 224, 0.08, 1.0, CUBIC, BYOL, 0.8, 0.2, 1.0, None, 0.0, IMAGENET),
        (1, 224, 0.08, 1.0, CUBIC, BYOL, 0.8, 0.2, 0.1, None, 0.2, IMAGENET),
    ],
    "swav": [
        (2, 224, 0.14, 1.0, LINEAR, SIMCLR, 0.8, 0.2, 0.5, None, 0.0, SWAV),
        (6, 96, 0.05, 0.14, LINEAR, SIMCLR, 0.8, 0.2, 0.5, None, 0.0, SWAV),
    ],
    "dino": [
        (1, 224, 0.4, 1.0, CUBIC, BYOL, 0.8, 0.2, 1.0, None, 0.0, IMAGENET),
        (1, 224, 0.4, 1.0, CUBIC, BYOL, 0.8, 0.2, 0.1, None, 0.2, IMAGENET),
        (8, 96, 0.05, 0.4, CUBIC, BYOL, 0.8, 0.2, 0.5, None, 0.0, IMAGENET),
    ],
    "dinov2": [  # blurred as the published models were trained, not as the code reads: 1 − p
        (1, 224, 0.32, 1.0, CUBIC, BYOL, 0.8, 0.2, 0.0, 9, 0.0, IMAGENET),
        (1, 224, 0.32, 1.0, CUBIC, BYOL, 0.8, 0.2, 0.9, 9, 0.2, IMAGENET),
        (8, 96, 0.05, 0.32, CUBIC, BYOL, 0.8, 0.2, 0.5, 9, 0.0, IMAGENET),
    ],
    "mae": [(1, 224, 0.2, 1.0, CUBIC, OFF, 0.0, 0.0, 0.0, None, 0.0, IMAGENET)],
    "supervised": [(1, 224, 0.08, 1.0, LINEAR, OFF, 0.0, 0.0, 0.0, None, 0.0, IMAGENET)],
}
SHARED = dict(ratio=(3 / 4, 4 / 3), flip_p=0.5, shuffle=True, sigma=(0.1, 2.0), solarize_threshold=0.5)

every_recipe = pytest.mark.parametrize("name", PUBLISHED)


def test_names() -> None:
    assert isinstance(RECIPES, tuple) and sorted(RECIPES) == sorted(PUBLISHED)
    with pytest.raises(ValueError, match="name must be one of simclr, .*supervised, got 'dinov9'"):
        recipe("dinov9")


@every_recipe
def test_as_published(name: str) -> None:
    expected = [row[1:] for row in PUBLISHED[name] for _ in range(row[0])]
    views = recipe(name)
    assert len(views) == len(expected) and all(type(view) is ViewSpec for view in views)
    for view, (size, low, high, interpolation, factors, jitter, grey, blur, taps, solarize, norm) in zip(
        views, expected, strict=True
    ):
        assert view.height_width == (size, size) and view.scale == (low, high) and view.interpolation == interpolation
        assert (view.brightness, view.contrast, view.saturation, view.hue) == factors
        assert view.jitter_p == (jitter if any(factors) else view.jitter_p) and view.grey_p == grey
        assert view.blur_p == blur and view.solarize_p == solarize
        assert view.semantics == ("pil" if taps is None else "torchvision")
        assert view.blur_kernel == (taps or view.blur_kernel)
        assert (view.mean, view.std) == norm
        assert {field: getattr(view, field) for field in SHARED} == SHARED


@every_recipe
def test_what_is_drawn(name: str) -> None:
    """Frequencies within four standard errors, factors in their ranges and filling them, areas as wanted."""
    height, width = 640, 500
    rows = [row for row in PUBLISHED[name] for _ in range(row[0])]
    params = sample_params(torch.zeros(1, 3, height, width).expand(IMAGES, -1, -1, -1), recipe(name), range(IMAGES))
    assert len(params) == len(rows)

    def happens(found: torch.Tensor, probability: float) -> None:
        error = math.sqrt(probability * (1 - probability) / IMAGES)
        assert abs(found.double().mean().item() - probability) <= 4 * error

    for v, (_, _, low, high, _, factors, jitter, grey, blur, _, solarize, _) in enumerate(rows):
        happens(params.flip[v], 0.5)
        happens(params.grey[v], grey)
        happens(params.sigma[v] > 0, blur)
        happens(params.solarize[v], solarize)
        order = params.order[v]
        assert ((order >= 0).all(1) == (order >= 0).any(1)).all()  # all four, or none
        happens(order[:, 0] >= 0, jitter)
        for operation in range(4) if jitter else ():
            happens(order[:, 0] == operation, jitter / 4)
        for drawn, strength, centre in zip(
            (params.brightness, params.contrast, params.saturation, params.hue), factors, (1, 1, 1, 0), strict=True
        ):
            least, most = drawn[v].min().item(), drawn[v].max().item()
            assert centre - strength - 1e-6 <= least <= centre - 0.98 * strength
            assert centre + 0.98 * strength <= most <= centre + strength + 1e-6
        sigma = params.sigma[v][params.sigma[v] > 0]
        assert len(sigma) == 0 or (0.1 <= sigma.min() < 0.12 and 1.98 < sigma.max() <= 2)
        top, left, tall, wide = params.box[v].double().unbind(1)
        assert (top >= 0).all() and (left >= 0).all() and (top + tall <= height).all() and (left + wide <= width).all()
        # Sides are rounded by at most a half: an attempt's area is off by half the sum of the sides, and a quarter.
        area, slack = tall * wide, (tall + wide) / 2 + 0.25
        assert (area >= low * height * width - slack).all() and (area <= high * height * width + slack).all()
        share = area / (height * width)
        assert share.min() < low + 0.01 * (high - low) + 1e-3
        assert (wide / tall > 3 / 4 * (1 - slack / area)).all() and (wide / tall < 4 / 3 * (1 + slack / area)).all()
        if high * height / width * 4 / 3 < 1:  # every attempt fits, so the area is uniform
            error = (high - low) / math.sqrt(12 * IMAGES)
            assert abs(share.mean().item() - (low + high) / 2) <= 4 * error


@every_recipe
@pytest.mark.parametrize("size", [1, 2, 8, 28, 32, (40, 64), 518])
@pytest.mark.parametrize("semantics", ["torchvision", "pil"])
def test_every_size(name: str, size: int | tuple[int, int], semantics: str) -> None:
    """A kernel that fits, by SimCLR's rule (10 % of the side, made odd: 2 · ⌊side / 20⌋ + 1, at least 3)."""
    published = recipe(name)
    local = [view.size == 96 for view in published]
    views = recipe(name, size, size, semantics) if any(local) else recipe(name, size, semantics=semantics)
    expected = {1: 1, 2: 3, 8: 3, 28: 3, 32: 3, (40, 64): 5, 518: 51}[size]
    for view, before in zip(views, published, strict=True):
        assert view.size == size and view.semantics == semantics
        assert view.blur_kernel == (min(expected, 9) if name == "dinov2" else expected)
        assert view == replace(before, size=size, semantics=semantics, blur_kernel=view.blur_kernel)


def test_sizes_of_global_and_local_views_are_apart() -> None:
    sizes = [view.size for view in recipe("dino", size=64, local_size=32)]
    assert sizes == [64] * 2 + [32] * 8
    assert [view.size for view in recipe("dinov2", local_size=98)] == [224] * 2 + [98] * 8
    assert [view.size for view in recipe("swav", 160)] == [160] * 2 + [96] * 6
    assert {view.blur_kernel for view in recipe("dino", semantics="torchvision")} == {23, 9}


def test_bad_arguments() -> None:
    for arguments, told in (
        (dict(size=0), "size must be"),
        (dict(size="224"), "size must be"),
        (dict(local_size=96), "simclr, which has no local views"),
        (dict(semantics="opencv"), "semantics must be one of torchvision, pil"),
    ):
        with pytest.raises(ValueError, match=told):
            recipe("simclr", **arguments)


@every_recipe
def test_views_are_made(name: str) -> None:
    """Through the whole pipeline, at a small size; a list of a recipe is the caller's to change."""
    local = dict(local_size=8) if len(recipe(name)) > 2 else {}
    views = recipe(name, 16, **local)
    views.append(views[0])
    assert len(recipe(name, 16, **local)) == len(views) - 1
    images = torch.randint(0, 256, (3, 3, 40, 30), dtype=torch.uint8)
    made = apply(images, sample_params(images, views, range(3)), views)
    assert [tuple(view.shape) for view in made] == [(3, 3, *view.height_width) for view in views]
    for view, spec in zip(made, views, strict=True):
        mean, std = (torch.tensor(spec.channels(which, 3))[:, None, None] for which in ("mean", "std"))
        pixels = view * std + mean
        slack = 1e-5 if spec.semantics == "pil" else 0.25  # bicubic overshoot
        assert pixels.isfinite().all() and pixels.min() >= -slack and pixels.max() <= 1 + slack
