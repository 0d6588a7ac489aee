"""I-JEPA's masks: the same bits on every path, upstream's algorithm, whole blocks, contexts without targets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sslfast
from sslfast import masking
from sslfast.masking import multiblock
from sslfast.ops.multiblock_mask import multiblock_mask
from sslfast.reference.philox import philox4x32

pytestmark = pytest.mark.sanitize

BACKENDS = ["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GRID = (14, 14)


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def draw(backend: str, samples: Tensor, grid: tuple[int, int] = GRID, **options: Any) -> masking.MultiBlockMasks:
    with sslfast.use_backend(backend):
        masks = masking.multiblock_masks(samples.to(device_of(backend)), grid, **options)
    return masking.MultiBlockMasks(*(t.cpu() for t in masks))


def same(a: masking.MultiBlockMasks, b: masking.MultiBlockMasks) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def some_samples(count: int) -> Tensor:
    extremes = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**63 - 1, -1, -(2**63)])
    return torch.cat([extremes, torch.randint(2**63 - 1, (count,))])


def covered(ids: Tensor, patches: int) -> Tensor:
    """[..., L] bool from [..., K] ids."""
    return torch.zeros(*ids.shape[:-1], patches, dtype=torch.bool).scatter_(-1, ids, True)


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "upstream": {"upstream": True},
    "upstream, hard to place": {"upstream": True, "context_scale": (0.2, 0.3), "target_scale": (0.25, 0.3)},
    "overlap": {"allow_overlap": True},
    "upstream, overlap": {"upstream": True, "allow_overlap": True},
    "fixed size": {"context_size": 25},
    "fixed size, small block": {"context_size": 50, "context_scale": (0.1, 0.2), "targets": 2, "min_keep": 0},
    "overlap, fixed size": {"context_size": 190, "allow_overlap": True},
    "redrawn to the end": {"min_keep": 100, "targets": 6},
    "one target": {"targets": 1},
}


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("case", CASES)
def test_kernel_draws_the_references_bits(case: str, backend: str) -> None:
    samples = some_samples(40)
    grids = [GRID, (14, 14), (9, 23), (16, 16)]
    for grid, seed, view in zip(grids, (0, -1, 2**64 - 1, 2**32), (0, 1, 1023, 512), strict=True):
        options = {**CASES[case], "seed": seed, "epoch": 2**32 - 1, "view": view, "step": 2**63 + view}
        expected = draw("reference", samples, grid, **options)
        assert same(draw(backend, samples, grid, **options), expected), (grid, seed)
        host = masking.multiblock_masks(samples.numpy(), grid, **options)
        for mine, theirs in zip(host, expected, strict=True):
            assert isinstance(mine, np.ndarray) and np.array_equal(mine, theirs.numpy())


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_large_and_narrow_grids(backend: str) -> None:
    for grid, target, context, kept in [
        ((64, 64), (25, 31), (60, 64), 900),
        ((3, 200), (2, 40), (3, 180), 300),
        ((1, 1), (1, 1), (1, 1), 1),  # nothing is left: −1
        ((80, 70), (80, 35), (80, 70), 3000),  # too few are left where the targets lie apart: −1 at the end
    ]:
        results, samples = [], some_samples(5)
        for name in ("reference", backend):
            on_device = samples.to(device_of(name))
            with sslfast.use_backend(name):
                results.append([t.cpu() for t in multiblock_mask(on_device, grid, 2, target, context, kept)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), grid
        short = (results[0][0] == -1).any()
        assert short == (grid in ((1, 1), (80, 70)))


# --------------------------------------------------------------------------------------------- facebookresearch/ijepa


def upstream_masks(
    count: int,
    grid: tuple[int, int],
    rand: Callable[[], float],
    randint: Callable[[int], int],
    begin: Callable[[int, int | None], None],
    targets: int,
    scales: list[tuple[float, float]],
    aspect: tuple[float, float],
    min_keep: int,
    allow_overlap: bool,
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """What ``MaskCollator`` of ``src/masks/multiblock.py`` does, step by step, with the random numbers given to it.

    ``begin(b, t)`` is told whose numbers are next: target t of image b, or its context (``None``).
    """
    height, width = grid

    def block_size(scale: tuple[float, float], ratio: tuple[float, float]) -> tuple[int, int]:
        number = rand()
        patches = int(height * width * (scale[0] + number * (scale[1] - scale[0])))
        aspect = ratio[0] + number * (ratio[1] - ratio[0])
        h, w = int(round(math.sqrt(patches * aspect))), int(round(math.sqrt(patches / aspect)))
        while h >= height:
            h -= 1
        while w >= width:
            w -= 1
        return h, w

    def block(size: tuple[int, int], regions: list[np.ndarray] | None) -> tuple[list[int], np.ndarray]:
        relaxed, left = 0, 20
        while True:
            top = randint(height - size[0])
            start = randint(width - size[1])
            mask = np.zeros(grid, dtype=int)
            mask[top : top + size[0], start : start + size[1]] = 1
            complement = 1 - mask
            if regions is not None:
                for k in range(max(len(regions) - relaxed, 0)):
                    mask = mask * regions[k]
            ids = np.flatnonzero(mask).tolist()
            if len(ids) > min_keep:
                return ids, complement
            left -= 1
            if left == 0:
                relaxed, left = relaxed + 1, 20

    target_size = block_size(scales[0], aspect)
    context_size = block_size(scales[1], (1.0, 1.0))
    contexts, all_targets, shortest = [], [], height * width
    for b in range(count):
        of_image, regions = [], []
        for t in range(targets):
            begin(b, t)
            ids, region = block(target_size, None)
            of_image.append(ids)
            regions.append(region)
        begin(b, None)
        ids, _ = block(context_size, None if allow_overlap else regions)
        shortest = min(shortest, len(ids))
        contexts.append(ids)
        all_targets.append(of_image)
    return [ids[:shortest] for ids in contexts], all_targets


@pytest.mark.parametrize("case", [case for case in CASES if "upstream" in case])
def test_upstream_is_facebooks_algorithm(case: str) -> None:
    """Its masks, given our random numbers in the order in which it asks for them."""
    samples, grid = list(range(60)), (14, 15)
    options = {"targets": 4, "target_scale": (0.15, 0.2), "context_scale": (0.85, 1.0), **CASES[case]}
    seed, epoch, view = 11, 3, 2
    retries = []
    for step in range(4):

        def words(sample: int, stream: int, block: int) -> list[int]:
            counter = (block | ((1 << 15) + (stream << 10) + view) << 16, epoch, sample, 0)
            return [int(word) for word in philox4x32(counter, (seed, 0))]

        of_batch = iter([0, 2])
        state: dict[str, Any] = {}

        def begin(b: int, t: int | None, state: dict[str, Any] = state) -> None:
            state.update(sample=samples[b], block=1024 if t is None else t, next=0)

        def randint(n: int, state: dict[str, Any] = state) -> int:
            word = words(state["sample"], 3, state["block"])[state["next"]]  # noqa: B023 (called before the next step)
            state["block"] += state["next"]
            state["next"] = 1 - state["next"]
            retries.append(state["block"])
            return word * n >> 32

        def rand(step: int = step, numbers: Any = of_batch) -> float:
            return words(step, 7, 0)[next(numbers)] * 2.0**-32  # noqa: B023

        contexts, targets = upstream_masks(
            *(len(samples), grid, rand, randint, begin, options["targets"]),
            *([options["target_scale"], options["context_scale"]], (0.75, 1.5), 10),
            options.get("allow_overlap", False),
        )
        for backend in ("cpu", "reference"):
            masks = draw(backend, torch.tensor(samples), grid, seed=seed, epoch=epoch, view=view, step=step, **options)
            assert masks.context.tolist() == contexts
            assert masks.targets.transpose(0, 1).tolist() == targets
    if "hard" in case:
        assert max(retries) >= 1024 + 20, "the case was meant to give up targets"


# ------------------------------------------------------------------------------------------------ the corrected form


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_are_blocks_and_lie_everywhere_equally_often(backend: str) -> None:
    samples = torch.arange(200)
    sizes = set()
    for step in range(6):
        targets = draw(backend, samples, step=step).targets
        top, left = targets[..., 0] // 14, targets[..., 0] % 14
        height = int(targets[0, 0, -1] // 14 - top[0, 0]) + 1
        width = targets.shape[2] // height
        sizes.add((height, width))
        block = (torch.arange(height)[:, None] * 14 + torch.arange(width)).reshape(-1)
        assert torch.equal(targets, targets[..., :1] + block)
        assert 0.75 - 0.35 < height / width < 1.5 + 0.5 and 0.15 - 0.03 < height * width / 196 < 0.2 + 0.03
        for corner, places in ((top, 14 - height + 1), (left, 14 - width + 1)):
            counts = torch.bincount(corner.reshape(-1), minlength=places).double()
            assert len(counts) == places and counts.min() > 0  # the last row and column too
            expected = corner.numel() / places
            assert ((counts - expected) ** 2 / expected).sum() < places - 1 + 5 * math.sqrt(2 * places) + 8
    assert len(sizes) > 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_contexts_avoid_targets_and_are_thinned_evenly(backend: str) -> None:
    samples = torch.arange(400)
    for options in ({}, {"context_size": 25}, {"context_size": 28, "context_scale": (0.15, 0.3)}):
        masks = draw(backend, samples, seed=4, **options)
        targets, context = covered(masks.targets, 196), masks.context
        assert (context[:, 1:] > context[:, :-1]).all() and context.min() >= 0 and context.max() < 196
        inside = covered(context, 196)
        assert not (inside & targets.any(0)).any()
        assert context.shape[1] == options.get("context_size", context.shape[1]) >= 10
        # Rows and columns that mirror each other are equally often in the context; truncation would empty the bottom.
        often = inside.double().mean(0).reshape(14, 14)
        for lines in (often.sum(0), often.sum(1)):
            assert (lines - lines.flip(0)).abs().max() < 0.13 * lines.mean() * 2, options
    assert draw(backend, samples, allow_overlap=True).context.shape[1] in (169, 196)


def test_completion_takes_from_the_block_first() -> None:
    """A context shorter than asked for keeps all of its own patches; a longer one has no others."""
    arguments = (torch.arange(200), GRID, 2, (4, 4), (7, 7))
    (_, _, counts), (context, targets, _) = (multiblock_mask(*arguments, kept, min_keep=0) for kept in (0, 40))
    assert counts.min() < 40 < counts.max()
    whole = covered(multiblock_mask(*arguments, 164, min_keep=0)[0].clamp_min(0), 196)
    for b in range(200):
        own = multiblock_mask(torch.tensor([b]), *arguments[1:], int(counts[b]), min_keep=0)[0]
        assert len(own[0]) == counts[b] and own.min() >= 0
        rows, columns = own[0] // 14, own[0] % 14
        assert rows.max() - rows.min() < 7 and columns.max() - columns.min() < 7  # within one block
        first, second = (set(context[b].tolist()), set(own[0].tolist()))
        assert first <= second if len(first) <= len(second) else second <= first
        assert not first & set(targets[:, b].reshape(-1).tolist()) and whole[b].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_short_contexts_are_drawn_anew(backend: str) -> None:
    """With a small block and no other attempt, many contexts would have fewer than 20 patches."""
    arguments = (torch.arange(300, device=device_of(backend)), GRID, 3, (6, 6), (6, 6), 0)
    with sslfast.use_backend(backend):
        # The last number cannot be reached, so the best of all attempts stays.
        first, again, best = (multiblock_mask(*arguments, min_keep=least)[2] for least in (0, 20, 40))
    assert (best >= again).all() and (best > first).any()
    assert (first < 20).double().mean() > 0.3
    assert (again < 20).double().mean() < 0.1 and (again >= first).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_depends_on_itself_alone(backend: str) -> None:
    samples = torch.randint(2**63 - 1, (50,))
    options = {"context_size": 25, "seed": 9}
    whole = draw(backend, samples, **options)
    order = torch.randperm(50)
    for some in (order, order[:1], order[11:40]):
        part = draw(backend, samples[some], **options)
        assert torch.equal(part.context, whole.context[some]) and torch.equal(part.targets, whole.targets[:, some])
    strided = torch.stack([samples, samples + 1], 1)[:, 0]
    assert same(draw(backend, strided, **options), whole)
    for key in ({"seed": 1}, {"epoch": 1}, {"view": 1}):
        other = draw(backend, samples, **{**options, **key})
        assert not torch.equal(other.context, whole.context)
    empty = draw(backend, samples[:0])
    assert empty.context.shape[0] == 0 and empty.targets.shape[:2] == (4, 0)
    torch.manual_seed(1)
    one, two = (masking.multiblock_masks(50, GRID, context_size=25) for _ in range(2))
    assert one.context.shape == (50, 25) and not same(one, two)


def test_numpy_without_the_host_module(monkeypatch: pytest.MonkeyPatch) -> None:
    with_host = masking.multiblock_masks(np.arange(6), GRID)
    monkeypatch.setattr(multiblock._native, "host", None)
    without = masking.multiblock_masks(np.arange(6), GRID)
    assert all(np.array_equal(a, b) for a, b in zip(with_host, without, strict=True))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_opcheck_and_compile(backend: str) -> None:
    samples = torch.arange(5, device=device_of(backend))
    for upstream in (False, True):
        torch.library.opcheck(
            torch.ops.sslfast.multiblock_mask.default,
            (samples, [9, 10], 3, [4, 3], [7, 7], 20, 5, False, upstream, -1, 7, 3),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )

    def function(samples: Tensor) -> tuple[Tensor, Tensor]:
        masks = masking.multiblock_masks(samples, GRID, context_size=20, seed=7)
        return masks.context, masks.targets

    with sslfast.use_backend(backend):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert all(torch.equal(a, b) for a, b in zip(compiled(samples), function(samples), strict=True))


@pytest.mark.parametrize(
    ("samples", "options", "error", "message"),
    [
        ("many", {}, TypeError, "ids must be|samples must be"),
        (1.5, {}, TypeError, "samples must be a number of images or a vector of ids, got float"),
        (-1, {}, ValueError, "samples must be a number of images or their ids, got -1"),
        (torch.ones(2, 2, dtype=torch.int64), {}, TypeError, "samples must be a vector of whole numbers, got shape"),
        (np.ones(2), {}, TypeError, "samples must be a vector of whole numbers"),
        (2, {"grid": (14,)}, ValueError, r"grid must be \(height, width\) or the side of a square, got \(14,\)"),
        (2, {"grid": (0, 14)}, ValueError, "grid's patches must be a whole number from 1"),
        (2, {"grid": (2**9, 2**9)}, ValueError, "grid's patches must be a whole number from 1 to 131072, got 262144"),
        (2, {"targets": 0}, ValueError, "targets must be a whole number from 1 to 256, got 0"),
        (2, {"target_scale": (0.2, 0.1)}, ValueError, "target_scale must be 0 < low <= high <= 1, got "),
        (2, {"context_scale": (0.2, 1.1)}, ValueError, "context_scale must be 0 < low <= high <= 1, got "),
        (2, {"target_aspect": (0.0, 1.0)}, ValueError, "target_aspect must be 0 < low <= high, got "),
        (2, {"context_size": 60}, ValueError, "context_size must be from 1 to 28, which targets always .* got 60"),
        (2, {"context_size": 9, "upstream": True}, ValueError, "context_size must be None with upstream=True, got 9"),
        (2, {"min_keep": 60, "upstream": True}, ValueError, r"more than min_keep = 60 patches, and .* never have"),
        (2, {"min_keep": 197}, ValueError, "min_keep must be a whole number from 0 to 196, got 197"),
        (9, {"targets": 64, "target_scale": (0.9, 0.9)}, ValueError, "no patch of 14 × 14 is left for the context"),
        (2, {"step": -1}, ValueError, "step must be"),
        (2, {"seed": 2**64}, ValueError, "seed must be a 64-bit whole number"),
        (2, {"epoch": 2**32}, ValueError, "epoch must be"),
        (2, {"view": 1024}, ValueError, "view must be a whole number from 0 to 1023, got 1024"),
    ],
)
def test_wrong_input(samples: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    options = {"grid": GRID, **options}
    with pytest.raises(error, match=message):
        masking.multiblock_masks(samples, options.pop("grid"), **options)


def test_largest_target_is_reached_and_not_passed() -> None:
    for grid, scale, aspect in [
        (GRID, (0.15, 0.2), (0.75, 1.5)),
        ((7, 31), (0.1, 0.5), (0.3, 3.0)),
        ((1, 9), (1, 1), (1, 1)),
    ]:
        sizes = [
            h * w
            for s in np.linspace(*scale, 60)
            for h, w in (multiblock._block(grid, float(s), float(r), False) for r in np.linspace(*aspect, 400))
        ]
        assert max(sizes) == multiblock._largest_target(grid, scale, aspect)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_operator_checks_what_it_is_given(backend: str) -> None:
    samples = torch.arange(2, device=device_of(backend))
    for grid, targets, target, context, kept in [
        ([14], 1, [2, 2], [2, 2], 1),
        ([14, 14], 0, [2, 2], [2, 2], 1),
        ([14, 14], 257, [2, 2], [2, 2], 1),
        ([14, 14], 1, [15, 2], [2, 2], 1),
        ([14, 14], 1, [2, 2], [2, 0], 1),
        ([14, 14], 1, [2, 2], [2, 2], 197),
        ([2**40, 2**40], 1, [2, 2], [2, 2], 1),
    ]:
        with pytest.raises(RuntimeError, match="multiblock_mask: grid and blocks"):
            torch.ops.sslfast.multiblock_mask(samples, grid, targets, target, context, kept, 0, False, False, 0, 0, 0)
    with pytest.raises(RuntimeError, match="samples must be Long, got Int"):
        torch.ops.sslfast.multiblock_mask(samples.int(), [4, 4], 1, [2, 2], [2, 2], 1, 0, False, False, 0, 0, 0)
    with pytest.raises(ValueError, match="target_block must be from 1 × 1 to 14 × 14, got 15 × 2"):
        multiblock_mask(samples, GRID, 1, (15, 2), (2, 2), 1)
    with pytest.raises(TypeError, match="samples must be a vector of int64"):
        multiblock_mask(samples.int(), GRID, 1, (2, 2), (2, 2), 1)
