"""BERT's masking of words: inputs and labels in one pass, with random numbers keyed by who a row is.

Philox4x32-10 keyed by seed, with (block, view, epoch, sample) as its counter: the same row gives the same result on
every device, in every batch, worker and rank, bit for bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _backends, _library, reference
from .._checks import check_share, readable, whole_number
from .._random.key import key_of
from . import _devices

BACKENDS = ("cpu", "cuda", "reference")
why_not = functools.partial(_devices.why_not, "mask_tokens", "input_ids")
LONGEST = 2**16  # tokens of a row, and words: kLongestRow in csrc/common/mask_tokens.h
IDS = (torch.int64, torch.int32)


def _fake(input_ids: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return input_ids.new_empty(input_ids.shape), input_ids.new_empty(input_ids.shape)


_library.define(
    "mask_tokens(Tensor input_ids, Tensor samples, Tensor? special, Tensor? word_ids, int[] limits, int mask_id, "
    "int vocab_size, int ignore_index, bool exact, int seed, int epoch, int view) -> (Tensor inputs, Tensor labels)",
    _fake,
)


def limits_of(probability: float, mask_share: float, random_share: float) -> list[int]:
    """What a random word is compared with, 0 … 2³²: chosen, of these masked, of these masked or random.

    Raises:
        TypeError, ValueError: one is no number between 0 and 1, or the two shares are more than 1 together.
    """
    chosen = check_share("probability", probability)
    masked, replaced = check_share("mask_share", mask_share), check_share("random_share", random_share)
    both = masked + replaced
    if both > 1 + 1e-12:
        raise ValueError(f"mask_share + random_share must be at most 1, got {mask_share!r} + {random_share!r}")
    # A word w is below p where w·2⁻³² < p, so where w < ⌈p·2³²⌉; 0.7 + 0.3 may miss 1 by a rounding.
    return [math.ceil(share * 2**32) for share in (chosen, masked, 1.0 if both > 1 - 1e-12 else both)]


class Rules(NamedTuple):
    """The ids that stand for something, where the kernels can hold them."""

    mask_id: int
    vocab_size: int
    ignore_index: int


def checked_rules(mask_id: int, vocab_size: int, ignore_index: int) -> Rules:
    return Rules(
        whole_number("mask_id", mask_id, 0, 2**31 - 1),
        whole_number("vocab_size", vocab_size, 1, 2**31 - 1),
        whole_number("ignore_index", ignore_index, -(2**31), 2**31 - 1),
    )


def _check_rows(name: str, x: Tensor, dtype: torch.dtype, input_ids: Tensor, dims: int) -> None:
    shape = input_ids.shape[:dims]
    if x.shape != shape or x.dtype != dtype or x.device != input_ids.device:
        raise ValueError(
            f"{name} must be {list(shape)} of {dtype} on {input_ids.device}, got {list(x.shape)} of {x.dtype} on "
            f"{x.device}"
        )


def mask_tokens(
    input_ids: Tensor,
    samples: Tensor,
    special: Tensor | None,
    word_ids: Tensor | None,
    limits: Sequence[int],
    *,
    mask_id: int,
    vocab_size: int,
    ignore_index: int = -100,
    exact: bool = False,
    seed: int = 0,
    epoch: int = 0,
    view: int = 0,
) -> tuple[Tensor, Tensor]:
    """Choose tokens, replace them, and label them; ``sslfast.masking.mask_tokens`` tells what the arguments mean.

    Args:
        input_ids: [B, S] int64 or int32, S ≤ 65536; any strides.
        samples: [B] int64: which row of the data set each is.
        special: [B, S] bool, True: never chosen; or ``None``.
        word_ids: [B, S] int64 below 65536, below 0: never chosen; or ``None``.
        limits: what ``limits_of`` gives.

    Returns:
        inputs and labels, each [B, S] of ``input_ids``' dtype.

    Raises:
        TypeError, ValueError: a tensor has another shape or dtype, or a number is out of range.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in IDS or input_ids.dim() != 2:
        got = (
            f"{list(input_ids.shape)} of {input_ids.dtype}"
            if isinstance(input_ids, Tensor)
            else type(input_ids).__name__
        )
        raise TypeError(f"input_ids must be [B, S] of int64 or int32, got {got}")
    if input_ids.shape[1] > LONGEST:
        raise ValueError(f"input_ids must have at most {LONGEST} tokens a row, got {input_ids.shape[1]}")
    mask_id, vocab_size, ignore_index = checked_rules(mask_id, vocab_size, ignore_index)
    seed, epoch, view = key_of(seed, epoch, view)
    _check_rows("samples", samples, torch.int64, input_ids, 1)
    if special is not None:
        _check_rows("special", special, torch.bool, input_ids, 2)
    if word_ids is not None:
        _check_rows("word_ids", word_ids, torch.int64, input_ids, 2)
        if word_ids.numel() and readable(word_ids):
            largest = int(word_ids.max())
            if largest >= LONGEST:
                raise ValueError(f"word_ids must be below {LONGEST}, got {largest}")
    backend = _backends.serve("mask_tokens", input_ids, "cuda", why_not)
    function = reference.mask_tokens if backend == "reference" else functools.partial(_library.call, "mask_tokens")
    return function(
        input_ids,
        samples,
        special,
        word_ids,
        list(limits),
        mask_id,
        vocab_size,
        ignore_index,
        exact,
        seed,
        epoch,
        view,
    )
