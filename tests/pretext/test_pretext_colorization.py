"""Colorization: Lab against published values, the paper's classes, soft targets against a search over all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sslfast import pretext


def every_colour(step: int) -> Tensor:
    """[1, 3, n², n] float64: sRGB on a grid."""
    axis = torch.cat([torch.arange(0, 255, step), torch.tensor([255])]).double() / 255
    return torch.cartesian_prod(axis, axis, axis).T.reshape(1, 3, -1, len(axis))


def test_lab_of_known_colours() -> None:
    known = {
        (255, 0, 0): (53.24, 80.09, 67.20),
        (0, 255, 0): (87.73, -86.18, 83.18),
        (0, 0, 255): (32.30, 79.19, -107.86),
        (255, 255, 255): (100, 0, 0),
        (0, 0, 0): (0, 0, 0),
        (119, 119, 119): (50.03, 0, 0),
        (5, 5, 5): (1.37, 0, 0),  # in both linear parts: 5/255/12.92 · 903.3
    }
    rgb = torch.tensor(list(known), dtype=torch.uint8).T.reshape(1, 3, 1, -1)
    expected = torch.tensor(list(known.values()), dtype=torch.float32).T.reshape(1, 3, 1, -1)
    torch.testing.assert_close(pretext.rgb_to_lab(rgb), expected, rtol=0, atol=0.015)
    torch.testing.assert_close(pretext.rgb_to_lab(rgb / 255), pretext.rgb_to_lab(rgb))


def test_lab_is_scikit_images() -> None:
    color = pytest.importorskip("skimage.color", reason="scikit-image is not installed")
    rgb = every_colour(17)
    expected = torch.from_numpy(color.rgb2lab(rgb[0].permute(1, 2, 0).numpy())).permute(2, 0, 1)
    torch.testing.assert_close(pretext.rgb_to_lab(rgb)[0], expected, rtol=0, atol=2e-3)


def test_lab_and_back() -> None:
    rgb = every_colour(15)
    torch.testing.assert_close(pretext.lab_to_rgb(pretext.rgb_to_lab(rgb)), rgb, rtol=0, atol=2e-5)
    assert pretext.rgb_to_lab(rgb.half()).dtype == torch.float32


def test_classes_are_those_of_the_paper() -> None:
    bins = {tuple(int(x) for x in ab) for ab in pretext.color_bins().tolist()}
    assert len(bins) == 313 and pretext.color_bins()[0].tolist() == [-90, 50]
    assert pretext.color_bins().tolist() == sorted(pretext.color_bins().tolist())
    # What the cube of colours covers, seen along L, its faces cover.
    level = torch.arange(256.0, dtype=torch.float64) / 255
    face = torch.cartesian_prod(level, level)
    faces = [torch.cat([face, torch.full_like(face[:, :1], v)], dim=1).roll(k, 1) for v in (0, 1) for k in range(3)]
    colours = torch.cat(faces).T.reshape(1, 3, -1, 256)
    squares = (pretext.rgb_to_lab(colours)[0, 1:].flatten(1).T / 10).floor().unique(dim=0)
    corners = torch.cat([squares + torch.tensor([a, b]) for a in (0, 1) for b in (0, 1)]).unique(dim=0) * 10
    reached = {tuple(int(x) for x in ab) for ab in corners.tolist()}
    assert bins - reached == {(40, 90), (100, -90), (100, -10), (100, 0)} and reached <= bins


@pytest.mark.parametrize("neighbours", [1, 5, 10, 32])
def test_soft_targets_are_the_nearest_classes(neighbours: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inside = pretext.rgb_to_lab(torch.rand(1, 3, 60, 60, generator=generator))[:, 1:]
    anywhere = torch.rand(1, 2, 60, 60, generator=generator) * 220 - 110
    for ab in (inside, anywhere):
        bins, weights = pretext.Colorization(neighbours=neighbours).encode(ab)
        points = ab[0].flatten(1).T.double()
        distance = torch.cdist(points, pretext.color_bins().double())
        found = distance.gather(1, bins[0].flatten(1).T)
        distance = distance.topk(neighbours, largest=False).values
        torch.testing.assert_close(found, distance, rtol=1e-5, atol=1e-4)  # float32 may swap what is as near
        assert (bins[0].flatten(1).T.sort(1).values.diff(dim=1) > 0).all()
        expected = torch.exp(-(distance**2) / (2 * 5.0**2))
        expected = (expected / expected.sum(1, keepdim=True)).float()
        torch.testing.assert_close(weights[0].flatten(1).T, expected, rtol=1e-3, atol=1e-6)


def test_equals_are_taken_by_number() -> None:
    middle = torch.tensor([5.0, 5.0]).view(1, 2, 1, 1)  # four classes at the same distance, then eight
    bins, weights = pretext.Colorization().encode(middle)
    distance = (pretext.color_bins() - 5).square().sum(1)
    assert bins.flatten().tolist() == distance.sort(stable=True).indices[:5].tolist()
    torch.testing.assert_close(weights.flatten()[:4], weights.flatten()[:1].expand(4))


def test_inputs_and_targets() -> None:
    images = torch.randint(0, 256, (3, 3, 10, 13), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = pretext.colorization(images, stride=4)
    lab = pretext.rgb_to_lab(images)
    assert torch.equal(out.lightness, (lab[:, :1] - 50) / 100) and out.lightness.dtype == torch.float32
    assert torch.equal(out.ab, lab[:, 1:, ::4, ::4]) and out.ab.shape == (3, 2, 3, 4)
    dense = pretext.dense_colors(out.bins, out.weights)
    assert dense.shape == (3, 313, 3, 4) and ((dense > 0).sum(1) <= 5).all()
    torch.testing.assert_close(dense.sum(1), torch.ones(3, 3, 4))
    torch.testing.assert_close(dense.gather(1, out.bins), out.weights)
    # The mean of the classes is the colour again, but for the size of their grid.
    back = pretext.decode_colors(dense.log(), temperature=1.0)
    assert (back - out.ab).square().sum(1).sqrt().max() < 10


def test_decoding_is_the_annealed_mean() -> None:
    probability = torch.rand(2, 313, 3, 4, dtype=torch.float64).softmax(1)
    for temperature in (0.38, 1.0):
        annealed = torch.exp(probability.log() / temperature)
        annealed = annealed / annealed.sum(1, keepdim=True)
        expected = (annealed[:, :, None] * pretext.color_bins().double()[:, :, None, None]).sum(1).float()
        # Of terms up to 110 · p: colours that cancel.
        torch.testing.assert_close(pretext.decode_colors(probability.log(), temperature), expected, rtol=0, atol=1e-4)
    shifted = pretext.decode_colors(probability.log() + 3)  # logits, or log-probabilities
    torch.testing.assert_close(shifted, pretext.decode_colors(probability.log()), rtol=1e-4, atol=1e-4)


def test_autocast_changes_nothing() -> None:
    rgb = every_colour(51).float()
    logits = torch.randn(2, 313, 5, 6)
    lab, colours = pretext.rgb_to_lab(rgb), pretext.decode_colors(logits)
    with torch.autocast("cpu", torch.bfloat16):
        again = pretext.rgb_to_lab(rgb), pretext.lab_to_rgb(lab), pretext.decode_colors(logits)
    for got, expected in zip(again, (lab, pretext.lab_to_rgb(lab), colours), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_rebalancing() -> None:
    histogram = torch.randint(0, 1000, (313,), generator=torch.Generator().manual_seed(0))
    histogram[7] = 0
    share = histogram.double() / histogram.sum()
    weights = pretext.rebalancing_weights(histogram, sigma=0)
    expected = 1 / (0.5 * share + 0.5 / 313)
    torch.testing.assert_close(weights, (expected / (expected * share).sum()).float())
    assert weights.argmax() == 7 and weights.isfinite().all()
    torch.testing.assert_close(pretext.rebalancing_weights(histogram, lam=1.0), torch.ones(313))
    # λ = 0: w = 1/(Q p̃), so p̃ can be read off: smoothing moves colours and loses none.
    one = torch.zeros(313)
    one[100] = 5
    smooth = 1 / (313 * pretext.rebalancing_weights(one, lam=0.0, sigma=20).double())
    torch.testing.assert_close(smooth.sum(), torch.tensor(1.0).double())
    bins = pretext.color_bins().double()
    gauss = torch.exp(-(bins - bins[100]).square().sum(1) / (2 * 20**2))
    torch.testing.assert_close(smooth, gauss / gauss.sum(), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    "name, call",
    [
        ("images", lambda: pretext.colorization(torch.rand(1, 1, 4, 4))),
        ("stride", lambda: pretext.Colorization(stride=0)),
        ("neighbours", lambda: pretext.Colorization(neighbours=33)),
        ("sigma", lambda: pretext.Colorization(sigma=0)),
        ("histogram", lambda: pretext.rebalancing_weights(torch.ones(312))),
        ("lam", lambda: pretext.rebalancing_weights(torch.ones(313), lam=2)),
        ("temperature", lambda: pretext.decode_colors(torch.zeros(1, 313, 1, 1), 0)),
    ],
)
def test_wrong_input_is_named(name: str, call: Callable[[], object]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name} must"):
        call()
