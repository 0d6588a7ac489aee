"""Pretext tasks at their edges: numbers of NumPy, the default device, forgotten epochs, images on another scale."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from sslfast import _checks, pretext

OPTIONS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "rotation": (pretext.rotation, dict(all_four=False), dict(all_four=False)),
    "jigsaw": (
        pretext.jigsaw,
        dict(
            grid=np.int64(2), permutations=np.int32(9), tile=np.int64(10), cell=np.int64(14), grey_p=np.float32(0.5),
            colour_shift=np.int64(1), permutation_seed=np.uint64(3),
        ),
        dict(grid=2, permutations=9, tile=10, cell=14, grey_p=0.5, colour_shift=1, permutation_seed=3),
    ),
    "relative_location": (
        pretext.relative_location,
        dict(
            patch=np.int64(10), gap=np.int64(4), jitter=np.int64(1), downsample_p=np.float32(0.5),
            least_pixels=np.int64(20), rms=np.float32(25),
        ),
        dict(patch=10, gap=4, jitter=1, downsample_p=0.5, least_pixels=20, rms=25.0),
    ),
    "inpainting": (
        pretext.inpainting,
        dict(
            hole="blocks", share=np.float32(0.25), blocks=np.int64(3), overlap=np.int64(2),
            overlap_weight=np.float32(5), fill=np.array([0.5, 0.25, 0.125]),
        ),
        dict(hole="blocks", share=0.25, blocks=3, overlap=2, overlap_weight=5.0, fill=(0.5, 0.25, 0.125)),
    ),
    "region": (pretext.inpainting, dict(hole="region", fill=np.float32(0.5)), dict(hole="region", fill=0.5)),
}  # fmt: skip


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", OPTIONS)
def test_numbers_of_numpy_and_the_default_device(name: str) -> None:
    function, given, plain = OPTIONS[name]
    images = torch.rand(2, 3, 40, 40)
    expected = function(images, [3, 4], seed=2**64 - 1, epoch=2, **plain)
    assert equal(function(images, [3, 4], seed=np.uint64(2**64 - 1), epoch=np.int64(2), **given), expected)
    with torch.device("meta"):
        assert equal(function(images, [3, 4], seed=2**64 - 1, epoch=2, **plain), expected)


def test_colours_by_numbers_of_numpy() -> None:
    images = torch.rand(2, 3, 16, 16)
    given = pretext.Colorization(np.int64(2), np.int64(3), np.float32(4))  # type: ignore[arg-type]
    assert given == pretext.Colorization(2, 3, 4.0) and equal(given(images), pretext.Colorization(2, 3, 4.0)(images))
    histogram, logits = torch.rand(313), torch.rand(1, 313, 2, 2)
    weights = pretext.rebalancing_weights(histogram, lam=np.float32(0.5), sigma=np.int64(5))  # type: ignore[arg-type]
    assert torch.equal(weights, pretext.rebalancing_weights(histogram))
    assert torch.equal(pretext.decode_colors(logits, np.float64(0.5)), pretext.decode_colors(logits, 0.5))
    assert torch.equal(pretext.permutation_set(np.int64(5), np.int64(4)), pretext.permutation_set(5, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OPTIONS)
def test_ids_without_an_epoch_and_the_scale_of_bytes_are_warned_of(name: str) -> None:
    function, _, plain = OPTIONS[name]
    images = torch.rand(2, 3, 40, 40)
    _checks._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(images, **plain)
        function(images, [3, 4], epoch=0, **plain)
    assert caught == []
    with pytest.warns(UserWarning, match="ids were given and no epoch") as told:
        function(images, [3, 4], **plain)
    assert told[0].filename == __file__
    if name != "rotation":  # which has no scale
        with pytest.warns(UserWarning, match="images seem to be on the scale 0 … 255"):
            function(255 * images, [3, 4], epoch=0, **plain)


def test_colours_on_the_scale_of_bytes_are_warned_of() -> None:
    _checks._warned.clear()
    with pytest.warns(UserWarning, match="images seem to be on the scale 0 … 255"):
        pretext.colorization(255 * torch.rand(2, 3, 16, 16))
