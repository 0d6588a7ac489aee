"""What :func:`sslfast.info_nce` takes, checked."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._checks import check_integers, check_keys, check_matrix, readable
from ...ops.l2_normalize import l2_normalize
from .._inputs import check_fits, in_one_dtype


class Inputs(NamedTuple):
    """Checked, in one dtype, rows normalised if asked."""

    q: Tensor  # [M, D]
    k: Tensor  # [N, D]
    positives: Tensor | None  # [M, P] rows of this rank's k, −1 for none; None: row i has k_i
    negatives: Tensor | None  # [K, D]
    hard_negatives: Tensor | None  # [M, H, D]


def checked(
    q: Tensor,
    k: Tensor,
    positives: Tensor | None,
    negatives: Tensor | None,
    hard_negatives: Tensor | None,
    normalize: bool,
) -> Inputs:
    check_matrix("q", q)
    check_matrix("k", k)
    if negatives is not None:
        check_matrix("negatives", negatives)
    if hard_negatives is not None:
        if not isinstance(hard_negatives, Tensor):
            raise TypeError(f"hard_negatives must be a torch.Tensor, got {type(hard_negatives).__name__}")
        if hard_negatives.dim() != 3 or hard_negatives.shape[0] != q.shape[0] or hard_negatives.shape[1] == 0:
            raise ValueError(
                f"hard_negatives must have shape (M, H, D), M = {q.shape[0]} rows of q and H at least 1, "
                f"got {tuple(hard_negatives.shape)}"
            )
        check_matrix("hard_negatives", hard_negatives.flatten(0, 1))
    q, k, negatives, hard_negatives = in_one_dtype(q, k, negatives, hard_negatives)  # type: ignore[assignment]
    check_keys(q, k)
    for name, x in (("negatives", negatives), ("hard_negatives", hard_negatives)):
        if x is not None:
            check_fits(name, x, "q", q)
    positives = None if positives is None else _checked_positives(positives, q, k)
    if normalize:
        q, k = l2_normalize(q), l2_normalize(k)
        negatives = None if negatives is None else l2_normalize(negatives)
        if hard_negatives is not None:
            hard_negatives = l2_normalize(hard_negatives.flatten(0, 1)).view_as(hard_negatives)
    return Inputs(q, k, positives, negatives, hard_negatives)


def _checked_positives(positives: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """``positives`` as [M, P] int64."""
    if not isinstance(positives, Tensor):
        raise TypeError(f"positives must be a torch.Tensor, got {type(positives).__name__}")
    if positives.dim() not in (1, 2) or positives.shape[0] != q.shape[0] or positives.numel() == 0:
        raise ValueError(
            f"positives must have shape ({q.shape[0]},) or ({q.shape[0]}, P), got {tuple(positives.shape)}"
        )
    check_integers("positives", positives.flatten(), positives.numel(), q.device)
    if readable(positives):
        low, high = (int(x) for x in torch.aminmax(positives))
        if low < -1 or high >= k.shape[0]:
            raise ValueError(f"positives must be rows of k, 0 to {k.shape[0] - 1}, or -1 for none; got {low} to {high}")
    return positives.long().reshape(q.shape[0], -1)


def check_options(
    x: Inputs,
    row_ids: Tensor | None,
    label_smoothing: float,
    tau_plus: float,
    symmetric: bool,
    diagnostics: bool,
) -> None:
    for name, value in (("label_smoothing", label_smoothing), ("tau_plus", tau_plus)):
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} must be at least 0 and less than 1, got {value}")
        if value and row_ids is not None:
            raise ValueError(f"{name}={value} cannot be combined with row_ids and col_ids")
    several = x.positives is not None and x.positives.shape[1] > 1
    if several and tau_plus:
        raise ValueError(f"tau_plus={tau_plus} takes one positive a row, got several")
    if diagnostics and (several or (x.positives is not None and _some_missing(x.positives))):
        raise ValueError("diagnostics=True takes one positive in every row")
    if x.positives is None and x.q.shape[0] > x.k.shape[0]:
        raise ValueError(
            f"q has {x.q.shape[0]} rows and k only {x.k.shape[0]}: say with positives which row of k belongs to which"
        )
    if symmetric:
        if x.q.shape[0] != x.k.shape[0]:
            raise ValueError(f"symmetric=True needs as many rows in q as in k, got {x.q.shape[0]} and {x.k.shape[0]}")
        if x.positives is not None or x.negatives is not None or x.hard_negatives is not None:
            raise ValueError("symmetric=True cannot be combined with positives, negatives or hard_negatives")


def _some_missing(positives: Tensor) -> bool:
    """Whether a positive is −1, where reading it costs nothing."""
    return readable(positives) and bool((positives < 0).any())
