"""BERT's masking of words in NumPy: the same bits as the kernels'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._random.streams import stream_of
from .philox import LOW, philox4x32

Array = np.ndarray[Any, Any]


def _chosen_places(keys: Array, words: Array, budget: int) -> list[int]:
    """Places of one row's candidates, in whole words by (key, word), as BERT's ``create_masked_lm_predictions``."""
    order = sorted(set(zip(keys.tolist(), words.tolist(), strict=True)))
    chosen: list[int] = []
    for _, word in order:
        tokens = np.flatnonzero(words == word).tolist()
        if len(chosen) + len(tokens) <= budget:
            chosen += tokens
    if not chosen and order and budget:
        chosen = np.flatnonzero(words == order[0][1]).tolist()
    return chosen


def mask_arrays(
    input_ids: Array,
    samples: Array,
    special: Array | None,
    word_ids: Array | None,
    limits: Sequence[int],
    mask_id: int,
    vocab_size: int,
    ignore_index: int,
    exact: bool,
    seed: int,
    epoch: int,
    view: int,
) -> tuple[Array, Array]:
    """Inputs and labels, [B, S] each; see ``sslfast.ops.mask_tokens``.

    Token s of a row has the key word s%4 of block s/4 of the row's stream for selection (word w: w%4 of w/4), and block
    s of its stream for replacement: what becomes of it, and which random word.
    """
    rows, length = input_ids.shape
    ids = samples.astype(np.int64).view(np.uint64)[:, None]
    place = np.broadcast_to(np.arange(length), (rows, length))
    word = place if word_ids is None else np.maximum(word_ids, 0)

    def draw(block: Array, purpose: str) -> Array:
        counter = (block | stream_of(purpose, view) << 16, epoch, ids & LOW, ids >> np.uint64(32))
        return np.stack(philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)))  # [4, B, S]

    key = np.take_along_axis(draw(word // 4, "token_selection"), (word % 4)[None], 0)[0]
    candidate = np.ones((rows, length), dtype=bool)
    if special is not None:
        candidate &= ~special
    if word_ids is not None:
        candidate &= word_ids >= 0
    chosen = candidate & (key < limits[0])
    if exact:
        chosen = np.zeros_like(candidate)
        for b in range(rows if limits[0] else 0):
            among = np.flatnonzero(candidate[b])
            budget = max(1, (len(among) * limits[0] + 2**31) >> 32)
            chosen[b, among[_chosen_places(key[b, among], word[b, among], budget)]] = True
    fate, which = draw(place, "token_replacement")[:2]
    random_word = which * np.uint64(vocab_size) >> np.uint64(32)
    replaced = np.where(fate < limits[1], mask_id, np.where(fate < limits[2], random_word.astype(np.int64), input_ids))
    inputs, labels = np.where(chosen, replaced, input_ids), np.where(chosen, input_ids, ignore_index)
    return inputs.astype(input_ids.dtype), labels.astype(input_ids.dtype)


def mask_tokens(
    input_ids: Tensor, samples: Tensor, special: Tensor | None, word_ids: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    """``mask_arrays`` of tensors."""
    arrays = (None if t is None else t.cpu().numpy() for t in (input_ids, samples, special, word_ids))
    inputs, labels = (torch.from_numpy(a).to(input_ids.device) for a in mask_arrays(*arrays, *rest))  # type: ignore[arg-type]
    return inputs, labels
