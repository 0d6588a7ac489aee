"""Supervised contrastive loss of labelled rows against labelled keys, or against each other, one view of each."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import accumulator
from ...ops.similarity_lse import terms_of
from ._inputs import inverse
from ._labels import labelled_rows
from .sup_con import REDUCTIONS, _sum_by_class


def sup_con_keys(
    z: Tensor,
    labels: Tensor,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    *,
    own: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    reduction: str = "mean_nonzero",
) -> Tensor:
    """Supervised contrastive loss, the form L_out, of anchors against keys (a memory, another tower, another view).

        ℓ_i = log Σ_{a≠own_i} exp(z_i·k_a/τ) − (1/|P(i)|) Σ_{p∈P(i)} z_i·k_p/τ

    ``P(i)``: the keys of i's class without ``own_i``. An anchor with none has ℓ_i = 0. Extra memory grows as (M + N)·D.
    For several views of a sample, options of the authors' code, and many processes see :func:`sslfast.sup_con`.

    Args:
        z: [M, D] anchors; float32, float64, bfloat16 or float16.
        labels: [M] classes, as integers, floats or truth values.
        keys, key_labels: [N, D] and [N]. Default: the anchors themselves, no row contrasted with itself. Without
            gradient if they want none.
        own: [M] integers, the key that an anchor itself stands in, which takes no part; −1 for none. Default: none.
            Only with keys.
        temperature: τ, finite and not zero (default 0.1); or a one-element tensor, which receives its gradient.
        normalize: divide each row by its norm first (default).
        reduction: ``"mean_nonzero"`` (default): over the anchors with ℓ_i > 0; 0 where there is none. ``"mean"``: over
            all anchors. Of an anchor with a single positive ℓ_i is 0 just where float32 cannot tell its sum from its
            positive's part of it.

    Returns:
        [] float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: shapes, widths, dtypes or devices do not fit; labels are not integers; ``reduction`` is
            neither of the two; the temperature is zero or not finite.

    Source: Khosla et al. 2020, "Supervised Contrastive Learning", equation 2.

    Example:
        >>> z, labels = torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2)  # four classes of two
        >>> round(sslfast.sup_con_keys(z, labels, temperature=0.5).item(), 4)
        0.5944
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean' or 'mean_nonzero', got {reduction!r}")
    x = labelled_rows(z, labels, keys, key_labels, own, normalize)
    scale = inverse(temperature, x.rows)
    matches = x.matches()
    own, numbers = x.own, None
    if own is not None:
        numbers = torch.arange(len(x.column_labels), device=own.device)
    terms = terms_of(x.pairs(scale, own, numbers, matches.only))
    assert terms.positive is not None
    # The class sums: a class is numbered by the first place of its label in the sorted columns.
    wide, columns = (t.to(accumulator(t)) for t in (x.rows, x.columns))
    ordered = x.column_labels.index_select(0, matches.order)
    sums = _sum_by_class(torch.searchsorted(ordered, x.column_labels), columns, len(ordered))
    positives = sums.index_select(0, matches.first.clamp(max=len(ordered) - 1))  # [M, D]
    if own is not None:
        itself = (matches.last - matches.first - matches.positives)[:, None] > 0
        positives = positives - torch.where(itself, columns.index_select(0, own.clamp(min=0)), 0.0)
    mean = scale * (wide * positives).sum(1) / matches.positives.clamp(min=1)
    # A single positive's logit is the very number in the sums, so that what it dominates ends at 0, not at rounding.
    each = terms.row_lse - torch.where(matches.positives == 1, terms.positive, mean)
    each = torch.where(matches.positives > 0, each, 0.0)
    if reduction == "mean":
        return each.mean()
    nonzero = ~(each <= 0)  # a NaN counts, and comes out
    return torch.where(nonzero, each, 0.0).sum() / nonzero.sum().clamp(min=1)
