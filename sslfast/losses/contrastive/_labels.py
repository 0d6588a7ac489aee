"""Which columns are a row's positives when both carry class labels: by sorting, without a matrix of pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._checks import FLOATS, check_integers, check_matrix, readable
from ...ops.l2_normalize import l2_normalize
from ...ops.types import Pairs
from .._inputs import check_fits, in_one_dtype


class LabelledRows(NamedTuple):
    """Checked rows and columns in one dtype, normalised if asked; int64 labels."""

    rows: Tensor  # [M, D]
    labels: Tensor  # [M]
    keys: Tensor | None  # [N, D]; None: the rows are contrasted with themselves
    column_labels: Tensor  # [N]
    own: Tensor | None  # [M] the column that a row itself stands in, −1 for none

    @property
    def columns(self) -> Tensor:
        return self.rows if self.keys is None else self.keys

    def pairs(self, scale: Tensor, row_ids: Tensor | None, col_ids: Tensor | None, positives: Tensor | None) -> Pairs:
        """Rows against columns; ``col_ids`` count where there are keys."""
        return Pairs(self.rows, self.keys, scale, None, row_ids, None if self.keys is None else col_ids, positives)

    def matches(self) -> Matches:
        """The positives of every row."""
        ordered, order = self.column_labels.sort(stable=True)
        first = torch.searchsorted(ordered, self.labels)
        last = torch.searchsorted(ordered, self.labels, right=True)
        count = last - first
        top = len(order) - 1
        only = order.index_select(0, first.clamp(max=top))
        if self.own is not None:
            there = self.own.clamp(min=0)
            itself = (self.own >= 0) & (self.column_labels.index_select(0, there) == self.labels)
            count = count - itself.long()
            second = order.index_select(0, (first + 1).clamp(max=top))
            only = torch.where(itself & (only == self.own), second, only)
        return Matches(order, first, last, count, torch.where(count == 1, only, -1))


class Matches(NamedTuple):
    """Columns sorted by label; the class of row i stands at ``order[first_i:last_i]``, the row itself included."""

    order: Tensor  # [N]
    first: Tensor  # [M]
    last: Tensor  # [M]
    positives: Tensor  # [M] how many, the row itself left out
    only: Tensor  # [M] the column of a row's positive if it has just one, else −1


def class_ids(name: str, labels: Tensor, length: int, device: torch.device) -> Tensor:
    """Labels [length] as int64, equal where they are equal: of floats their bits, those of float64."""
    if isinstance(labels, Tensor) and labels.dtype in (*FLOATS, torch.bool):
        if labels.is_floating_point():
            if readable(labels) and bool(labels.isnan().any()):
                raise ValueError(f"{name} must be no NaN, which equals no label, not even itself")
            labels = (labels.detach().double() + 0.0).view(torch.int64)  # −0 + 0 is 0
        else:
            labels = labels.long()
    check_integers(name, labels, length, device)
    return labels.long().contiguous()


def labelled_rows(
    z: Tensor,
    labels: Tensor,
    keys: Tensor | None,
    key_labels: Tensor | None,
    own: Tensor | None,
    normalize: bool,
) -> LabelledRows:
    """The arguments that the losses over labelled pairs share, checked; without keys every row leaves itself out."""
    check_matrix("z", z)
    if isinstance(key_labels, Tensor) and isinstance(labels, Tensor) and key_labels.is_floating_point():
        labels = labels.double()
    elif isinstance(key_labels, Tensor) and isinstance(labels, Tensor) and labels.is_floating_point():
        key_labels = key_labels.double()
    labels = class_ids("labels", labels, z.shape[0], z.device)
    if keys is None:
        if key_labels is not None or own is not None:
            raise ValueError("key_labels and own belong to keys, and keys is None")
        rows = l2_normalize(z) if normalize else z
        itself = torch.arange(z.shape[0], device=z.device)
        return LabelledRows(rows, labels, None, labels, itself)
    check_matrix("keys", keys)
    if key_labels is None:
        raise ValueError("keys need key_labels")
    key_labels = class_ids("key_labels", key_labels, keys.shape[0], z.device)
    if own is not None:
        check_integers("own", own, z.shape[0], z.device)
        own = own.long()
    first, second = in_one_dtype(z, keys)
    assert first is not None and second is not None
    check_fits("keys", second, "z", first)
    if normalize:
        first, second = l2_normalize(first), l2_normalize(second)
    return LabelledRows(first, labels, second, key_labels, own)
