"""Inpainting: the hole and nothing else is filled, holes are as large as they should be and lie anywhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sslfast import pretext
from sslfast.pretext.inpainting import _cubic


def pictures(count: int, side: int = 48, dtype: torch.dtype = torch.uint8) -> Tensor:
    draw = torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(0))
    return draw.to(torch.uint8) if dtype == torch.uint8 else (draw / 255).to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("hole", ["centre", "blocks", "region"])
def test_inpainting_fills_the_hole_and_nothing_else(hole: str, dtype: torch.dtype) -> None:
    images = pictures(300, 64, dtype)
    out = pretext.inpainting(images, range(300), hole=hole)
    mean = torch.tensor([124, 116, 104]) if dtype == torch.uint8 else torch.tensor([0.485, 0.456, 0.406])
    inside = out.mask.expand_as(images)
    assert out.mask.dtype == torch.bool and out.mask.shape == (300, 1, 64, 64) and out.images.dtype == dtype
    assert torch.equal(out.images[~inside], images[~inside]) and out.target is images
    assert torch.equal(out.images[inside], mean.to(dtype)[:, None, None].expand_as(images)[inside])
    assert torch.equal(out.weight, out.mask.float())
    share = out.mask.double().mean(dim=(1, 2, 3))
    if hole == "blocks":
        assert share.min() > 0.05 and share.max() <= 0.25 and share.mean() > 0.18
    else:
        assert (share == 0.25).all()
    if hole == "centre":
        assert out.mask[:, :, 16:48, 16:48].all()
        return
    assert out.mask.flatten(1).unique(dim=0).shape[0] == 300
    edges = (out.mask[..., 1:] != out.mask[..., :-1]).double().mean()
    assert edges < 0.06  # pieces, not dust: independent pixels would have 0.375
    if hole == "region":  # nowhere more likely than elsewhere: no trace of the lattice of the noise
        often = F.avg_pool2d(out.mask.float().mean(0), 4)
        assert often.min() > 0.15 and often.max() < 0.36
        lines = out.mask.float().mean((0, 1))
        assert lines.mean(0).std() < 0.02 and lines.mean(1).std() < 0.02


def test_inpainting_interpolates_as_catmull_rom() -> None:
    place, weights = _cubic(torch.tensor([0, 5, 6]), 40, 7)
    t = (torch.tensor([0, 5, 6])[:, None] + torch.arange(40)) % 7 / 7.0
    assert torch.equal(place, (torch.tensor([0, 5, 6])[:, None] + torch.arange(40)) // 7)
    far = lambda d: -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2  # noqa: E731  Keys' kernel, a = −1/2, beyond 1
    near = lambda d: 1.5 * d**3 - 2.5 * d**2 + 1  # noqa: E731  and below
    for got, expected in zip(weights, (far(1 + t), near(t), near(1 - t), far(2 - t)), strict=True):
        assert ((got / 4096 - expected).abs() < 3e-4).all()


def test_inpainting_overlap_and_fill() -> None:
    images = pictures(5, 64)
    out = pretext.inpainting(images, range(5), hole="blocks", overlap=7, fill=0.5)
    rows = torch.arange(64)
    for mask, weight in zip(out.mask[:, 0], out.weight[:, 0], strict=True):
        r, c = mask.nonzero(as_tuple=True)
        near = ((rows[:, None, None] - r).abs().maximum((rows[None, :, None] - c).abs()) <= 7).any(2)
        assert torch.equal(weight, torch.where(mask, 1.0, torch.where(near, 10.0, 0.0)))
    assert (out.images[out.mask.expand_as(images)] == 128).all()
    assert pretext.inpainting(images[:, :1], fill=0.2).images[0, 0, 32, 32] == 51


@pytest.mark.parametrize("height, width, share, blocks", [(8, 300, 1, 1), (8, 100, 0.25, 1), (5, 2000, 0.25, 1)])
def test_inpainting_blocks_of_long_images(height: int, width: int, share: float, blocks: int) -> None:
    """A block as high as the image, where √(A/2) is more than that, has the area all the same."""
    images = torch.zeros(200, 1, height, width)
    mask = pretext.inpainting(images, range(200), hole="blocks", share=share, blocks=blocks, fill=0.0).mask
    assert (mask.sum(dim=(1, 2, 3)) == share * height * width).all()
    assert (mask == mask[:, :, :1]).all()
    assert share == 1 or mask.flatten(1).unique(dim=0).shape[0] > 50


@pytest.mark.parametrize(
    "name, call",
    [
        ("hole", lambda: pretext.inpainting(pictures(2), hole="center")),
        ("share", lambda: pretext.inpainting(pictures(2), share=1.5)),
        ("share", lambda: pretext.inpainting(pictures(2), share=0.001, hole="blocks")),
        ("fill", lambda: pretext.inpainting(pictures(2)[:, :1])),
        ("images", lambda: pretext.inpainting(torch.zeros(1, 3, 16, 200000), hole="region")),
        ("blocks", lambda: pretext.inpainting(torch.zeros(1, 3, 600, 600), hole="blocks", blocks=90000)),
    ],
)
def test_wrong_input_is_named(name: str, call: Callable[[], object]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name} must"):
        call()
