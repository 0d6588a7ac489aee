"""Masks of words: BERT's masked language modelling (Devlin et al., NAACL 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from .. import _native, ops
from .._library import towards
from .._random.ids import Ids, sample_ids
from .._random.key import epoch_of, key_of
from ..ops.mask_tokens import LONGEST, checked_rules, limits_of
from ..reference.mask_tokens import mask_arrays
from ._samples import Array, as_samples

Rows = Sequence[Sequence[int | None]]


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
    special: Tensor | Rows | None = None,
    word_ids: Tensor | Rows | None = None,
    exact: bool = False,
    ignore_index: int = -100,
    seed: int = 0,
    epoch: int | None = None,
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
    special: Array | Rows | None = None,
    word_ids: Array | Rows | None = None,
    exact: bool = False,
    ignore_index: int = -100,
    seed: int = 0,
    epoch: int | None = None,
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
    epoch: int | None = None,
    view: int = 0,
) -> tuple[Any, Any]:
    """Choose tokens to predict; of these replace 80 % by the mask token and 10 % by random words, leave the others.

    The distributions of ``transformers``' ``DataCollatorForLanguageModeling``, in one pass. The same (seed, epoch,
    view, sample) gives the same result on every device and in every batch, so a new ``epoch`` is a new mask (dynamic
    masking, as RoBERTa's). ``input_ids`` are not written to.

    Args:
        input_ids: [B, S] int64 or int32, S ≤ 65536, tensor (any strides) or NumPy array; the others are of its kind, or
            lists of rows.
        samples: the rows' dataset indices, [B] whole numbers. Default: drawn from torch's CPU generator.
        mask_id: id of the mask token.
        vocab_size: random words are 0 … vocab_size − 1, special ones included, as in ``transformers``.
        probability: chance of a token to be chosen. Default 0.15.
        mask_share, random_share: of the chosen tokens, those replaced by the mask token and by random words; the rest
            stay as they are. Defaults 0.8 and 0.1.
        special: [B, S] bool or integer; tokens that are never chosen are not 0. Padding belongs to them.
        word_ids: [B, S] integers from 0 to 65535, less than 0 or None for special tokens, as ``word_ids()`` of a fast
            tokenizer gives them: tokens of the same number in a row are a word, which is chosen whole or not at all.
            What a token is replaced by is still its own matter. A row of two sentences needs numbers that go on from
            one to the other.
        exact: choose exactly round(probability · candidates) tokens of each row (halves up; at least 1 of those that
            may be chosen). With ``word_ids`` words are taken in random order, and one that no longer fits is passed
            over, as in BERT's own code; so the number may fall short. Only where no word fits is it exceeded, by the
            one word chosen. Default ``False``: each token by itself.
        ignore_index: label of every token that was not chosen. Default −100.
        seed: any 64-bit whole number. Default 0.
        epoch: the current epoch, 0 to 2³² − 1. Without it every epoch repeats the same masks: default 0, with a
            warning where samples are given.
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
    epoch = epoch_of(epoch, samples)
    if isinstance(input_ids, np.ndarray):
        rules, key = checked_rules(mask_id, vocab_size, ignore_index), key_of(seed, epoch, view)
        arrays = _checked_arrays(input_ids, samples, special, word_ids)
        function: Any = mask_arrays if _native.host is None else _native.host.mask_tokens
        inputs, labels = function(*arrays, limits, *rules, exact, *key)
        return inputs, labels
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids must be a tensor or a NumPy array, got {type(input_ids).__name__}")
    rows = input_ids.shape[0] if input_ids.dim() else 0  # the operation checks the shape
    if isinstance(samples, (Tensor, Sequence)) and len(samples) != rows:
        raise ValueError(f"samples must be as many as the rows, {rows}, got {len(samples)}")
    unchosen, words = _as_tensor("special", special, input_ids), _as_tensor("word_ids", word_ids, input_ids)
    return ops.mask_tokens.mask_tokens(
        input_ids,
        sample_ids(samples, rows, input_ids.device),
        None if unchosen is None else unchosen.to(torch.bool),
        None if words is None else words.to(torch.int64),
        limits,
        mask_id=mask_id,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        exact=exact,
        seed=seed,
        epoch=epoch,
        view=view,
    )


def _from_rows(name: str, rows: Any, shape: Sequence[int]) -> Array:
    """Lists of rows, or an array, as an array of whole numbers; what has no number, None, is −1.

    Raises:
        TypeError, ValueError: they have another shape, or hold what is neither.
    """
    try:
        array = np.asarray(rows)
        if array.dtype == np.object_:  # None among numbers
            array = np.where(array == None, -1, array).astype(np.int64, casting="unsafe")  # noqa: E711 (of each entry)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be {list(shape)} of whole numbers or None: {error}") from error
    if array.shape != tuple(shape):
        raise ValueError(f"{name} must be {list(shape)}, got {list(array.shape)}")
    if array.dtype.kind not in "iub":
        raise TypeError(f"{name} must hold whole numbers or None, got {array.dtype}")
    return array


def _as_tensor(name: str, rows: Any, like: Tensor) -> Tensor | None:
    """A tensor as it is, lists of rows as one on ``like``'s device."""
    if rows is None or isinstance(rows, Tensor):
        if rows is not None and (rows.is_floating_point() or rows.is_complex()):
            raise TypeError(f"{name} must hold whole numbers, got {rows.dtype}")
        return rows
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise TypeError(f"{name} must be a tensor, as input_ids, or lists of rows, got {type(rows).__name__}")
    return towards(torch.from_numpy(_from_rows(name, rows, like.shape)), like.device)


def _checked_arrays(
    input_ids: Array, samples: Any, special: Any, word_ids: Any
) -> tuple[Array, Array, Array | None, Array | None]:
    """The four without gaps, of the dtypes that the kernels take."""
    if input_ids.ndim != 2 or input_ids.dtype not in (np.int64, np.int32):
        raise TypeError(f"input_ids must be [B, S] of int64 or int32, got {list(input_ids.shape)} of {input_ids.dtype}")
    count, length = input_ids.shape
    if length > LONGEST:
        raise ValueError(f"input_ids must have at most {LONGEST} tokens a row, got {length}")
    ids: Any
    if samples is None:
        ids = sample_ids(None, count, torch.device("cpu")).numpy()
    else:  # an empty list has no type: NumPy takes it for floats
        ids = as_samples(np.asarray(samples, dtype=None if count else np.int64), None)
    if len(ids) != count:
        raise ValueError(f"samples must be as many as the rows, {count}, got {len(ids)}")
    unchosen = None if special is None else _from_rows("special", special, input_ids.shape)
    words = None if word_ids is None else _from_rows("word_ids", word_ids, input_ids.shape)
    if unchosen is not None:
        unchosen = np.ascontiguousarray(unchosen, dtype=np.bool_)
    if words is not None:
        words = np.ascontiguousarray(words, dtype=np.int64)
        if words.size and words.max() >= LONGEST:
            raise ValueError(f"word_ids must be below {LONGEST}, got {words.max()}")
    return np.ascontiguousarray(input_ids), ids, unchosen, words
