"""Masks of words: BERT's masked language modelling (Devlin et al., NAACL 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from .. import _native, ops
from .._random.ids import Ids, sample_ids
from ..ops.mask_tokens import LONGEST, check_rules, limits_of
from ..ops.random_mask import check_key
from ..reference.mask_tokens import mask_arrays
from ._samples import Array, as_samples


@overload
def mask_tokens(
    input_ids: Tensor,
    samples: Ids = None,
    *,
    mask_id: int,
    vocab_size: int,
    probability: float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    special: Tensor | None = None,
    word_ids: Tensor | None = None,
    exact: bool = False,
    ignore_index: int = -100,
    seed: int = 0,
    epoch: int = 0,
    view: int = 0,
) -> tuple[Tensor, Tensor]: ...


@overload
def mask_tokens(
    input_ids: Array,
    samples: Array | None = None,
    *,
    mask_id: int,
    vocab_size: int,
    probability: float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    special: Array | None = None,
    word_ids: Array | None = None,
    exact: bool = False,
    ignore_index: int = -100,
    seed: int = 0,
    epoch: int = 0,
    view: int = 0,
) -> tuple[Array, Array]: ...


def mask_tokens(
    input_ids: Any,
    samples: Any = None,
    *,
    mask_id: int,
    vocab_size: int,
    probability: float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    special: Any = None,
    word_ids: Any = None,
    exact: bool = False,
    ignore_index: int = -100,
    seed: int = 0,
    epoch: int = 0,
    view: int = 0,
) -> tuple[Any, Any]:
    """Choose tokens to predict; of these replace 80 % by the mask token and 10 % by random words, leave the others.

    The distributions of ``transformers``' ``DataCollatorForLanguageModeling``, in one pass. The same (seed, epoch,
    view, sample) gives the same result on every device and in every batch, so a new ``epoch`` is a new mask (dynamic
    masking, as RoBERTa's). ``input_ids`` are not written to.

    Args:
        input_ids: [B, S] int64 or int32, S ≤ 65536, tensor (any strides) or NumPy array; the others are of its kind.
        samples: [B] whole numbers: which row of the data set each is. Default: drawn from torch's CPU generator.
        mask_id: id of the mask token.
        vocab_size: random words are 0 … vocab_size − 1, special ones included, as in ``transformers``.
        probability: chance of a token to be chosen. Default 0.15.
        mask_share, random_share: of the chosen tokens, those replaced by the mask token and by random words; the rest
            stay as they are. Defaults 0.8 and 0.1.
        special: [B, S] bool or integer; tokens that are never chosen are not 0. Padding belongs to them.
        word_ids: [B, S] integers from 0 to 65535, less than 0 for special tokens: tokens of the same number in a row
            are a word, which is chosen whole or not at all. What a token is replaced by is still its own matter. A row
            of two sentences needs numbers that go on from one to the other.
        exact: choose exactly round(probability · candidates) tokens of each row (halves up; at least 1 of those that
            may be chosen). With ``word_ids`` words are taken in random order, and one that no longer fits is passed
            over, as in BERT's own code; so the number may fall short. Only where no word fits is it exceeded, by the
            one word chosen. Default ``False``: each token by itself.
        ignore_index: label of every token that was not chosen. Default −100.
        seed: any 64-bit whole number. Default 0.
        epoch: 0 to 2³² − 1. Default 0.
        view: 0 to 1023: for several masks of one row. Default 0.

    Returns:
        inputs and labels, [B, S] each, of ``input_ids``' dtype, device and kind. A chosen token's label is its id.

    Raises:
        TypeError, ValueError: which argument is wrong, what it was, what is allowed. Word ids are checked on the CPU
            outside ``torch.compile``; elsewhere those above 65535 count modulo 65536.

    Example:
        >>> ids = torch.arange(200).view(2, 100)
        >>> inputs, labels = sslfast.masking.mask_tokens(ids, [0, 1], mask_id=103, vocab_size=1000, exact=True)
        >>> (labels != -100).sum(1).tolist()
        [15, 15]
    """
    limits = limits_of(probability, mask_share, random_share)
    if isinstance(input_ids, np.ndarray):
        check_rules(mask_id, vocab_size, ignore_index, seed, epoch, view)
        arrays = _checked_arrays(input_ids, samples, special, word_ids)
        function: Any = mask_arrays if _native.host is None else _native.host.mask_tokens
        rest = (limits, mask_id, vocab_size, ignore_index, exact, check_key(seed, epoch, view), epoch, view)
        inputs, labels = function(*arrays, *rest)
        return inputs, labels
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids must be a tensor or a NumPy array, got {type(input_ids).__name__}")
    for name, given in (("special", special), ("word_ids", word_ids)):
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a tensor, as input_ids, got {type(given).__name__}")
    rows = input_ids.shape[0] if input_ids.dim() else 0  # the operation checks the shape
    if isinstance(samples, (Tensor, Sequence)) and len(samples) != rows:
        raise ValueError(f"samples must be as many as the rows, {rows}, got {len(samples)}")
    return ops.mask_tokens.mask_tokens(
        input_ids,
        sample_ids(samples, rows, input_ids.device),
        None if special is None else special.to(torch.bool),
        None if word_ids is None else word_ids.to(torch.int64),
        limits,
        mask_id=mask_id,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        exact=exact,
        seed=seed,
        epoch=epoch,
        view=view,
    )


def _checked_arrays(
    input_ids: Array, samples: Array | None, special: Array | None, word_ids: Array | None
) -> tuple[Array, Array, Array | None, Array | None]:
    """The four without gaps, of the dtypes that the kernels take."""
    if input_ids.ndim != 2 or input_ids.dtype not in (np.int64, np.int32):
        raise TypeError(f"input_ids must be [B, S] of int64 or int32, got {list(input_ids.shape)} of {input_ids.dtype}")
    rows, length = input_ids.shape
    if length > LONGEST:
        raise ValueError(f"input_ids must have at most {LONGEST} tokens a row, got {length}")
    who: Any
    if samples is None:
        who = sample_ids(None, rows, torch.device("cpu")).numpy()
    else:  # an empty list has no type: NumPy takes it for floats
        who = as_samples(np.asarray(samples, dtype=None if rows else np.int64), None)
    if len(who) != rows:
        raise ValueError(f"samples must be as many as the rows, {rows}, got {len(who)}")
    for name, array in (("special", special), ("word_ids", word_ids)):
        if array is not None and np.shape(array) != input_ids.shape:
            raise ValueError(f"{name} must be {list(input_ids.shape)}, got {list(np.shape(array))}")
    apart = None if special is None else np.ascontiguousarray(special, dtype=np.bool_)
    words = None if word_ids is None else np.ascontiguousarray(word_ids, dtype=np.int64)
    if words is not None and words.size and words.max() >= LONGEST:
        raise ValueError(f"word_ids must be below {LONGEST}, got {words.max()}")
    return np.ascontiguousarray(input_ids), who, apart, words
