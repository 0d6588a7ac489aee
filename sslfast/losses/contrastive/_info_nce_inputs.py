"""What :func:`sslfast.info_nce` and its variants take, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._checks import check_integers, check_keys, check_matrix, readable
from ...ops.l2_normalize import l2_normalize
from .._inputs import check_fits, in_one_dtype

Negatives = Tensor | Sequence[Tensor]


class Inputs(NamedTuple):
    """Checked, in one dtype, rows normalised if asked."""

    q: Tensor  # [M, D]
    k: Tensor  # [N, D]
    positives: Tensor | None  # [M, P] rows of this rank's k, −1 for none; None: row i has k_i
    shared: Tensor | None  # [K, D] negatives of every row
    own: Tensor | None  # [M, H, D] negatives of one row each
    row_ids: Tensor | None  # [M]
    col_ids: Tensor | None  # [N]


class Formula(NamedTuple):
    """Which of the losses over :class:`Inputs`: smoothed, debiased, of rows and columns."""

    label_smoothing: float = 0.0
    tau_plus: float = 0.0
    symmetric: bool = False

    def check(self, x: Inputs) -> None:
        """The formula exists for these inputs."""
        for name in ("label_smoothing", "tau_plus"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be at least 0 and less than 1, got {value}")
            if value and x.row_ids is not None:
                raise ValueError(f"{name}={value} cannot be combined with ids")
        if self.tau_plus and x.positives is not None and x.positives.shape[1] > 1:
            raise ValueError(f"tau_plus={self.tau_plus} takes one positive a row, got several")
        if x.positives is None and len(x.q) > len(x.k):
            raise ValueError(
                f"q has {len(x.q)} rows and k only {len(x.k)}: say with positives which row of k belongs to which"
            )
        if self.symmetric:
            if len(x.q) != len(x.k):
                raise ValueError(f"symmetric=True needs as many rows in q as in k, got {len(x.q)} and {len(x.k)}")
            if x.positives is not None or x.shared is not None or x.own is not None:
                raise ValueError("symmetric=True cannot be combined with positives or negatives")


def checked(
    q: Tensor,
    k: Tensor,
    positives: Tensor | None = None,
    negatives: Negatives | None = None,
    ids: tuple[Tensor, Tensor] | None = None,
    *,
    normalize: bool = True,
) -> Inputs:
    check_matrix("q", q)
    check_matrix("k", k)
    shared, own = _checked_negatives(negatives, len(q))
    q, k, shared, own = in_one_dtype(q, k, shared, own)  # type: ignore[assignment]
    check_keys(q, k)
    for x in (shared, own):
        if x is not None:
            check_fits("negatives", x, "q", q)
    positives = None if positives is None else _checked_positives(positives, q, k)
    row_ids, col_ids = (None, None) if ids is None else _checked_ids(ids, q, k)
    if normalize:
        q, k = l2_normalize(q), l2_normalize(k)
        shared = None if shared is None else l2_normalize(shared)
        own = None if own is None else l2_normalize(own.flatten(0, 1)).view_as(own)
    return Inputs(q, k, positives, shared, own, row_ids, col_ids)


def _checked_negatives(negatives: Negatives | None, rows: int) -> tuple[Tensor | None, Tensor | None]:
    """Shared ones [K, D] and each row's own [M, H, D], told apart by their dimensions."""
    given = [] if negatives is None else [negatives] if isinstance(negatives, Tensor) else list(negatives)
    found: dict[int, Tensor] = {}
    for x in given:
        if not isinstance(x, Tensor):
            raise TypeError(f"negatives must be a torch.Tensor, or two of them, got {type(x).__name__}")
        if x.dim() not in (2, 3) or x.dim() in found or (x.dim() == 3 and (len(x) != rows or x.shape[1] == 0)):
            raise ValueError(
                f"negatives must have shape (K, D), for all rows, or (M, H, D), a row's own, M = {rows} rows of q and "
                f"H at least 1, or be one of each; got {' and '.join(str(tuple(x.shape)) for x in given)}"
            )
        check_matrix("negatives", x.flatten(0, -2))
        found[x.dim()] = x
    return found.get(2), found.get(3)


def _checked_ids(ids: tuple[Tensor, Tensor], q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(ids, Tensor) or len(ids) != 2:
        raise ValueError("ids must be two vectors, (row_ids, col_ids): pairs with equal ids are excluded")
    for name, x, like in zip(("row_ids", "col_ids"), ids, (q, k), strict=True):
        check_integers(name, x, len(like), q.device)
    return ids[0].long(), ids[1].long()


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


def check_diagnostics(x: Inputs) -> None:
    several = x.positives is not None and x.positives.shape[1] > 1
    if several or (x.positives is not None and readable(x.positives) and bool((x.positives < 0).any())):
        raise ValueError("diagnostics=True takes one positive in every row")
