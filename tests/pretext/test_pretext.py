"""Pretext tasks: labels against the content they describe, the papers' numbers, draws that belong to the sample."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sslfast import pretext
from sslfast._random.ids import sample_ids
from sslfast.pretext.relative_location import _there_and_back

SMALL_PAIR = dict(patch=12, gap=6, jitter=2, least_pixels=25)
SMALL_PUZZLE = dict(tile=10, cell=14)
TASKS: dict[str, Callable[..., Any]] = {
    "rotation": lambda x, ids, **k: pretext.rotation(x, ids, all_four=False, **k),
    "jigsaw": lambda x, ids, **k: pretext.jigsaw(x, ids, **SMALL_PUZZLE, **k),
    "relative_location": lambda x, ids, **k: pretext.relative_location(x, ids, **SMALL_PAIR, **k),
    "blocks": lambda x, ids, **k: pretext.inpainting(x, ids, hole="blocks", **k),
    "region": lambda x, ids, **k: pretext.inpainting(x, ids, hole="region", overlap=3, **k),
}


def pictures(count: int, side: int = 48, dtype: torch.dtype = torch.uint8, seed: int = 0) -> Tensor:
    draw = torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed))
    return draw.to(torch.uint8) if dtype == torch.uint8 else (draw / 255).to(dtype)


def ramp(side: int) -> Tensor:
    """[1, 3, side, side] float64: each pixel holds its number, so a cut-out tells where it was."""
    return torch.arange(float(side * side), dtype=torch.float64).view(1, 1, side, side).repeat(1, 3, 1, 1)


@pytest.mark.parametrize("name", TASKS)
def test_parameters_belong_to_the_sample(name: str) -> None:
    task, images, ids = TASKS[name], pictures(9), torch.tensor([5, 2**40, 7, -3, 8, 9, 10, 2**63 - 1, 0])
    whole = task(images, ids, seed=3, epoch=4)
    order = torch.tensor([4, 0, 8, 2, 6, 1, 7, 3, 5])
    shuffled = task(images[order], ids[order], seed=3, epoch=4)
    single = [task(images[i : i + 1], int(ids[i]), seed=3, epoch=4) for i in range(9)]
    strided = task(images.to(memory_format=torch.channels_last), ids.tolist(), seed=3, epoch=4)
    for i, field in enumerate(whole):
        assert torch.equal(field[order], shuffled[i])
        # Sums are taken in an order that depends on the shape, so the values agree but for their rounding.
        torch.testing.assert_close(torch.cat([one[i] for one in single]), field, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(strided[i], field, rtol=1e-4, atol=1e-3)
    for other in (dict(seed=4, epoch=4), dict(seed=3, epoch=5), dict(seed=3 + 2**32, epoch=4)):
        again = task(images, ids, **other)
        assert not all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    torch.manual_seed(1)
    first = task(images, None)
    torch.manual_seed(1)
    second, third = task(images, None), task(images, None)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, third, strict=True))


class Products(TorchDispatchMode):
    """Counts matrix products; those of less than float64 are what TF32 and autocast take away digits from."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm", "mv", "dot", "convolution")
        self.rounded += product and args[0].dtype != torch.float64
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", TASKS)
def test_autocast_changes_nothing(name: str) -> None:
    images = pictures(6, dtype=torch.float32)
    expected = TASKS[name](images, range(6))
    with Products() as products, torch.autocast("cpu", torch.bfloat16):
        got = TASKS[name](images, range(6))
    assert products.rounded == 0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_ids_are_waited_for_on_their_way_to_the_processor() -> None:
    """The copy of ids from a GPU must have ended when they are read."""
    asked = []

    class Copies(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is Tensor.to and "non_blocking" in (kwargs or {}):
                asked.append(kwargs["non_blocking"])
            return func(*args, **(kwargs or {}))

    with Copies():
        sample_ids(torch.arange(3), 3, torch.device("cpu"))
    assert not any(asked)


@pytest.mark.gpu
@pytest.mark.parametrize("name", TASKS)
def test_cuda_draws_the_same_and_waits_for_nothing(name: str) -> None:
    images, ids = pictures(8), torch.arange(8)
    expected = TASKS[name](images, ids, seed=1)
    images, ids = images.cuda(), ids.cuda()
    TASKS[name](images, ids, seed=1)  # fills the caches
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = TASKS[name](images, ids, seed=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-3)


def test_labels_are_uniform() -> None:
    images, ids = pictures(1, 42).expand(6000, -1, -1, -1), torch.arange(6000)
    labels = {
        4: pretext.rotation(images[..., :2, :2], ids, all_four=False).labels,
        8: pretext.relative_location(images, ids, patch=4, gap=2, jitter=1, least_pixels=2, colour="keep").label,
        10: pretext.jigsaw(images[..., :4, :4], ids, grid=2, permutations=10, tile=1, cell=2).label,
    }
    for classes, label in labels.items():
        counts = torch.bincount(label, minlength=classes).double()
        assert len(counts) == classes
        chi_squared = ((counts - 6000 / classes) ** 2 / (6000 / classes)).sum()
        assert chi_squared < 35, (classes, counts)  # 9 degrees of freedom: beyond with probability 6e-5


# ---- rotation


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_rotation(dtype: torch.dtype) -> None:
    images = pictures(6, 11, dtype)
    turned = [torch.from_numpy(np.rot90(images.numpy(), k, axes=(2, 3)).copy()) for k in range(4)]
    out = pretext.rotation(images)
    assert torch.equal(out.images, torch.cat(turned)) and out.images.dtype == dtype
    assert out.labels.tolist() == [k for k in range(4) for _ in range(6)]
    many = pretext.rotation(images.repeat(10, 1, 1, 1), torch.arange(60), all_four=False)
    assert set(many.labels.tolist()) == {0, 1, 2, 3}
    for i, label in enumerate(many.labels.tolist()):
        assert torch.equal(many.images[i], turned[label][i % 6])
    # Once counter-clockwise, what was at the top right is at the top left.
    assert torch.equal(out.images[6:12, :, 0, 0], images[:, :, 0, -1])


# ---- jigsaw


def test_permutation_set_is_the_greedy_one() -> None:
    """Against algorithm 1 as it is written, over all 24 permutations of four tiles."""
    got = pretext.permutation_set(24, tiles=4, seed=5).numpy()
    left = np.array(list(itertools.permutations(range(4))))
    taken = got[:1]
    for i in range(1, 24):
        left = left[(left != taken[-1]).any(1)]
        distance = (taken[:, None] != left[None]).sum(-1).sum(0)
        taken = np.concatenate([taken, left[distance.argmax()][None]])
        assert np.array_equal(got[: i + 1], taken)


def test_permutation_set_of_the_paper() -> None:
    for count, mean in ((100, 8.08), (1000, 8.00)):  # its table of ablations
        table = pretext.permutation_set(count)
        assert table.shape == (count, 9) and table.dtype == torch.int64
        assert torch.equal(table.sort(dim=1).values, torch.arange(9).expand(count, 9))
        distance = (table[:, None] != table[None]).sum(-1)
        assert int(distance[~torch.eye(count, dtype=torch.bool)].min()) >= 2  # distinct
        average = distance.sum() / (count * (count - 1))
        assert mean <= average <= 8 * count / (count - 1)
    assert not torch.equal(pretext.permutation_set(100), pretext.permutation_set(100, seed=1))
    pretext.permutation_set(100)[0] = 0
    assert int(pretext.permutation_set(100)[0].sum()) == 36  # the cache is nobody's to write to
    task = pretext.Jigsaw(**SMALL_PUZZLE, permutation_seed=11)
    before = task(pictures(4), range(4)).tiles
    task.permutation_table().zero_()
    assert torch.equal(task(pictures(4), range(4)).tiles, before)


def test_jigsaw_tiles_come_from_the_labelled_cells() -> None:
    task = pretext.Jigsaw(tile=10, cell=14, grey_p=0, colour_shift=0, normalize=False)
    tiles, label = task(ramp(45).expand(400, -1, -1, -1), torch.arange(400))
    assert tiles.shape == (400, 9, 3, 10, 10) and tiles.dtype == torch.float64
    corner = tiles[..., :1, :1]
    pixel = torch.arange(10.0, dtype=torch.float64)
    assert torch.equal(tiles - corner, (pixel[:, None] * 45 + pixel).expand_as(tiles))
    order = task.permutation_table()[label]
    for axis, place in ((order // 3, corner[:, :, 0, 0, 0] // 45), (order % 3, corner[:, :, 0, 0, 0] % 45)):
        inside = place - 14 * axis  # window, 0 … 3, plus jitter, 0 … 4
        assert ((inside.amax(1) - inside.amin(1)) <= 4).all()
        assert inside.min() == 0 and inside.max() == 7
        assert ((inside.amax(1) - inside.amin(1)) >= 3).double().mean() > 0.5  # tiles jitter each by itself


def test_jigsaw_colours() -> None:
    task = pretext.Jigsaw(tile=10, cell=20, normalize=False)
    tiles, _ = task(ramp(60).expand(1000, -1, -1, -1), torch.arange(1000))
    corner = tiles[..., 0, 0]  # [B, 9, 3]
    grey = (corner == corner[:, :1, :1]).flatten(2).all(2)
    same = (tiles == tiles[:, :, :1]).flatten(1).all(1)
    assert 0.25 < same.double().mean() < 0.35 and not grey.all()
    coloured = corner[~same]
    for place in (coloured // 60 % 20, coloured % 60 % 20):
        spread = place.amax(2) - place.amin(2)
        assert spread.max() == 4 and place.max() == 10  # ±2 against each other, and in the cell
        assert {0, 1, 2, 3, 4} == set(spread.flatten().tolist())
    everything = pretext.Jigsaw(tile=10, cell=20, normalize=False, grey_p=1)(pictures(4, 60), range(4)).tiles
    assert everything.dtype == torch.uint8 and torch.equal(everything, everything[:, :, :1].expand_as(everything))
    plain = pretext.Jigsaw(tile=10, cell=20, normalize=False, grey_p=0, colour_shift=0)(pictures(4, 60), range(4)).tiles
    weighted = torch.einsum("bkchw,c->bkhw", plain.double(), torch.tensor([0.2989, 0.587, 0.114]).double())
    assert ((everything[:, :, 0] - weighted).abs() <= 0.501).all()  # grey tiles are not shifted


def test_jigsaw_normalises_each_tile() -> None:
    images = pictures(4)
    images[:, 0] //= 4
    images[0] = 77  # one colour: no noise made of rounding
    tiles = pretext.jigsaw(images, range(4), **SMALL_PUZZLE).tiles
    assert tiles.dtype == torch.float32 and (tiles[0].abs() < 1e-3).all()
    deviation, mean = torch.std_mean(tiles[1:], dim=(2, 3, 4), correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)
    torch.testing.assert_close(deviation, torch.ones_like(deviation), atol=1e-4, rtol=0)
    coloured = tiles[tiles[:, 0, 0].flatten(1).ne(tiles[:, 0, 1].flatten(1)).any(1)]
    assert len(coloured) > 0 and (coloured[:, :, 0].mean((2, 3)) < -0.3).all()  # all channels by the same numbers


# ---- relative location


def find(patches: Tensor, image: Tensor, side: int) -> Tensor:
    """[B, 2]: the top left corners of patches whose mean and size were taken away, by correlation with every window."""
    windows = F.unfold(image, side)[0].view(image.shape[1], side**2, -1)
    windows = (windows - windows.mean(1, keepdim=True)).flatten(0, 1)
    cosine = F.normalize(patches.flatten(1), dim=1) @ F.normalize(windows, dim=0)
    best = cosine.max(1)
    assert (best.values > 0.999).all()
    across = image.shape[3] - side + 1
    return torch.stack([best.indices // across, best.indices % across], dim=1)


def test_relative_location_labels_are_where_the_patches_lie() -> None:
    image, side, step, jitter = pictures(1, 40, torch.float32), 12, 18, 2
    task = pretext.RelativeLocation(**SMALL_PAIR, colour="keep", downsample_p=0)
    first, second, label = task(image.expand(1500, -1, -1, -1), torch.arange(1500))
    torch.testing.assert_close(first.square().mean(dim=(1, 2, 3)), torch.full((1500,), 2500.0))
    at_first, at_second = find(first, image, side), find(second, image, side)
    neighbours = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]
    away = at_second - at_first - step * torch.tensor(neighbours)[label]
    assert away.min() == -2 * jitter and away.max() == 2 * jitter  # that, and nothing but the jitter
    assert set(label.tolist()) == set(range(8))
    places = torch.cat([at_first, at_second])
    assert places.min() == 0 and places.max() == 40 - side  # every part of the image is used


def test_relative_location_drops_colours() -> None:
    image = pictures(1, 60, torch.float32).expand(400, -1, -1, -1)
    first, second, _ = pretext.relative_location(image, range(400), patch=20, gap=8, jitter=2, downsample_p=0)
    both = torch.stack([first, second], dim=1)
    torch.testing.assert_close(both.square().mean(dim=(2, 3, 4)), torch.full((400, 2), 2500.0))
    deviation, mean = torch.std_mean(both, dim=(3, 4))
    ratio = deviation.sort(dim=2).values
    # One grey level of uniform noise against 256 of them.
    assert ((ratio[..., :2] / ratio[..., 2:] - 1 / 256).abs() < 0.15 / 256).all()
    kept = deviation.argmax(2)
    assert (torch.bincount(kept.flatten(), minlength=3) > 200).all() and (kept[:, 0] != kept[:, 1]).any()
    assert mean.abs().max() < 0.1  # 0.34/20 for the noise, the largest of 1600
    noise = both.gather(2, ((kept + 1) % 3)[:, :, None, None, None].expand(-1, -1, -1, 20, 20)).flatten(2)
    other = both.gather(2, ((kept + 2) % 3)[:, :, None, None, None].expand(-1, -1, -1, 20, 20)).flatten(2)
    every = F.normalize(torch.cat([noise, other], dim=1).flatten(0, 1), dim=1)
    assert (every @ every.T).fill_diagonal_(0).abs().max() < 0.4  # no noise twice


def test_relative_location_projection() -> None:
    image = pictures(3, 60, torch.float32)
    options = dict(patch=20, gap=8, jitter=2, downsample_p=0)
    kept, projected = (pretext.relative_location(image, range(3), colour=c, **options) for c in ("keep", "projection"))
    axis = torch.tensor([[-1.0, 2.0, -1.0]])
    expected = torch.einsum("dc,bchw->bdhw", torch.eye(3) - axis.T @ axis / (axis @ axis.T), kept.first)
    torch.testing.assert_close(F.normalize(projected.first.flatten(1)), F.normalize(expected.flatten(1)))


def test_relative_location_shrinks_and_resizes_back() -> None:
    patch = torch.rand(1, 3, 17, 17, dtype=torch.float64)
    sides = torch.tensor([1, 2, 5, 10, 16])
    matrix = _there_and_back(sides, 17)
    for m, side in zip(matrix, sides.tolist(), strict=True):
        small = F.interpolate(patch, size=side, mode="bilinear", align_corners=False)
        expected = F.interpolate(small, size=17, mode="bilinear", align_corners=False)
        torch.testing.assert_close(m @ patch @ m.T, expected, rtol=1e-9, atol=1e-9)
    task = pretext.RelativeLocation(patch=96)
    patches, edge = torch.rand(1, 2, 3, 96, 96), 1 - 2.0**-32
    shrunk = task._shrunk(patches, torch.zeros(1, 2), torch.tensor([[0.0, edge]], dtype=torch.float64))
    for i, side in enumerate((10, 94)):  # 100 pixels in all; just below 95²
        expected = F.interpolate(F.interpolate(patches[:, i], size=side, mode="bilinear"), size=96, mode="bilinear")
        torch.testing.assert_close(shrunk[:, i], expected, rtol=1e-4, atol=1e-5)
    image = pictures(1, 60, torch.float32).expand(1000, -1, -1, -1)
    options = dict(patch=20, gap=8, jitter=2, colour="keep")
    some, none = (pretext.relative_location(image, range(1000), downsample_p=p, **options) for p in (1 / 3, 0))
    changed = (some.first != none.first).flatten(1).any(1).double().mean()
    assert 0.28 < changed < 0.39


# ---- wrong input


@pytest.mark.parametrize(
    "name, call",
    [
        ("images", lambda: pretext.rotation(pictures(2)[..., :40])),
        ("images", lambda: pretext.rotation(pictures(2)[0])),
        ("images", lambda: pretext.rotation(pictures(2).long())),
        ("images", lambda: pretext.rotation(pictures(2).numpy())),
        ("ids", lambda: pretext.rotation(pictures(2), [1, 2, 3], all_four=False)),
        ("ids", lambda: pretext.rotation(pictures(2), torch.rand(2), all_four=False)),
        ("ids", lambda: pretext.rotation(pictures(2), [0.5, 1.5], all_four=False)),
        ("ids", lambda: pretext.rotation(pictures(2), [True, False], all_four=False)),
        ("ids", lambda: pretext.rotation(pictures(2), [2**63, 0], all_four=False)),
        ("ids", lambda: pretext.rotation(pictures(2), [2**64, 0], all_four=False)),
        ("epoch", lambda: pretext.rotation(pictures(2), epoch=-1, all_four=False)),
        ("images", lambda: pretext.jigsaw(pictures(2, 254))),
        ("images", lambda: pretext.jigsaw(pictures(2)[:, :2], **SMALL_PUZZLE)),
        ("tile", lambda: pretext.Jigsaw(tile=86)),
        ("grid", lambda: pretext.Jigsaw(grid=4)),
        ("permutations", lambda: pretext.Jigsaw(grid=2, permutations=25)),
        ("grey_p", lambda: pretext.Jigsaw(grey_p=float("nan"))),
        ("count", lambda: pretext.permutation_set(7, tiles=3)),
        ("tiles", lambda: pretext.permutation_set(7, tiles=10)),
        ("images", lambda: pretext.relative_location(pictures(2, 253))),
        ("images", lambda: pretext.relative_location(pictures(2)[:, :1], **SMALL_PAIR)),
        ("jitter", lambda: pretext.RelativeLocation(gap=12)),
        ("colour", lambda: pretext.RelativeLocation(colour="grey")),
        ("least_pixels", lambda: pretext.RelativeLocation(patch=10)),
    ],
)
def test_wrong_input_is_named(name: str, call: Callable[[], object]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name} must"):
        call()
