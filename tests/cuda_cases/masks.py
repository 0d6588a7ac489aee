"""Cases of masks, of their lists, and of masked words."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sslfast import masking
from sslfast.ops.masked_rows import masked_rows
from sslfast.ops.multiblock_mask import multiblock_mask
from sslfast.ops.partition_mask import partition_mask

from .case import Case, Function, case, name_of

KEY: dict[str, int] = dict(seed=-3, epoch=2, view=1)

# Name and number of samples, and the masks of their ids.
RANDOM: dict[tuple[str, int], Function] = {
    ("in raster order", 3): lambda ids: masking.random_masks(ids, (6, 7), 0.6, **KEY),
    ("one sample", 1): lambda ids: masking.random_masks(ids, (6, 7), 0.6, **KEY),
    ("no sample", 0): lambda ids: masking.random_masks(ids, (6, 7), 0.6, **KEY),
    ("one patch", 2): lambda ids: masking.random_masks(ids, 1, 0.0, **KEY),
    ("nothing kept", 2): lambda ids: masking.random_masks(ids, 33, 1.0, **KEY),
    ("two tiles of keys, in order of noise", 2): lambda ids: masking.random_masks(ids, 1030, order="noise", **KEY),
    ("tubes", 3): lambda ids: masking.tube_masks(ids, (4, 5, 3), **KEY),
    ("units", 3): lambda ids: masking.grid_masks(ids, (6, 9), unit=3, **KEY),
}
BLOCKS: dict[tuple[str, int], Function] = {
    ("BEiT", 5): lambda ids: masking.beit_masks(ids, **KEY),
    ("no sample", 0): lambda ids: masking.beit_masks(ids, **KEY),
    ("one patch", 1): lambda ids: masking.block_masks(ids, (1, 1), 1, complete=True, **KEY),
    ("completed, two words a row", 3): lambda ids: masking.block_masks(ids, (13, 70), 300, complete=True, **KEY),
    ("one warp a block", 2): lambda ids: masking.block_masks(ids, (300, 300), 9000, least=2000, **KEY),
    ("iBOT", 4): lambda ids: masking.ibot_masks(ids, (14, 14), (0.0, 0.3), (0.0, 0.2), **KEY),
}
PLACED = ((17, 19), 4, (5, 6), (15, 17))
MULTIBLOCK: dict[tuple[str, int], Function] = {
    ("I-JEPA", 3): lambda ids: masking.multiblock_masks(ids, (14, 14), context_size=28, **KEY),
    ("no sample", 0): lambda ids: masking.multiblock_masks(ids, (14, 14), context_size=28, **KEY),
    ("only counted", 2): lambda ids: multiblock_mask(ids, *PLACED, 0, **KEY),
    ("more wanted than there are", 2): lambda ids: multiblock_mask(ids, *PLACED, 300, **KEY),
    ("overlapping", 2): lambda ids: multiblock_mask(ids, *PLACED, 60, allow_overlap=True, **KEY),
    ("as upstream", 2): lambda ids: multiblock_mask(ids, *PLACED, 60, upstream=True, **KEY),
    ("many targets", 2): lambda ids: multiblock_mask(ids, (9, 9), 256, (1, 1), (9, 9), 3, **KEY),
    ("one patch", 1): lambda ids: multiblock_mask(ids, (1, 1), 1, (1, 1), (1, 1), 1, **KEY),
}


def masks() -> Iterator[Case]:
    def make(function: Function, count: int) -> tuple[Any, ...]:
        return function, torch.randint(0, 2**62, (count,))

    for operator, functions in (("random_mask", RANDOM), ("block_mask", BLOCKS), ("multiblock_mask", MULTIBLOCK)):
        for (name, count), function in functions.items():
            yield case(f"{operator}, {name}", (operator,), partial(make, function, count))

    dino = partial(make, lambda ids: masking.dinov2_masks(ids, (16, 16), **KEY), 4)
    yield case("block_mask, DINOv2", ("block_mask", "masked_rows"), dino)

    def of_noise() -> tuple[Any, ...]:
        noise = torch.rand(3, 50)
        noise[:, 20:30] = noise[:, 10:20]  # ties
        return (lambda ids, noise: masking.random_masks(ids, 50, order="noise", noise=noise)), torch.arange(3), noise

    yield case("random_mask, of given noise", ("random_mask",), of_noise)


def lists() -> Iterator[Case]:
    def partition(count: int, length: int, kept: int) -> tuple[Any, ...]:
        mask = torch.rand(count, length).argsort(1) >= kept
        return (lambda mask: partition_mask(mask, kept)), mask

    for sizes in ((3, 300, 150), (2, 257, 0), (2, 31, 31), (1, 1, 1), (0, 9, 4), (3, 0, 0)):
        yield case(f"partition_mask {sizes}", ("partition_mask",), partial(partition, *sizes))

    def rows(count: int, length: int, spare: int) -> tuple[Any, ...]:
        mask = torch.rand(count, length) < 0.4
        size = int(mask.sum()) + spare
        return (lambda mask: masked_rows(mask, size)), mask

    for sizes in ((5, 300, 9), (9, 31, 0), (260, 2, 0), (1, 1, 3), (0, 7, 4), (3, 0, 600)):
        yield case(f"masked_rows {sizes}", ("masked_rows",), partial(rows, *sizes), exact=True)


def words() -> Iterator[Case]:
    def make(count: int, length: int, by: str, exact: bool, dtype: torch.dtype) -> tuple[Any, ...]:
        tokens, samples = torch.randint(5, 3000, (count, length)).to(dtype), torch.randint(0, 2**62, (count,))
        special = torch.rand(tokens.shape) < 0.1
        word_ids = (torch.arange(length) // 2).expand(count, -1).masked_fill(special, -1)
        options: dict[str, Any] = dict(mask_id=4, vocab_size=3000, exact=exact, **KEY)

        def function(tokens: Tensor, samples: Tensor, given: Tensor) -> Any:
            return masking.mask_tokens(tokens, samples, **{by: given}, **options)

        return function, tokens, samples, special if by == "special" else word_ids

    forms = tuple(itertools.product(("special", "word_ids"), (False, True), (torch.int32, torch.int64)))
    shapes: dict[tuple[int, int], Callable[[int], bool]] = {
        (3, 130): lambda i: True,
        (2, 64): lambda i: True,  # whole vectors of four
        (1, 1): lambda i: i % 2 == 0,
        (0, 8): lambda i: i % 4 == 0,
        (2, 0): lambda i: i % 4 == 0,
        (1, 4100): lambda i: i % 4 == 3,  # an exact number of so many is sorted in global memory
    }
    for shape, serves in shapes.items():
        for i, (by, exact, dtype) in enumerate(forms):
            if serves(i):
                name = f"mask_tokens {shape} by {by}{', exact' * exact}, {name_of(dtype)}"
                yield case(name, ("mask_tokens",), partial(make, *shape, by, exact, dtype))
