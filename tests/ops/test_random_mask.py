"""Random masks: the same bits everywhere, a stable sort of noise, exact counts, every patch equally likely."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sslfast
from augment_common import BACKENDS, KERNELS, device_of
from sslfast import _native, masking, reference
from sslfast.masking import Masks
from sslfast.ops.random_mask import random_mask

pytestmark = pytest.mark.sanitize

# (grid, unit, kept units): one cell, all or none kept, a block of keys cut short, tubes, cubes, more units than a
# histogram's digit or a GPU block's tile tells apart.
SHAPES: list[tuple[tuple[int, int, int], tuple[int, int, int], int]] = [
    ((1, 1, 1), (1, 1, 1), 1),
    ((1, 1, 7), (1, 1, 1), 0),
    ((1, 1, 7), (1, 1, 1), 7),
    ((1, 14, 14), (1, 1, 1), 49),
    ((1, 37, 53), (1, 1, 1), 1000),
    ((3, 5, 4), (3, 1, 1), 7),
    ((4, 6, 10), (2, 3, 5), 3),
    ((1, 12, 8), (1, 2, 4), 5),
]
KEYS = [(0, 0, 0), (-1, 2**32 - 1, 1023), (2**64 - 1, 7, 1), (-(2**63), 0, 512)]
SAMPLES = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**63 - 1, -1, -(2**63), 12345])
MANY = 20_000


def draw(backend: str, samples: Tensor, *arguments: Any, noise: Tensor | None = None, **options: Any) -> list[Tensor]:
    device = device_of(backend)
    with sslfast.use_backend(backend):
        noise = noise if noise is None else noise.to(device)
        arrays = random_mask(samples.to(device), *arguments, noise=noise, **options)
    return [a.cpu() for a in arrays]


def same(found: Any, expected: Any) -> None:
    for mine, true in zip(found, expected, strict=True):
        assert mine.dtype == true.dtype and mine.shape == true.shape
        assert bool((mine == true).all())


@pytest.mark.parametrize("ascending", [True, False])
@pytest.mark.parametrize("backend", KERNELS)
def test_kernel_draws_the_references_bits(backend: str, ascending: bool) -> None:
    for (grid, unit, kept), i in zip(SHAPES, range(100), strict=False):
        seed, epoch, view = KEYS[i % len(KEYS)]
        options = {"unit": unit, "ascending": ascending, "seed": seed, "epoch": epoch, "view": view}
        same(draw(backend, SAMPLES, grid, kept, **options), draw("reference", SAMPLES, grid, kept, **options))


@pytest.mark.parametrize("ascending", [True, False])
def test_numpy_in_numpy_out(ascending: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the torch-free module, and from the reference where that is missing."""
    order = "raster" if ascending else "noise"
    ids, noise = SAMPLES.numpy(), np.random.rand(len(SAMPLES), 240).astype(np.float32)
    for options in ({"seed": -5, "epoch": 3, "view": 9}, {"noise": noise}):
        tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
        expected = masking.random_masks(SAMPLES, (4, 6, 10), order=order, **tensors)
        for host in (_native.host, None):
            with monkeypatch.context() as patch:
                patch.setattr(_native, "host", host)
                found = masking.random_masks(ids, (4, 6, 10), order=order, **options)
            assert isinstance(found.ids_keep, np.ndarray) and found.mask.dtype == bool
            same(dataclasses.astuple(found.to("cpu")), dataclasses.astuple(expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_is_sorted_as_by_a_stable_argsort(backend: str) -> None:
    """Ties, both zeros, infinities and NaN among them; ids_restore is the argsort of the argsort."""
    for units, kept in ((1, 1), (196, 49), (1333, 1000)):
        noise = (torch.rand(20, units) * 100 - 50).round() / 8
        some = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 1e-45, -1e-45])
        noise = torch.where(torch.rand(20, units) < 0.3, some[torch.randint(8, (20, units))], noise)
        samples = torch.arange(20)
        shuffle = torch.argsort(noise, dim=1, stable=True)
        keep, masked, restore = draw(backend, samples, (1, 1, units), kept, noise=noise, ascending=False)
        same([torch.cat([keep, masked], 1), restore], [shuffle, torch.argsort(shuffle, dim=1)])
        keep, masked, restore = draw(backend, samples, (1, 1, units), kept, noise=noise.half().t().contiguous().t())
        shuffle = torch.argsort(noise.half().float(), dim=1, stable=True)
        same([keep, masked], [shuffle[:, :kept].sort(1)[0], shuffle[:, kept:].sort(1)[0]])
        same([restore], [torch.argsort(torch.cat([keep, masked], 1), dim=1)])


@pytest.mark.parametrize("equal", [1, 300])
def test_equal_keys_go_by_number(equal: int) -> None:
    """Keys that are told apart by their last bits alone, or by none: every digit of the selection is reached."""
    noise = torch.full((3, 300), 1.0).view(torch.int32)
    noise = (noise + torch.stack([torch.randperm(300) for _ in range(3)]).int() // equal).view(torch.float32)
    for kept in (0, 1, 299, 300, 150):
        shuffle = torch.argsort(noise, dim=1, stable=True)
        keep, masked, _ = draw("cpu", torch.arange(3), (1, 1, 300), kept, noise=noise)
        same([keep, masked], [shuffle[:, :kept].sort(1)[0], shuffle[:, kept:].sort(1)[0]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_depends_on_its_own_sample_alone(backend: str) -> None:
    samples = torch.randint(2**63 - 1, (201,))
    for options in ({}, {"unit": (1, 2, 7), "ascending": False}):
        kept = 49 if not options else 3
        rows = draw(backend, samples, (1, 14, 14), kept, **options)
        parts = [draw(backend, part, (1, 14, 14), kept, **options) for part in samples.split(67)]
        same([torch.cat(p) for p in zip(*parts, strict=True)], rows)
        strided = torch.stack([samples, samples + 1], 1)[:, 0]
        same(draw(backend, strided, (1, 14, 14), kept, **options), rows)
        empty = draw(backend, samples[:0], (1, 14, 14), kept, **options)
        assert [a.shape for a in empty] == [(0, *a.shape[1:]) for a in rows]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_part_of_the_key_counts(backend: str) -> None:
    samples = torch.tensor([3, 3 + 2**32, 4])
    keys = [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 1023)]
    names = ("seed", "epoch", "view")
    rows = [draw(backend, samples, (1, 1, 64), 32, **dict(zip(names, key, strict=True)))[0] for key in keys]
    assert len(torch.cat(rows).unique(dim=0)) == 18


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_patch_and_every_pair_is_equally_likely(backend: str) -> None:
    """Of 12 patches 3 are kept: each in 1/4 of the masks, each pair in 1/22, and first by rank in 1/12."""
    samples = torch.arange(MANY)
    keep = draw(backend, samples, (1, 3, 4), 3, ascending=False)[0]
    kept = torch.zeros(MANY, 12, dtype=torch.float64).scatter_(1, keep, 1.0)
    for share, p in ((kept.mean(0), 1 / 4), (keep[:, 0].bincount(minlength=12) / MANY, 1 / 12)):
        assert (share - p).abs().max() <= 4.5 * math.sqrt(p * (1 - p) / MANY)
    pairs = (kept.T @ kept / MANY)[~torch.eye(12, dtype=torch.bool)]
    assert (pairs - 1 / 22).abs().max() <= 4.5 * math.sqrt(1 / 22 / MANY)


def check(masks: Masks, length: int, masked: int) -> Tensor:
    """Both lists together are all patches, and restore leads back; returns the mask."""
    assert masks.ids_keep.shape[1] == length - masked and masks.ids_mask.shape[1] == masked
    both = torch.cat([masks.ids_keep, masks.ids_mask], 1)
    assert torch.equal(both.gather(1, masks.ids_restore), torch.arange(length).expand_as(both))
    expected = torch.zeros_like(both, dtype=torch.bool).scatter_(1, masks.ids_mask, True)
    assert torch.equal(masks.mask, expected)
    return expected


def test_named_masks_have_the_published_counts() -> None:
    mask = check(masking.random_masks(5, (14, 14)), 196, 147)
    assert len(mask.unique(dim=0)) == 5  # numbers of their own where there are no ids
    check(masking.random_masks(torch.arange(5), 50, 0.9), 50, 46)  # int(50 · (1 − 0.9)) = 4 in floating point
    check(masking.random_masks([7, 8], (2, 3, 5), 0.5), 30, 15)
    tubes = check(masking.tube_masks([1, 2], (8, 14, 14)), 8 * 196, 8 * 176)
    assert torch.equal(tubes.reshape(2, 8, 196), tubes[:, None, :196].expand(2, 8, 196))
    units = check(masking.grid_masks([1, 2], (48, 48), unit=8), 48 * 48, 22 * 64)  # ⌈0.6 · 36⌉ = 22
    units = units.reshape(2, 6, 8, 6, 8)
    assert torch.equal(units, units[:, :, :1, :, :1].expand_as(units))
    check(masking.grid_masks([1], (6, 4), 0.5, (3, 1)), 24, 12)


def test_masks_from_a_mask() -> None:
    masks = masking.random_masks(torch.arange(6), (5, 7), 0.3)
    for mask in (masks.mask, masks.mask.t().contiguous().t(), masks.mask.repeat(1, 2)[:, :35]):
        same(dataclasses.astuple(Masks.from_mask(mask)), dataclasses.astuple(masks))
    with sslfast.use_backend("reference"):
        same(dataclasses.astuple(Masks.from_mask(masks.mask, 24)), dataclasses.astuple(masks))
    array = Masks.from_mask(masks.mask.numpy())
    same(dataclasses.astuple(array.to("cpu")), dataclasses.astuple(masks))
    assert Masks.from_mask(masks.mask[:0], 24).ids_mask.shape == (0, 11)
    broken = masks.mask.clone()
    broken[4] = True
    for mask in (broken, broken.numpy()):
        with pytest.raises(RuntimeError, match="same number of patches in every row, 24, but row 4 keeps 0"):
            Masks.from_mask(mask)
    with pytest.raises(ValueError, match="kept must be given for a mask of no images"):
        Masks.from_mask(masks.mask[:0])
    with pytest.raises(ValueError, match="kept must be a whole number from 0 to the 35 patches, got 36"):
        Masks.from_mask(masks.mask, 36)
    for wrong in (masks.mask.float(), masks.mask[0], masks.mask.numpy().astype(float)):
        with pytest.raises(TypeError, match=r"mask must be \[images, patches\] of bool"):
            Masks.from_mask(wrong)


def test_operators_check_what_they_are_given() -> None:
    """Called without the public functions, with arguments that would read or write out of bounds."""
    op, ids = torch.ops.sslfast.random_mask, torch.arange(3)
    for arguments, message in [
        ((ids, None, [1, 4], [1, 1], 1), "three numbers each"),
        ((ids, None, [1, 4, 4], [1, 3, 1], 1), "unit must divide grid"),
        ((ids, None, [1, 4, 4], [1, 1, 1], 17), "kept must be between"),
        ((ids, None, [2**16, 2**16, 4], [1, 2**16, 4], 1), "fewer than 2\\^31 cells"),
        ((ids, None, [1, 2**10, 2**10], [1, 1, 1], 1), "at most 2\\^18 units"),
        ((ids, torch.zeros(3, 15), [1, 4, 4], [1, 1, 1], 1), "noise has an unexpected shape"),
        ((ids.int(), None, [1, 4, 4], [1, 1, 1], 1), "samples must be Long"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            op(*arguments, True, 0, 0, 0)
    with pytest.raises(ValueError, match="at most 2\\^18 units"):
        _native.host.random_mask(ids.numpy(), [1, 2**10, 2**10], 1, [1, 1, 1], None, True, 0, 0, 0)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda m: m.random_masks(-1, 4), ValueError, "samples must be .*got -1"),
        (lambda m: m.random_masks(True, 4), TypeError, "samples must be a number of images or a vector.*got bool"),
        (lambda m: m.random_masks([0.5], 4), TypeError, "whole numbers below 2\\^63, got torch.float64"),
        (lambda m: m.random_masks(np.ones((2, 2), int), 4), TypeError, r"samples must be a vector.*\(2, 2\)"),
        (lambda m: m.random_masks(np.ones(2, int), 4, device="cpu"), TypeError, "device is for tensors"),
        (lambda m: m.random_masks(np.full(2, 2**63, np.uint64), 4), ValueError, "below 2\\^63"),
        (lambda m: m.random_masks(2, 4, 1.5), ValueError, "ratio must be between 0 and 1, got 1.5"),
        (lambda m: m.random_masks(2, 4, math.nan), ValueError, "ratio must be"),
        (lambda m: m.random_masks(2, (4, 2.5)), ValueError, r"grid must be a length or .*got \(4, 2.5\)"),
        (lambda m: m.random_masks(2, (4, 0)), ValueError, "grid must have sides of at least 1"),
        (lambda m: m.random_masks(2, 2**18 + 1), ValueError, "at most 262144 units, got 262145"),
        (lambda m: m.random_masks(2, 4, order="random"), ValueError, "order must be 'raster' or 'noise'"),
        (lambda m: m.random_masks(2, 4, noise=torch.rand(2, 5)), ValueError, r"noise must be \[2, 4\].*\(2, 5\)"),
        (lambda m: m.random_masks(2, 4, noise=torch.rand(2, 4).double()), TypeError, "noise must be float32"),
        (lambda m: m.random_masks(2, 4, noise=np.ones((2, 4))), TypeError, "noise must be a torch.Tensor"),
        (lambda m: m.random_masks(np.arange(2), 4, noise=np.ones((2, 4))), TypeError, "of float32.*float64"),
        (lambda m: m.random_masks(2, 4, seed=2**64), ValueError, "seed must be a 64-bit whole number"),
        (lambda m: m.random_masks(2, 4, epoch=2**32), ValueError, "epoch must be a whole number from 0 to"),
        (lambda m: m.random_masks(2, 4, view=1024), ValueError, "view must be a whole number from 0 to 1023, got 1024"),
        (
            lambda m: m.random_masks(np.arange(2), 4, view=1024),
            ValueError,
            "view must be a whole number from 0 to 1023",
        ),
        (lambda m: m.tube_masks(2, (4, 4)), ValueError, r"grid must be \(time, height, width\), got \(4, 4\)"),
        (lambda m: m.grid_masks(2, (4, 6), unit=4), ValueError, r"unit must divide the grid \(1, 4, 6\)"),
        (lambda m: m.grid_masks(2, (4, 6), unit=(1, 2, 3)), ValueError, "unit must be a side or"),
        (
            lambda m: random_mask([1], (1, 1, 4), 2),
            TypeError,
            "samples must be a vector of int64, got list",
        ),
        (
            lambda m: random_mask(torch.ones(1, dtype=torch.int64), (1, 1, 4), 5),
            ValueError,
            "kept must be .* 5",
        ),
    ],
)
def test_wrong_input(function: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        function(masking)


@pytest.mark.parametrize("backend", KERNELS)
def test_torch_citizen(backend: str) -> None:
    device = device_of(backend)
    ids, noise = torch.arange(5, device=device), torch.rand(5, 6, device=device)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for arguments in [(ids, None, [2, 3, 4], [1, 3, 2], 2, True), (ids, noise, [1, 2, 3], [1, 1, 1], 2, False)]:
        op = torch.ops.sslfast.random_mask.default
        torch.library.opcheck(op, (*arguments, -1, 2**32 - 1, 3), test_utils=tests)

    def function(ids: Tensor) -> tuple[Tensor, Tensor]:
        masks = Masks.from_mask(masking.random_masks(ids, (4, 6), seed=7).mask, 6)
        return masks.ids_keep, masks.mask

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    with sslfast.use_backend(backend):
        same(compiled(ids), function(ids))


def test_reference_shares_no_code_with_the_kernels() -> None:
    """The keys are the published generator's: word u mod 4 of block ⌊u / 4⌋ of stream 2^15 + 2^10 + view."""
    from sslfast.reference.philox import philox4x32

    words = [philox4x32((b | (2**15 + 2**10 + 3) << 16, 5, 77, 0), (9, 0)) for b in range(3)]
    keys = np.array([int(word) for block in words for word in block])[:10]
    keep = reference.random_mask(np.array([77]), (1, 2, 5), 4, ascending=False, seed=9, epoch=5, view=3)[0]
    assert keep[0].tolist() == np.argsort(keys).tolist()[:4]
