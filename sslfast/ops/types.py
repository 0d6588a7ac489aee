"""What operations take and give back where it is more than one tensor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import (
    accumulator,
    check_integers,
    check_keys,
    check_matrix,
    check_same,
    is_real,
    readable,
    scalar_tensor,
)

SCALES = ("none", "variance", "norm")
FORMS = ("auto", "primal", "dual")
STATISTICS = ("global", "local")


class Pairs(NamedTuple):
    """Rows against columns, ``s_ij = scale·q_i·k_j + bias_j``, and which of the pairs take part.

    :meth:`checked` makes them of what a user gave; what takes them trusts them.

    Attributes:
        q: [M, D].
        k: [N, D]; ``None``: the rows against themselves, whose tiles are symmetric, so that half of them is enough.
        scale: [] in the accumulator's dtype.
        bias: [N] in the accumulator's dtype, or ``None``.
        row_ids, col_ids: [M] and [N] int64, or ``None``: pairs with equal ids take no part. Without ``k`` the columns
            have the rows' ids, and ``col_ids`` is ``None``.
        positives: [M] int64 columns, −1 for none; or ``None``.
    """

    q: Tensor
    k: Tensor | None
    scale: Tensor
    bias: Tensor | None = None
    row_ids: Tensor | None = None
    col_ids: Tensor | None = None
    positives: Tensor | None = None

    def check(self) -> None:
        """Every argument of a user's is one that :func:`sslfast.similarity_terms` takes.

        Raises:
            TypeError: dtypes differ or are not floating point, ids are not integers.
            ValueError: shapes, widths, devices or lengths do not fit; only one of row_ids and col_ids is given.
        """
        q, columns = self.q, self.columns
        if self.k is None:
            check_matrix("q", q)
            if self.col_ids is not None:
                raise ValueError("col_ids belong to k, and k is None: the columns are the rows and have row_ids")
        else:
            check_keys(q, self.k)
            if (self.row_ids is None) != (self.col_ids is None):
                raise ValueError("row_ids and col_ids must be given together: pairs with equal ids are excluded")
        for name, ids, rows in (
            ("row_ids", self.row_ids, q),
            ("col_ids", self.col_ids, columns),
            ("positives", self.positives, q),
        ):
            if ids is not None:
                check_integers(name, ids, len(rows), q.device)
        bias = self.bias
        if bias is not None and (
            bias.shape != columns.shape[:1] or not bias.is_floating_point() or bias.device != q.device
        ):
            raise ValueError(
                f"bias must be a floating-point tensor of shape ({len(columns)},) on {q.device}, "
                f"got shape {tuple(bias.shape)}, {bias.dtype}, on {bias.device}"
            )

    def converted(self) -> Pairs:
        """In the dtypes that the operators take; the scale, which may be a number, as a tensor."""
        row_ids, col_ids, positives = (
            None if x is None else x.long() for x in (self.row_ids, self.col_ids, self.positives)
        )
        bias = None if self.bias is None else self.bias.to(accumulator(self.q))
        return Pairs(self.q, self.k, scalar_tensor("scale", self.scale, self.q), bias, row_ids, col_ids, positives)

    def checked(self) -> Pairs:
        """The pairs of a user's arguments."""
        self.check()
        return self.converted()

    def check_positives(self, columns: int, where: str = "k") -> None:
        """Positives are columns, as far as looking at them costs nothing; on a GPU one beyond them counts as none."""
        if self.positives is not None and readable(self.positives):
            low, high = (int(x) for x in torch.aminmax(self.positives))
            if low < -1 or high >= columns:
                raise ValueError(
                    f"positives must be columns of {where}, 0 to {columns - 1}, or -1 for none; got {low} to {high}"
                )

    @property
    def columns(self) -> Tensor:
        """The rows that stand for columns, [N, D]."""
        return self.q if self.k is None else self.k

    def rectangular(self) -> Pairs:
        """The same with columns of its own."""
        return self if self.k is not None else self._replace(k=self.q, col_ids=self.row_ids)


class Want(NamedTuple):
    """What a pass gives beside the row LSE.

    Attributes:
        columns: the column LSE.
        hardest: the largest negative logit of each row.
    """

    columns: bool = False
    hardest: bool = False


ROW_LSE = Want()


class SimilarityTerms(NamedTuple):
    """What one pass over the tiles gives; ``None`` where it was not asked for.

    ``row_lse`` [M], ``col_lse`` [N], ``positive`` [M] (logit of each row's positive), ``hardest`` [M] (largest logit of
    a row among the columns that are neither excluded nor its positive; without gradient; −inf where there is none).

    Example:
        >>> terms = sslfast.similarity_terms(torch.eye(2), torch.eye(2), 2.0, positives=torch.arange(2))
        >>> terms.positive.tolist(), terms.col_lse is None
        ([2.0, 2.0], True)
    """

    row_lse: Tensor
    col_lse: Tensor | None
    positive: Tensor | None
    hardest: Tensor | None


class MomentOptions(NamedTuple):
    """What :func:`sslfast.second_moment` is asked for, beside the batches.

    Attributes:
        cross: the moments between a and b instead of those of each.
        center: columns lose their mean first.
        scale: "none", "variance" or "norm": what columns are divided by.
        eps: lower bound of that.
        form: "auto", "primal" or "dual".
        statistics: over several ranks, whose rows give means and scales: "global" or "local". Of one process the same.
    """

    cross: bool = False
    center: bool = True
    scale: str = "none"
    eps: float = 1e-5
    form: str = "auto"
    statistics: str = "global"

    def check(self, a: Tensor, b: Tensor | None) -> None:
        """These options, and batches a user gave.

        Raises:
            TypeError: dtypes are not floating point, or differ.
            ValueError: not matrices of one shape, on one device; ``cross`` without ``b``; an option is not among those
                named; ``eps`` is not positive.
        """
        check_matrix("a", a)
        if b is not None:
            check_matrix("b", b)
            check_same("a", a, "b", b)
        elif self.cross:
            raise ValueError("cross=True needs b: the moments between two batches")
        for name, value, allowed in (
            ("scale", self.scale, SCALES),
            ("statistics", self.statistics, STATISTICS),
            ("form", self.form, FORMS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        if not is_real(self.eps) or not self.eps > 0:
            raise ValueError(f"eps must be a positive number, got {self.eps!r}")

    def is_dual(self, rows: int, features: int) -> bool:
        """Whether Gram matrices are computed: where asked for, or cheaper."""
        return dual_is_cheaper(rows, features) if self.form == "auto" else self.form == "dual"


def dual_is_cheaper(n: int, d: int) -> bool:
    """The cost model of ``form="auto"``: N × N Gram matrices where the batch is clearly smaller than the width.

    Both forms do 3·N·D·min(N, D) operations a batch, so the border is at N = D. It is drawn a little before, because
    the dual form subtracts Σ M_ii² from ‖M‖²: M has rank at most N, so of a matrix whose diagonal is even at least
    1 − N/D of ‖M‖² is left.
    """
    return 10 * n <= 9 * d


class SecondMoment(NamedTuple):
    """What a second-moment matrix M (one for each of R pairs of batches) says.

    Attributes:
        off_diagonal: [R], Σ_{i≠j} M_ij².
        diagonal: [R, D], M_ii.
        distance: [], ‖a − b‖²_F, or 0.

    Example:
        >>> moment = sslfast.second_moment(torch.eye(2), torch.zeros(2, 2), center=False)
        >>> moment.diagonal.tolist(), moment.distance.item()
        ([[1.0, 1.0], [0.0, 0.0]], 2.0)
    """

    off_diagonal: Tensor
    diagonal: Tensor
    distance: Tensor


class NormalizedPrototypes(NamedTuple):
    """Prototypes with weight normalisation: rows ``gain_k·v_k/max(‖v_k‖, 1e-12)`` of ``direction`` v, never stored.

    Attributes:
        direction: [K, D].
        gain: [K], or ``None`` for ones; DINO's ``last_layer.weight_g`` without its second dimension.

    Example:
        >>> prototypes = sslfast.NormalizedPrototypes(torch.tensor([[3.0, 4.0]]))
        >>> h = torch.eye(2)
        >>> round(sslfast.prototype_cross_entropy(h, h, prototypes).item(), 4)  # one prototype: nothing to tell apart
        0.0
    """

    direction: Tensor
    gain: Tensor | None = None
