"""Masks of blocks: the same bits everywhere, and the distributions of the public Python generators."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sslfast
from augment_common import BACKENDS, KERNELS, device_of
from benchmarks import masks_peers
from sslfast import _native, masking
from sslfast.ops.block_mask import block_mask

pytestmark = pytest.mark.sanitize

SAMPLES = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**63 - 1, -1, -(2**63), 12345])
# Grids of one word a row, of exactly one, of several; blocks that never fit; more wanted than there is room for.
CASES: list[dict[str, Any]] = [
    {"grid": (14, 14), "count": 75, "area": (16, 75), "seed": -1, "epoch": 2**32 - 1, "view": 1023},
    {"grid": (14, 14), "count": 100.9, "area": (4, 98), "complete": True, "seed": 2**64 - 1},
    {"grid": (7, 64), "count": 200, "area": (4, 1e6), "complete": True, "epoch": 1},
    {"grid": (5, 131), "count": 300.5, "area": (9, 200), "aspect": (0.01, 0.2), "view": 5},
    {"grid": (33, 65), "count": 2145, "area": (0, 50), "complete": True, "seed": 2**63},
    {"grid": (129, 9), "count": 400, "area": (100, 90), "aspect": (5.0, 90.0)},
    {"grid": (1, 9), "count": 5, "area": (1, 9)},
    {"grid": (1, 9), "count": 5, "area": (1, 9), "complete": True},
    {"grid": (6, 6), "count": 0, "area": (4, 9), "complete": True},
    {"grid": (6, 6), "count": 36, "area": (0.1, 0.2), "aspect": (1.0, 1.0), "tries": 3},
    {"grid": (9, 11), "count": 41, "area": (4, 9), "tries": 0, "complete": True},
    {"grid": (1024, 128), "count": 9000, "area": (100, 2000), "complete": True},
]
MANY, FEW = 20_000, 1500
ASPECT = (0.3, 1 / 0.3)


def draw(backend: str, samples: Tensor, count: float | Tensor, **case: Any) -> Tensor:
    device = device_of(backend)
    case = {"aspect": ASPECT, **case}
    counts = count if isinstance(count, Tensor) else torch.full((len(samples),), count, dtype=torch.float64)
    with sslfast.use_backend(backend):
        mask = block_mask(samples.to(device), counts.double().to(device), **case)
    assert mask.dtype == torch.bool and mask.shape == (len(samples), math.prod(case["grid"]))
    return mask.cpu()


@pytest.mark.parametrize("case", CASES, ids=lambda case: "{0[0]}x{0[1]}".format(case["grid"]))
@pytest.mark.parametrize("backend", KERNELS)
def test_kernel_draws_the_references_bits(backend: str, case: dict[str, Any]) -> None:
    samples = SAMPLES if math.prod(case["grid"]) < 10_000 else SAMPLES[:2]
    mask = draw(backend, samples, **case)
    assert torch.equal(mask, draw("reference", samples, **case))
    masked = mask.sum(1)
    assert (masked == int(case["count"])).all() if case.get("complete") else (masked <= case["count"]).all()


def test_numpy_in_numpy_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the torch-free module, and from the reference where that is missing."""
    options = {"seed": -5, "epoch": 3, "view": 9}
    counts = [0, 10, 20.5, 117, 30, 40, 50, 60]
    for function in (
        lambda ids: masking.block_masks(ids, (9, 13), counts, complete=True, **options),
        lambda ids: masking.ibot_masks(ids, (9, 13), (0, 0.3), (0, 0.2), **options),
        lambda ids: masking.ibot_masks(ids, (9, 13), 0.5, 0.5, shape="random", **options),
        lambda ids: masking.dinov2_masks(ids, (9, 13), **options),
        lambda ids: masking.dinov3_masks(ids, (9, 13), circular_shift=True, **options),
    ):
        expected = function(SAMPLES)
        for host in (_native.host, None):
            with monkeypatch.context() as patch:
                patch.setattr(_native, "host", host)
                found = function(SAMPLES.numpy())
            pairs = [(found, expected)] if isinstance(expected, Tensor) else list(zip(found, expected, strict=True))
            for array, tensor in pairs:
                if isinstance(tensor, int):
                    assert array == tensor
                else:
                    assert isinstance(array, np.ndarray) and torch.equal(torch.from_numpy(array), tensor)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_depends_on_its_own_sample_and_count_alone(backend: str) -> None:
    samples, counts = torch.randint(2**63 - 1, (61,)), torch.randint(118, (61,))
    case = {"grid": (9, 13), "area": (4, 60), "complete": True}
    masks = draw(backend, samples, counts, **case)
    assert torch.equal(masks.sum(1), counts)
    parts = [draw(backend, s, c, **case) for s, c in zip(samples.split(17), counts.split(17), strict=True)]
    assert torch.equal(torch.cat(parts), masks)
    strided = torch.stack([samples, samples + 1], 1)[:, 0]
    assert torch.equal(draw(backend, strided, counts.flip(0).flip(0), **case), masks)
    assert draw(backend, samples[:0], counts[:0], **case).shape == (0, 117)
    keys = [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 1023)]
    three = torch.tensor([3, 3 + 2**32, 4])
    others = [draw(backend, three, 60, **case, seed=s, epoch=e, view=v) for s, e, v in keys]
    assert len(torch.cat(others).unique(dim=0)) == 18


# -------------------------------------------------------------------------------------------------------- distributions


def statistics(masks: np.ndarray, levels: list[float]) -> np.ndarray:
    """[images, numbers] of masks [images, height, width]: every patch, rows, columns, counts, edges, full squares."""
    m = masks.astype(float)
    count = m.sum((1, 2))
    edges = [np.abs(np.diff(m, axis=axis)).sum((1, 2)) for axis in (1, 2)]
    full = (m[:, 1:, 1:] * m[:, :-1, 1:] * m[:, 1:, :-1] * m[:, :-1, :-1]).sum((1, 2))
    below = [count <= level for level in levels]
    return np.column_stack([m.reshape(len(m), -1), m.sum(2), m.sum(1), count, count**2, *edges, full, *below])


def alike(ours: np.ndarray, theirs: np.ndarray) -> None:
    """The means of all statistics agree within 4.7 standard errors (a chance of about 1e-3 over a few hundred)."""
    levels = [float(np.quantile(theirs.sum((1, 2)), q)) for q in (0.02, 0.1, 0.3, 0.6)]
    a, b = statistics(ours, levels), statistics(theirs, levels)
    error = np.sqrt(a.var(0) * (1 / len(a) + 1 / len(b)) + 1e-12)
    z = np.abs(a.mean(0) - b.mean(0)) / error
    assert z.max() <= 4.7, (int(z.argmax()), z.max())


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("grid", "count", "least"), [((14, 14), 75, 16), ((9, 17), 70, 4), ((4, 5), 12, 3)])
def test_beits_distribution(backend: str, grid: tuple[int, int], count: int, least: int) -> None:
    theirs = masks_peers.beit_masks(FEW, grid, count, least)
    ours = draw(backend, torch.arange(MANY), count, grid=grid, area=(least, count)).numpy()
    alike(ours.reshape(-1, *grid), theirs)


@pytest.mark.parametrize("completed", [False, True])
def test_dinos_distribution(completed: bool) -> None:
    """Counts of the bins, half the patches at most a block; DINOv3's completion."""
    counts = np.linspace(0.1, 0.9, 50) * 14 * 14
    theirs = masks_peers.dinov2_masks(counts.astype(int).repeat(FEW // 50).tolist(), completed=completed)
    wanted = torch.from_numpy(counts.astype(int).repeat(MANY // 50))
    ours = draw("cpu", torch.arange(MANY), wanted, grid=(14, 14), area=(4, 98), complete=completed).numpy()
    alike(ours.reshape(-1, 14, 14), theirs)


def test_ibots_distribution() -> None:
    """A share uniform in 0.3 ± 0.2 for half the images, none for the others; its fraction raises the blocks' bound."""
    shares = [np.random.choice([0, np.random.uniform(0.1, 0.5)]) for _ in range(2 * FEW)]
    theirs = masks_peers.ibot_masks(shares, (10, 13))
    ours = masking.ibot_masks(torch.arange(MANY), (10, 13), (0, 0.3), (0, 0.2)).numpy()
    alike(ours.reshape(-1, 10, 13), theirs)
    fixed = masking.ibot_masks(torch.arange(MANY), (7, 7), 0.3)  # 14.7 patches, in blocks of 4 and more
    alike(fixed.numpy().reshape(-1, 7, 7), masks_peers.ibot_masks([0.3] * 2 * FEW, (7, 7)))
    random = masking.ibot_masks(torch.arange(MANY), (5, 6), 0.4, 0.1, shape="random").sum(1)
    assert random.min() == 9 and random.max() == 14 and (random.bincount()[9:] / MANY - 1 / 6).abs().max() < 0.015
    alike_places = masking.ibot_masks(torch.arange(MANY), (5, 6), 0.4, shape="random").double()
    assert (alike_places.sum(1) == 12).all()
    assert (alike_places.mean(0) - 0.4).abs().max() <= 4.5 * math.sqrt(0.24 / MANY)


# ------------------------------------------------------------------------------------------------------------ DINOv2, 3


def collated(masks: Tensor) -> tuple[Tensor, Tensor]:
    """``collate_data_and_cast``'s lines on a mask."""
    listed = masks.flatten().nonzero().flatten()
    return listed, (1 / masks.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(masks)[masks]


def check_collated(found: masking.PatchMasks, images: int, patches: int) -> None:
    """Shapes and lists, and one image in each bin between 0.1 and 0.5, in an order that is no order of the batch."""
    bounds = torch.linspace(0.1, 0.5, images // 2 + 1)
    assert found.upperbound == sum(int(patches * bound) for bound in bounds[1:])
    listed, weights = collated(found.collated_masks)
    n = len(listed)
    assert found.n_masked_patches.tolist() == [n] and n <= found.upperbound
    assert torch.equal(found.mask_indices_list, torch.cat([listed, torch.full((found.upperbound - n,), -1)]))
    assert torch.equal(found.masks_weight, torch.cat([weights, torch.zeros(found.upperbound - n)]))


def test_dinov2s_collation() -> None:
    found = masking.dinov2_masks(torch.arange(64), (14, 14))
    check_collated(found, 64, 196)
    counts = found.collated_masks.sum(1)
    assert ((counts > 0).sum() == 32) and found.n_masked_patches < found.upperbound
    again = masking.dinov2_masks(torch.arange(64), (14, 14), epoch=1)
    assert not torch.equal(counts > 0, again.collated_masks.sum(1) > 0)
    # The shares fill their bins: an image has at most the upper bound of its bin, and on average nearly the middle.
    four = torch.arange(4)
    masks = torch.stack([masking.dinov2_masks(four, (30, 30), epoch=e).collated_masks for e in range(300)])
    sums = masks.sum(2).sort(1).values.double()
    assert (sums[:, :2] == 0).all() and sums[:, 2].max() <= 270 and sums[:, 3].max() <= 450
    assert abs(sums[:, 2].mean() - 180) <= 12 and abs(sums[:, 3].mean() - 360) <= 15
    assert (masks.any(2).double().mean(0) - 0.5).abs().max() <= 4.5 * 0.5 / math.sqrt(300)


def test_dinov3s_counts_are_exact() -> None:
    for shift in (False, True):
        found = masking.dinov3_masks(torch.arange(64), (14, 14), circular_shift=shift)
        check_collated(found, 64, 196)
        assert found.n_masked_patches.item() == found.upperbound == len(found.mask_indices_list)
        expected = sorted([0] * 32 + [int(196 * b) for b in torch.linspace(0.1, 0.5, 33)[1:]])
        assert found.collated_masks.sum(1).sort().values.tolist() == expected
    still = masking.dinov3_masks(torch.arange(64), (5, 6)).collated_masks
    moved = masking.dinov3_masks(torch.arange(64), (5, 6), circular_shift=True).collated_masks
    shifts = set()
    for a, b in zip(still.reshape(64, 5, 6), moved.reshape(64, 5, 6), strict=True):
        found_shifts = [(i, j) for i in range(5) for j in range(6) if torch.equal(a.roll((i, j), (0, 1)), b)]
        assert found_shifts
        shifts.update(found_shifts if len(found_shifts) == 1 else [])
    assert len({i for i, _ in shifts}) == 5 and len({j for _, j in shifts}) == 6


def test_defaults_of_the_named_generators() -> None:
    ids = torch.arange(50)
    expected = draw("cpu", ids, 75, grid=(14, 14), area=(16, 75))
    assert torch.equal(masking.beit_masks(ids), expected)  # what is missing is the upper bound in either
    assert torch.equal(masking.block_masks(ids, (14, 14), [75] * 50, least=16), expected)
    assert torch.equal(masking.block_masks(ids, (14, 14), torch.full((50,), 75), least=16), expected)
    assert (masking.beit_masks(ids, complete=True).sum(1) == 75).all()
    assert len(masking.beit_masks(4).unique(dim=0)) == 4
    kept = sslfast.masking.Masks.from_mask(masking.beit_masks(ids, complete=True), 121)
    assert kept.ids_keep.shape == (50, 121)
    assert masking.dinov2_masks(0, (4, 4)).mask_indices_list.shape == (0,)


# ---------------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda m: m.block_masks(2, (14,), 5), ValueError, r"grid must be \(height, width\).*got \(14,\)"),
        (lambda m: m.block_masks(2, (1025, 4), 5), ValueError, "each from 1 to 1024.*1025, 4"),
        (lambda m: m.block_masks(2, (1024, 129), 5), ValueError, "at most 131072 patches"),
        (lambda m: m.block_masks(2, (0, 4), 5), ValueError, "grid must be"),
        (lambda m: m.block_masks(2, (4, 4), 17), ValueError, "counts must be between 0 and the 16 patches, got 17"),
        (lambda m: m.block_masks(np.arange(2), (4, 4), 17), ValueError, "counts must be between 0 and the 16.*17"),
        (lambda m: m.block_masks(2, (4, 4), math.nan), ValueError, "counts must be .*nan"),
        (lambda m: m.block_masks(2, (4, 4), [1, 2, 3]), ValueError, r"one of each of the 2 images, got \(3,\)"),
        (lambda m: m.block_masks(2, (4, 4), 3, least=-1), ValueError, "least and most must be between 0"),
        (lambda m: m.block_masks(2, (4, 4), 3, most=math.nan), ValueError, "least and most must be between 0"),
        (lambda m: m.block_masks(2, (4, 4), 3, aspect=(0, 1)), ValueError, "aspect must be two numbers between"),
        (lambda m: m.block_masks(2, (4, 4), 3, aspect=(1,)), ValueError, "aspect must be two numbers"),
        (
            lambda m: m.block_masks(2, (4, 4), 3, tries=-1),
            ValueError,
            "tries must be a whole number from 0 to .*, got -1",
        ),
        (lambda m: m.block_masks(np.arange(2), (4, 4), 3, view=-1), ValueError, "view must be a whole number"),
        (lambda m: m.ibot_masks(2, (4, 4), 0.3, 0.4), ValueError, "must lie between 0 and 1, got 0.3 ± 0.4"),
        (lambda m: m.ibot_masks(2, (4, 4), (0, 0.3), (0.0,)), ValueError, "one for each ratio"),
        (lambda m: m.ibot_masks(2, (4, 4), shape="rand"), ValueError, "shape must be 'block' or 'random', got 'rand'"),
        (lambda m: m.dinov2_masks(2, (4, 4), 1.5), ValueError, "probability must be between 0 and 1, got 1.5"),
        (lambda m: m.dinov2_masks(2, (4, 4), ratios=(0.5, 0.1)), ValueError, "two rising numbers"),
        (lambda m: m.dinov3_masks(2, (4, 4), view=1024), ValueError, "view must be a whole number from 0 to 1023"),
    ],
)
def test_wrong_input(function: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        function(masking)


def test_operator_checks_what_it_is_given() -> None:
    op, ids, counts = torch.ops.sslfast.block_mask, torch.arange(3), torch.ones(3, dtype=torch.float64)
    for changed, message in [
        ({0: ids.int()}, "samples must be Long"),
        ({1: counts.float()}, "counts must be Double"),
        ({1: counts[:2]}, "counts has an unexpected shape"),
        ({2: [4]}, "grid must have two numbers"),
        ({2: [4, 1025]}, "sides of the grid must be from 1 to 1024"),
        ({2: [1024, 1024]}, "at most 2\\^17 patches"),
        ({3: [4.0]}, "area must have two numbers"),
        ({3: [-1.0, 4.0]}, "areas must be from 0"),
        ({4: [math.nan, 0.0]}, "log_aspect must be between"),
    ]:
        arguments = [ids, counts, [4, 4], [1.0, 4.0], [-1.0, 1.0], 10, False, 0, 0, 0]
        for place, value in changed.items():
            arguments[place] = value
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)


@pytest.mark.parametrize("backend", KERNELS)
def test_torch_citizen(backend: str) -> None:
    device = device_of(backend)
    ids, counts = torch.arange(5, device=device), torch.full((5,), 9.0, dtype=torch.float64, device=device)
    torch.library.opcheck(
        torch.ops.sslfast.block_mask.default,
        (ids, counts, [4, 6], [2.0, 9.0], [-1.0, 1.0], 10, True, -1, 2**32 - 1, 3),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )

    def function(ids: Tensor) -> tuple[Tensor, ...]:
        found = masking.dinov2_masks(ids, (6, 7), seed=7)
        return found.collated_masks, found.mask_indices_list, found.masks_weight

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    with sslfast.use_backend(backend):
        assert all(torch.equal(a, b) for a, b in zip(compiled(ids), function(ids), strict=True))
