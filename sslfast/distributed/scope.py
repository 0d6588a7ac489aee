"""Over which rows a loss runs: the local batch, or the batches of all ranks.

A loss is written once against a :class:`Scope`. Every rank holds its own rows; results are for the local rows (and
local columns) against the rows of the whole scope, and gradients reach the rows wherever they live.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..ops.second_moment import moment_of
from ..ops.similarity_logsigmoid import similarity_logsigmoid
from ..ops.similarity_lse import terms_of
from ..ops.sinkhorn import bias_of
from ..ops.types import ROW_LSE, MomentOptions, Pairs, SecondMoment, SimilarityTerms, Want

STRATEGIES = ("gather", "ring")


@dataclass(frozen=True)
class Shard:
    """Where this rank's rows stand in the global batch: ``local`` rows from ``offset`` on, of ``total``.

    Attributes:
        local: how many rows this rank has.
        offset: the number of its first one.
        total: rows of all ranks.
        sizes: rows of each rank.

    Example:
        >>> sslfast.distributed.Shard(local=3, offset=2, total=5, sizes=(2, 3)).weight
        0.4
    """

    local: int
    offset: int
    total: int
    sizes: tuple[int, ...]

    @property
    def world_size(self) -> int:
        return len(self.sizes)

    @property
    def weight(self) -> float:
        """W / total: a rank's loss is this times the sum over its rows, so that the mean over ranks is the global mean.

        DDP averages gradients over ranks, so this is also what makes them those of the global mean, for uneven local
        batches too.
        """
        return self.world_size / self.total

    def ids(self, device: torch.device) -> Tensor:
        """The local rows' numbers in the global batch, int64."""
        return torch.arange(self.offset, self.offset + self.local, device=device)


class Scope:
    """The local batch alone. Subclasses span a process group with the same methods.

    Example:
        >>> scope = sslfast.distributed.Scope()
        >>> shard = scope.shard(torch.eye(4))
        >>> ids = shard.ids(torch.device("cpu"))
        >>> terms = scope.similarity_terms(torch.eye(4), torch.eye(4), 2.0, positives=ids)
        >>> round((shard.weight * (terms.row_lse - terms.positive).sum()).item(), 4)  # InfoNCE
        0.3408
    """

    def shard(self, x: Tensor, traits: Mapping[str, int | float | str] | None = None) -> Shard:
        """The place of the local rows ``x`` [n, ...] in the global batch.

        ``traits``: what must be the same on every rank, by the words that an error uses.
        """
        n = x.shape[0]
        return Shard(local=n, offset=0, total=n, sizes=(n,))

    def similarity_terms(
        self,
        q: Tensor,
        k: Tensor | None = None,
        scale: float | Tensor = 1.0,
        *,
        bias: Tensor | None = None,
        row_ids: Tensor | None = None,
        col_ids: Tensor | None = None,
        columns: bool = False,
        positives: Tensor | None = None,
        hardest: bool = False,
    ) -> SimilarityTerms:
        """:func:`sslfast.similarity_terms`: local rows against global columns, local columns against global rows.

        ``bias`` belongs to the local columns; ids must be unique over the ranks; ``positives`` are global columns.
        """
        pairs = Pairs(q, k, cast(Tensor, scale), bias, row_ids, col_ids, positives)
        return self.terms(pairs, Want(columns, hardest), trusted=False)

    def terms(self, pairs: Pairs, want: Want = ROW_LSE, *, trusted: bool = True) -> SimilarityTerms:
        """:meth:`similarity_terms` of pairs that have been checked, or are to be."""
        pairs = pairs if trusted else pairs.checked()
        pairs.check_positives(len(pairs.columns))
        return terms_of(pairs, want)

    def similarity_logsigmoid(
        self, q: Tensor, k: Tensor, scale: float | Tensor, bias: float | Tensor, *, row_ids: Tensor, col_ids: Tensor
    ) -> Tensor:
        """:func:`sslfast.similarity_logsigmoid`, the sum over local rows and global columns."""
        return similarity_logsigmoid(q, k, scale, bias, row_ids=row_ids, col_ids=col_ids)

    def second_moment(
        self,
        a: Tensor,
        b: Tensor | None = None,
        *,
        cross: bool = False,
        center: bool = True,
        scale: str = "none",
        eps: float = 1e-5,
        statistics: str = "global",
        form: str = "auto",
    ) -> SecondMoment:
        """:func:`sslfast.second_moment` of the rows of the whole scope; every rank gets the same numbers.

        ``statistics``: means and scales of the columns are those of all rows (``"global"``) or of each rank's own
        (``"local"``; the moments are still summed over all). ``form``: "auto", "primal" or "dual", over ranks also
        what travels: M or the rows.
        """
        return self.moment(a, b, MomentOptions(cross, center, scale, eps, form, statistics))

    def moment(self, a: Tensor, b: Tensor | None, options: MomentOptions) -> SecondMoment:
        """:meth:`second_moment`, its options as one argument."""
        options.check(a, b)
        return moment_of(a, b, options)

    def sinkhorn_bias(
        self,
        logits: Tensor,
        temperature: float,
        iterations: int = 3,
        *,
        row_start: bool = False,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The bias f [S, K] of :func:`sslfast.sinkhorn_bias` over the rows of the whole scope; the same on every rank.

        ``logits`` [B, S, K] have been checked. A rank may have no row.
        """
        return bias_of(logits, temperature, iterations, row_start, rows)

    def row_totals(self, total: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The sum [K] and the number [] of rows of which this rank has ``total`` and ``rows``, perhaps none."""
        return total, rows

    def gather(self, x: Tensor) -> Tensor:
        """The rows ``x`` [n, ...] of all ranks, in rank order; the gradient of each row is summed over the ranks."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over the ranks; the gradient is summed over the ranks too."""
        return x


def check_strategy(strategy: str) -> None:
    """``strategy`` is one of ``STRATEGIES``."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(map(repr, STRATEGIES))}, got {strategy!r}")
