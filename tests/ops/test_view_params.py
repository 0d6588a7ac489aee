"""Sampling of view parameters: the published random numbers, the same bits everywhere, torchvision's distributions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import sslfast
from augment_common import BACKENDS, KERNELS, device_of, torchvision
from sslfast.augment import ViewSpec
from sslfast.ops.view_params import COLUMNS, view_params
from sslfast.reference.philox import exponential, philox4x32

pytestmark = pytest.mark.sanitize

EVERYTHING = ViewSpec(
    32, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, jitter_p=0.8, grey_p=0.2, blur_p=0.5, solarize_p=0.3
)
SPECS = {
    "everything": EVERYTHING,
    "in a fixed order": ViewSpec(32, brightness=(0.2, 0.3), hue=0.1, shuffle=False, sigma=(1.0, 1.0), blur_p=1),
    "some of the four": ViewSpec(32, contrast=0.4, saturation=(0.5, 2.0), jitter_p=0.5, scale=(0.05, 0.14)),
    "no crop": ViewSpec(32, scale=None, brightness=0.4, flip_p=0, grey_p=1),
    "nothing drawn": ViewSpec(32, scale=None, flip_p=0),
    "whole area": ViewSpec(32, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip_p=1),
    "extreme ratios": ViewSpec(32, scale=(1e-6, 1.0), ratio=(1e-3, 1e3)),
    "wide only": ViewSpec(32, scale=(0.5, 1.0), ratio=(7.0, 9.0), solarize_p=1),
}
SIZES = [(256, 256), (427, 640), (32, 32), (1, 1), (1, 1000), (1000, 1), (4096, 17), (17, 4096), (3, 2), (2**24 - 1, 5)]
KEYS = [(0, 0), (1, 2), (-1, 2**32 - 1), (2**64 - 1, 0), (-(2**63), 7), (2**63, 123456789), (2**32, 1)]
MANY = 20_000
SIMPLE = [ViewSpec(8).numbers()]


def draw(backend: str, ids: Tensor, size: tuple[int, int] | Tensor, specs: list[ViewSpec], **options: int) -> Tensor:
    device = device_of(backend)
    size = size.to(device) if isinstance(size, Tensor) else size
    with sslfast.use_backend(backend):
        rows = view_params(ids.to(device), size, [spec.numbers() for spec in specs], **options)
    assert rows.shape == (len(specs), len(ids), len(COLUMNS)) and rows.dtype == torch.float32
    return rows.cpu()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def some_ids(count: int) -> Tensor:
    extremes = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**63 - 1, -1, -(2**63)])
    return torch.cat([extremes, torch.randint(2**63 - 1, (count,))])


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "digits of π"],
)
def test_philox_is_random123s(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    assert tuple(int(word) for word in philox4x32(counter, key)) == words


def test_exponential() -> None:
    for x in [*np.linspace(-6.91, 6.91, 401), 0.0, math.log(3 / 4), math.log(4 / 3), 1e-9, -0.3465735902799727]:
        assert abs(exponential(float(x)) / math.exp(x) - 1) <= 4e-16


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", SPECS)
def test_kernel_draws_the_references_bits(name: str, backend: str) -> None:
    ids = some_ids(90)
    for size, (seed, epoch) in itertools.product(SIZES, KEYS[:3]):
        options = {"seed": seed, "epoch": epoch, "view": 3}
        expected = draw("reference", ids, size, [SPECS[name]], **options)
        assert expected.isfinite().all()
        assert same_bits(draw(backend, ids, size, [SPECS[name]], **options), expected), (size, seed, epoch)


@pytest.mark.levels
@pytest.mark.parametrize("backend", KERNELS)
def test_kernel_draws_the_references_bits_for_any_key(backend: str) -> None:
    ids, specs = some_ids(500), list(SPECS.values())
    sizes = torch.tensor(SIZES)[torch.randint(len(SIZES), (len(ids),))]
    for (seed, epoch), view in zip(KEYS, [0, 1, 255, 256, 4095, 2**15, 2**16 - len(specs)], strict=True):
        options = {"seed": seed, "epoch": epoch, "view": view}
        expected = draw("reference", ids, sizes, specs, **options)
        assert same_bits(draw(backend, ids, sizes, specs, **options), expected), options


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_depends_on_its_own_image_alone(backend: str) -> None:
    specs = [EVERYTHING, SPECS["some of the four"], EVERYTHING]
    ids = some_ids(200)
    sizes = torch.tensor(SIZES[:3])[torch.randint(3, (len(ids),))]
    options = {"seed": 5, "epoch": 9}
    rows = draw(backend, ids, sizes, specs, **options)
    parts = [draw(backend, i, s, specs, **options) for i, s in zip(ids.split(61), sizes.split(61), strict=True)]
    assert same_bits(torch.cat(parts, 1), rows)
    order = torch.randperm(len(ids))
    assert same_bits(draw(backend, ids[order], sizes[order], specs, **options), rows[:, order])
    strided = torch.stack([ids, ids + 1], 1)[:, 0]  # not contiguous
    assert same_bits(draw(backend, strided, sizes.T.contiguous().T, specs, **options), rows)
    one_by_one = [draw(backend, ids, sizes, [spec], view=v, **options) for v, spec in enumerate(specs)]
    assert same_bits(torch.cat(one_by_one), rows)
    same_size = draw(backend, ids, (427, 640), specs, **options)
    assert same_bits(same_size, draw(backend, ids, torch.tensor([427, 640]).expand(len(ids), 2), specs, **options))
    # The image's size moves the box and nothing else.
    assert same_bits(same_size[..., 4:], rows[..., 4:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_part_of_the_key_counts(backend: str) -> None:
    ids = torch.tensor([3, 3 + 2**32, 4])
    rows = [
        draw(backend, ids, (300, 400), [EVERYTHING], seed=seed, epoch=epoch, view=view)
        for seed, epoch, view in [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 16)]
    ]
    factors = torch.cat(rows)[..., 5:9].reshape(-1, 4)
    assert len(factors.unique(dim=0)) == len(factors) == 18
    ones = [draw(backend, ids, (300, 400), [EVERYTHING], seed=seed) for seed in (2**64 - 1, -1)]
    assert same_bits(*ones)  # the same 64 bits


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str) -> None:
    empty = torch.empty(0, dtype=torch.int64)
    assert draw(backend, empty, (4, 4), [EVERYTHING] * 2).shape == (2, 0, 16)
    assert draw(backend, empty, empty.reshape(0, 2), [EVERYTHING] * 2).shape == (2, 0, 16)


# -------------------------------------------------------------------------------------------------------- distributions


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray | Callable[[np.ndarray], np.ndarray]) -> float:
    """The distance of two samples, or of a sample from a distribution, in units in which 2.2 has a chance of 1e-4."""
    points = np.sort(a)
    share = np.arange(1, len(a) + 1) / len(a)
    if callable(b):
        other, size = b(points), len(a)
        distance = max(np.abs(share - other).max(), np.abs(share - 1 / len(a) - other).max())
    else:
        points = np.sort(np.concatenate([a, b]))
        counts = [np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (a, b)]
        distance, size = np.abs(counts[0] - counts[1]).max(), len(a) * len(b) / (len(a) + len(b))
    return float(distance * math.sqrt(size))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("size", "scale"), [((300, 400), (0.08, 1.0)), ((300, 400), (0.05, 0.14)), ((40, 900), (0.2, 1.0))], ids=str
)
def test_boxes_are_distributed_as_torchvisions(size: tuple[int, int], scale: tuple[float, float], backend: str) -> None:
    """The last size is so wide that about half the boxes come from the fallback."""
    crop = torchvision("transforms").RandomResizedCrop
    height, width = size
    image = torch.empty(1, height, width)
    theirs = np.array([crop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(4000)], dtype=float)
    ours = draw(backend, torch.arange(MANY), size, [ViewSpec(32, scale=scale)])[0, :, :4].double().numpy()
    assert (ours == np.floor(ours)).all() and (ours[:, :2] >= 0).all() and (ours[:, 2:] >= 1).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    for name, of in {
        "area": lambda box: box[:, 2] * box[:, 3],
        "log ratio": lambda box: np.log(box[:, 3] / box[:, 2]),
        "top": lambda box: box[:, 0] / (height - box[:, 2] + 1),
        "left": lambda box: box[:, 1] / (width - box[:, 3] + 1),
        "bottom": lambda box: height - box[:, 0] - box[:, 2],
    }.items():
        assert kolmogorov_smirnov(of(ours), of(theirs)) <= 2.2, name
    if width == 900:
        fallback = (theirs[:, 2] == height) & (theirs[:, 3] == round(height * 4 / 3))
        assert fallback.mean() > 0.2, "the case was meant to reach the fallback"


@pytest.mark.parametrize("backend", BACKENDS)
def test_factors_are_uniform_and_orders_equally_likely(backend: str) -> None:
    spec = ViewSpec(32, brightness=0.8, contrast=(0.1, 3.0), saturation=1.5, hue=0.2, sigma=(0.1, 2.0), blur_p=1)
    rows = draw(backend, torch.arange(MANY), (64, 64), [spec])[0].double().numpy()
    columns = dict(zip(COLUMNS, rows.T, strict=True))
    ranges = {"brightness": (0.2, 1.8), "contrast": (0.1, 3.0), "saturation": (0.0, 2.5), "hue": (-0.2, 0.2)}
    for name, (low, high) in {**ranges, "sigma": (0.1, 2.0)}.items():
        assert columns[name].min() >= np.float32(low) and columns[name].max() <= np.float32(high), name
        assert kolmogorov_smirnov(columns[name], lambda x, a=low, b=high: (x - a) / (b - a)) <= 2.2, name
    orders, counts = np.unique(rows[:, 9:13], axis=0, return_counts=True)
    assert [tuple(order) for order in orders] == list(itertools.permutations(range(4)))
    expected = MANY / 24
    assert ((counts - expected) ** 2 / expected).sum() <= 58  # chance 1e-4 at 23 degrees of freedom


@pytest.mark.parametrize("backend", BACKENDS)
def test_coins_fall_as_often_as_they_should_and_nothing_hangs_together(backend: str) -> None:
    rows = draw(backend, torch.arange(MANY), (64, 64), [EVERYTHING])[0].double().numpy()
    columns = dict(zip(COLUMNS, rows.T, strict=True))
    coins = {
        "flip": (columns["flip"], 0.5),
        "jitter": ((columns["order0"] >= 0).astype(float), 0.8),
        "grey": (columns["grey"], 0.2),
        "blur": ((columns["sigma"] > 0).astype(float), 0.5),
        "solarize": (columns["solarize"], 0.3),
    }
    for name, (coin, p) in coins.items():
        assert set(coin) == {0.0, 1.0}, name
        assert abs(coin.mean() - p) <= 4 * math.sqrt(p * (1 - p) / MANY), name
    off = columns["order0"] < 0
    assert (rows[off, 9:13] == -1).all() and (np.sort(rows[~off, 9:13]) == np.arange(4)).all()
    box = [columns["height"] * columns["width"], np.log(columns["width"] / columns["height"])]
    drawn = [*(coins[name][0] for name in ("flip", "grey", "solarize")), *rows[:, 5:9].T, *box]
    drawn = np.stack([*drawn, columns["order0"], columns["sigma"]])[:, ~off]  # an order is drawn where jitter is on
    between = np.corrcoef(drawn)[np.triu_indices(len(drawn), 1)]
    neighbours = [np.corrcoef(x[:-1], x[1:])[0, 1] for x in drawn]
    assert np.abs([*between, *neighbours]).max() <= 4.5 / math.sqrt(drawn.shape[1])


# ---------------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("ids", "size", "options", "error", "message"),
    [
        ([1, 2], (4, 4), {}, TypeError, r"ids must be a vector of int64, got list"),
        (torch.tensor([1, 2], dtype=torch.int32), (4, 4), {}, TypeError, r"ids .*int64, got \(2,\) of torch.int32"),
        (torch.ones(2, 1, dtype=torch.int64), (4, 4), {}, TypeError, r"ids must be a vector.*\(2, 1\)"),
        (torch.arange(2), (0, 4), {}, ValueError, r"size must be a whole number from 1 to .*, got 0"),
        (torch.arange(2), (4, -1), {}, ValueError, r"size must be a whole number from 1 to .*, got -1"),
        (torch.arange(2), torch.ones(3, 2, dtype=torch.int64), {}, ValueError, r"size must be \[2, 2\] of int64.*3, 2"),
        (torch.arange(2), torch.ones(2, 2), {}, ValueError, r"size must be \[2, 2\] of int64.*float32"),
        (
            torch.arange(2),
            torch.tensor([[4, 4], [4, 0]]),
            {},
            ValueError,
            r"size must be a whole number from 1 to .*, got 0",
        ),
        (torch.arange(2), torch.ones(2, 2, dtype=torch.int64, device="meta"), {}, ValueError, r"size .*cpu.*meta"),
        (torch.arange(2), (4, 4), {"seed": 2**64}, ValueError, r"seed must be a 64-bit whole number, got 18446744"),
        (torch.arange(2), (4, 4), {"seed": -(2**63) - 1}, ValueError, r"seed must be"),
        (torch.arange(2), (4, 4), {"epoch": -1}, ValueError, r"epoch must be a whole number from 0 to .*got -1"),
        (torch.arange(2), (4, 4), {"epoch": 2**32}, ValueError, r"epoch must be"),
        (torch.arange(2), (4, 4), {"view": -1}, ValueError, r"view must be a whole number from 0 to .*got -1"),
        (torch.arange(2), (4, 4), {"view": 2**16}, ValueError, r"view must be"),
    ],
)
def test_wrong_input(ids, size, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        view_params(ids, size, SIMPLE, **options)


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend: str) -> None:
    device = device_of(backend)
    ids, sizes = torch.arange(5, device=device), torch.tensor([[4, 5]] * 5, device=device)
    numbers = [number for spec in (EVERYTHING, EVERYTHING) for number in spec.numbers()]
    for arguments in [(ids, None, [4, 5], -1, 2**32 - 1, 3), (ids, sizes, [], 0, 0, 0)]:
        torch.library.opcheck(
            torch.ops.sslfast.view_params.default,
            (*arguments, numbers),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@pytest.mark.parametrize("backend", KERNELS)
def test_compile_without_graph_breaks(backend: str) -> None:
    ids = torch.arange(5, device=device_of(backend))

    def function(ids: Tensor) -> Tensor:
        return view_params(ids, (40, 50), [EVERYTHING.numbers()], seed=7)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    with sslfast.use_backend(backend):
        assert same_bits(compiled(ids), function(ids))
