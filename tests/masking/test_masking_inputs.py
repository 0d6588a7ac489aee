"""Masks and patches at their edges: numbers of NumPy, grids, epochs, rows of tokenizers, and data loaders."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from sslfast import _checks, _native, masked_feature_loss, masked_patch_loss, masking
from sslfast.masking import compat

IDS = [5, 2**40, 7, 0]
I, F = np.int64, np.float32  # noqa: E741 (short names keep the tables below readable)


def flat(result: Any) -> list[Any]:
    """The tensors and numbers of a result."""
    if isinstance(result, masking.Masks):
        return [result.ids_keep, result.ids_mask, result.ids_restore]
    return list(result) if isinstance(result, tuple) else [result]


def same(a: Any, b: Any) -> bool:
    return len(flat(a)) == len(flat(b)) and all(
        np.array_equal(np.asarray(x), np.asarray(y)) and type(x) is type(y)
        for x, y in zip(flat(a), flat(b), strict=True)
    )


# ---------------------------------------------------------------------------------------------------- numbers of NumPy

MASKS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "random": (masking.random_masks, dict(grid=I(16), ratio=F(0.75)), dict(grid=16, ratio=0.75)),
    "random, by sides": (masking.random_masks, dict(grid=np.array([2, 4, 4])), dict(grid=(2, 4, 4))),
    "tube": (masking.tube_masks, dict(grid=(I(2), 4, I(4)), ratio=F(0.5)), dict(grid=(2, 4, 4), ratio=0.5)),
    "grid": (masking.grid_masks, dict(grid=(8, I(8)), unit=I(2)), dict(grid=(8, 8), unit=2)),
    "block": (
        masking.block_masks,
        dict(grid=np.array([8, 8]), count=F(20), least=F(4), most=I(9), aspect=np.array([0.5, 2.0]), tries=I(5)),
        dict(grid=(8, 8), count=20, least=4, most=9, aspect=(0.5, 2.0), tries=5),
    ),
    "beit": (masking.beit_masks, dict(count=I(75), least=I(16)), dict(count=75, least=16)),
    "ibot": (masking.ibot_masks, dict(grid=(I(8), 8), ratio=F(0.25)), dict(grid=(8, 8), ratio=0.25)),
    "ibot, several": (
        masking.ibot_masks,
        dict(grid=(8, 8), ratio=np.array([0.0, 0.25]), variation=np.array([0.0, 0.125])),
        dict(grid=(8, 8), ratio=(0.0, 0.25), variation=(0.0, 0.125)),
    ),
    "dinov2": (
        masking.dinov2_masks,
        dict(grid=np.array([8, 8]), probability=F(0.5), ratios=np.array([0.25, 0.5]), least=I(4)),
        dict(grid=(8, 8), probability=0.5, ratios=(0.25, 0.5), least=4),
    ),
    "dinov3": (
        masking.dinov3_masks,
        dict(grid=I(8), ratios=(F(0.25), F(0.5)), circular_shift=True),
        dict(grid=8, ratios=(0.25, 0.5), circular_shift=True),
    ),
    "multiblock": (
        masking.multiblock_masks,
        dict(grid=(I(14), 14), targets=I(2), target_scale=np.array([0.125, 0.25]), context_size=I(20), step=I(3)),
        dict(grid=(14, 14), targets=2, target_scale=(0.125, 0.25), context_size=20, step=3),
    ),
}


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list], ids=["tensor", "array", "list"])
@pytest.mark.parametrize("name", MASKS)
def test_masks_by_numbers_of_numpy(name: str, kind: Callable[..., Any]) -> None:
    function, given, plain = MASKS[name]
    key = {"seed": np.uint64(2**64 - 1), "epoch": I(3), "view": np.int32(1)}
    expected = function(kind(IDS), **plain, seed=2**64 - 1, epoch=3, view=1)
    assert same(function(kind(IDS), **given, **key), expected)
    assert len(flat(expected)) and isinstance(flat(expected)[0], np.ndarray if kind is np.array else Tensor)


PATCHES: dict[str, Callable[[Callable[[Any], Any], Callable[[Any], Any]], Any]] = {
    "gather_patches": lambda i, f: masking.gather_patches(
        torch.ones(2, 3, 8, 8), patch_size=i(4), mean=f([0.5, 0.25, 0.125]), std=f(0.5)
    ),
    "scatter_patches": lambda i, f: masking.scatter_patches(torch.ones(2, 4, 48), size=i([3, 8, 8]), patch_size=i(4)),
    "embed_patches": lambda i, f: masking.embed_patches(
        torch.ones(2, 3, 8, 8), None, torch.ones(5, 48), patch_size=i([4, 4]), mean=f(0.5), std=f([0.5, 0.25, 0.125])
    ),
    "patchify": lambda i, f: masking.patchify(torch.ones(2, 3, 8, 8), i(4)),
    "unpatchify": lambda i, f: masking.unpatchify(torch.ones(2, 4, 48), i(4), i(3), grid=i(2)),
    "compat.unpatchify": lambda i, f: compat.unpatchify(torch.ones(2, 4, 48), i(4), i(3)),
    "masked_patch_loss": lambda i, f: masked_patch_loss(
        torch.ones(2, 3, 8, 8), torch.zeros(2, 4, 48), torch.ones(2, 4).bool(), patch_size=i(4), mean=f(0.5), std=f(0.5)
    ),
    "masked_feature_loss": lambda i, f: masked_feature_loss(
        torch.zeros(2, 2, 8), torch.ones(2, 4, 8), torch.tensor([[0, 2], [1, 3]]), beta=f(0.5), eps=f(0.0625)
    ),
    "scatter_tokens": lambda i, f: masking.scatter_tokens(
        torch.ones(1, 3, 2), torch.tensor([[0, 2, 1]]), torch.zeros(2), passed=i(1)
    ),
    "mask_tokens": lambda i, f: masking.mask_tokens(
        torch.arange(20).view(2, 10), [0, 1], mask_id=i(3), vocab_size=i(50), probability=f(0.25), ignore_index=i(-1),
        epoch=i(2),
    ),
    "Masks.from_mask": lambda i, f: masking.Masks.from_mask(torch.tensor([[True, False, False]]), kept=i(2)),
    "random_token_mask": lambda i, f: compat.random_token_mask((i(2), i(9)), mask_ratio=f(1.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", PATCHES)
def test_patches_and_tokens_by_numbers_of_numpy(name: str) -> None:
    torch.manual_seed(0)
    expected = PATCHES[name](lambda x: x, lambda x: x)
    torch.manual_seed(0)
    assert same(PATCHES[name](lambda x: np.asarray(x)[()], lambda x: np.asarray(x, dtype=np.float32)[()]), expected)


@pytest.mark.parametrize("wrong", [4.0, F(4), True, "4", None, np.array([4.5, 4.0]), (4, True), [4, 4, 4]], ids=repr)
def test_what_is_no_size(wrong: Any) -> None:
    images = torch.ones(2, 3, 8, 8)
    for call in (
        lambda: masking.patchify(images, wrong),
        lambda: masking.unpatchify(torch.ones(2, 4, 48), wrong, grid=2),
        lambda: masking.embed_patches(images, None, torch.ones(5, 48), patch_size=wrong),
        lambda: masked_patch_loss(images, torch.zeros(2, 4, 48), torch.ones(2, 4).bool(), patch_size=wrong),
    ):
        with pytest.raises(ValueError, match="patch_size must be p or"):
            call()


# --------------------------------------------------------------------------------------------------------------- grids

SQUARES: dict[str, Callable[[Any], Any]] = {
    "grid": lambda grid: masking.grid_masks(IDS, grid, epoch=0),
    "block": lambda grid: masking.block_masks(IDS, grid, 20, epoch=0),
    "beit": lambda grid: masking.beit_masks(IDS, grid, epoch=0),
    "ibot": lambda grid: masking.ibot_masks(IDS, grid, epoch=0),
    "dinov2": lambda grid: masking.dinov2_masks(IDS, grid, epoch=0),
    "dinov3": lambda grid: masking.dinov3_masks(IDS, grid, epoch=0),
    "multiblock": lambda grid: masking.multiblock_masks(IDS, grid, epoch=0),
}


@pytest.mark.parametrize("name", SQUARES)
def test_a_number_is_the_side_of_a_square(name: str) -> None:
    assert same(SQUARES[name](14), SQUARES[name]((14, 14)))
    assert same(SQUARES[name]([14, 16]), SQUARES[name](torch.tensor([14, 16])))


WRONG_GRIDS = [(14.9, 14), (14.0, 14), 14.5, (14,), (14, 14, 14), "14", None, (True, 14)]


@pytest.mark.parametrize("grid", WRONG_GRIDS, ids=repr)
def test_what_is_no_grid(grid: Any) -> None:
    for function in SQUARES.values():
        with pytest.raises(ValueError, match=r"grid must be \(height, width\) or the side of a square, .*got"):
            function(grid)
    with pytest.raises(ValueError, match="grid must be"):
        masking.unpatchify(torch.ones(2, 196, 48), 4, grid=grid)
    if grid != (14,) and grid != (14, 14, 14):  # of one number, or with a time
        with pytest.raises(ValueError, match=r"grid must be a length or \(height, width\) or \(time"):
            masking.random_masks(IDS, grid, epoch=0)
    if grid != (14, 14, 14):
        with pytest.raises(ValueError, match=r"grid must be \(time, height, width\)"):
            masking.tube_masks(IDS, grid, epoch=0)


# -------------------------------------------------------------------------------------------------------------- epochs


def test_samples_without_an_epoch_are_warned_of() -> None:
    calls: list[Callable[..., Any]] = [
        lambda samples, **key: masking.random_masks(samples, 16, **key),
        lambda samples, **key: masking.tube_masks(samples, (2, 4, 4), **key),
        lambda samples, **key: masking.grid_masks(samples, (4, 4), **key),
        lambda samples, **key: masking.beit_masks(samples, **key),
        lambda samples, **key: masking.ibot_masks(samples, (14, 14), **key),
        lambda samples, **key: masking.dinov2_masks(samples, (14, 14), **key),
        lambda samples, **key: masking.dinov3_masks(samples, (14, 14), **key),
        lambda samples, **key: masking.multiblock_masks(samples, (14, 14), **key),
    ]
    for call in calls:
        _checks._warned.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(4)
            call(IDS, epoch=0)
            masking.random_masks(IDS, 16, noise=torch.rand(4, 16))
        assert caught == []
        with pytest.warns(UserWarning, match="ids were given and no epoch") as told:
            result = call(IDS)
            call(np.array(IDS))
        assert len(told) == 1 and told[0].filename == __file__
        assert same(result, call(IDS, epoch=0))
    ids = torch.arange(20).view(2, 10)
    _checks._warned.clear()
    with pytest.warns(UserWarning, match="ids were given and no epoch"):
        masking.mask_tokens(ids, [0, 1], mask_id=3, vocab_size=50)


def test_compiled_without_a_warning() -> None:
    _checks._warned.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled = torch.compile(lambda ids: masking.random_masks(ids, 16).ids_keep, backend="eager", fullgraph=True)
        got = compiled(torch.tensor(IDS))
    assert torch.equal(got, masking.random_masks(IDS, 16, epoch=0).ids_keep)


# ------------------------------------------------------------------------------------------------- rows of tokenizers


def mask(ids: Any, special: Any, words: Any, probability: float = 0.5) -> Any:
    return masking.mask_tokens(
        ids,
        [0, 1] if isinstance(ids, Tensor) else np.arange(2),
        mask_id=3,
        vocab_size=50,
        probability=probability,
        special=special,
        word_ids=words,
        epoch=0,
    )


@pytest.mark.parametrize("kind", ["tensor", "host", "reference"])
def test_rows_as_tokenizers_give_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``word_ids()`` has None for special tokens, and ``special_tokens_mask`` is a list of lists."""
    if kind == "reference":
        monkeypatch.setattr(_native, "host", None)
    rows = [[None, 0, 0, 1, None], [None, 0, 1, 1, 2]]
    numbers = [[-1, 0, 0, 1, -1], [-1, 0, 1, 1, 2]]
    special = [[1, 0, 0, 0, 1], [1, 0, 0, 0, 0]]
    as_given = torch.tensor if kind == "tensor" else np.array
    ids = as_given([[4, 5, 6, 7, 8], [9, 10, 11, 12, 13]])
    expected = mask(ids, as_given(special), as_given(numbers))
    _, labels = mask(ids, None, rows, probability=1.0)
    assert ((np.asarray(labels) == -100) == np.array([[word is None for word in row] for row in rows])).all()
    for words in (rows, tuple(map(tuple, rows)), numbers, as_given(numbers)):
        assert same(mask(ids, special, words), expected)
    if kind != "tensor":
        assert same(mask(ids, special, np.array(rows, dtype=object)), expected)


@pytest.mark.parametrize("kind", [torch.tensor, np.array], ids=["tensor", "array"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([[None, 0, 0]], r"word_ids must be \[2, 3\], got \[1, 3\]"),
        ([[None, 0], [0, 1, 2]], r"word_ids must be \[2, 3\]"),
        ([[0.5, 0, 0], [0, 0, 0]], "word_ids must hold whole numbers"),
        ([[None, "a", 0], [0, 0, 0]], r"word_ids must be \[2, 3\] of whole numbers or None"),
        ([["a", "b", "c"]] * 2, "word_ids must hold whole numbers"),
        ([[None, 0, 2**16], [0, 0, 0]], "word_ids must be below 65536, got 65536"),
    ],
)
def test_rows_that_are_no_words(words: Any, message: str, kind: Callable[..., Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        mask(kind([[1, 2, 3], [4, 5, 6]]), None, words)


def test_words_of_floats_are_not_cut_off() -> None:
    with pytest.raises(TypeError, match="word_ids must hold whole numbers, got torch.float32"):
        mask(torch.arange(6).view(2, 3), None, torch.rand(2, 3))


# -------------------------------------------------------------------------------------------------------- data loaders


class Masked(Dataset[Any]):
    """Items that hold masks of their own, as tensors or as arrays."""

    def __init__(self, arrays: bool) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> tuple[int, masking.Masks, masking.MultiBlockMasks]:
        samples = np.array([index]) if self.arrays else [index]
        blocks = masking.multiblock_masks(samples, (14, 14), context_size=28, epoch=2)
        return index, masking.random_masks(samples, (14, 14), epoch=2), blocks


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("arrays", [False, True], ids=["tensors", "arrays"])
def test_items_of_a_data_loader_hold_masks(arrays: bool, workers: int) -> None:
    for index, masks, blocks in DataLoader(Masked(arrays), batch_size=3, num_workers=workers):
        assert isinstance(masks, masking.Masks) and isinstance(blocks, masking.MultiBlockMasks)
        assert same(masks, masking.random_masks(index, (14, 14), epoch=2))
        assert same(blocks, masking.multiblock_masks(index, (14, 14), context_size=28, epoch=2))
        assert masks.mask.shape == (len(index), 196) and blocks.targets.shape[1] == len(index)


def test_masks_that_cannot_be_joined() -> None:
    blocks = [masking.multiblock_masks([0], (14, 14), context_size=size, epoch=0) for size in (20, 28)]
    with pytest.raises(ValueError, match="contexts or targets of different sizes: give context_size"):
        default_collate(blocks)
    with pytest.raises(TypeError, match="PatchMasks are those of a whole batch"):
        default_collate([masking.dinov2_masks([index], (14, 14), epoch=0) for index in range(2)])


@pytest.mark.gpu
def test_masks_of_a_data_loader_are_pinned() -> None:
    _, masks, blocks = next(iter(DataLoader(Masked(False), batch_size=3, pin_memory=True)))
    assert masks.ids_keep.is_pinned() and masks.ids_restore.is_pinned() and blocks.context.is_pinned()


# ------------------------------------------------------------------------------------------------------ default device


@pytest.mark.parametrize("name", MASKS)
def test_whatever_the_default_device_is(name: str) -> None:
    function, _, plain = MASKS[name]
    for samples in (IDS, torch.tensor(IDS), np.array(IDS)):
        expected = function(samples, **plain, epoch=0)
        with torch.device("meta"):
            found = function(samples, **plain, epoch=0)
        assert same(found, expected)
