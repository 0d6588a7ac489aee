"""The columns of all ranks on every rank: one gather forward, one exchange of gradients backward."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import accumulator, check_integers, check_keys, readable
from ..ops.similarity_logsigmoid import similarity_logsigmoid
from ..ops.similarity_lse import similarity_terms
from ..ops.types import SecondMoment, SimilarityTerms
from . import moments
from .agreement import sizes_of
from .collectives import Ranks, gather_rows, parts_of_mine, total
from .scope import Scope, Shard

NOT_TRACED = "collectives with sizes that the host reads"


def learns(x: Tensor | None) -> bool:
    """A gradient for ``x`` is recorded here."""
    return x is not None and x.requires_grad and torch.is_grad_enabled()


def _learns(x: float | Tensor) -> bool:
    return isinstance(x, Tensor) and learns(x)


def _merged_lse(parts: Tensor) -> Tensor:
    """Log-sum-exp over the ranks of [W, n] partial ones; −inf, with zero gradient, where all are."""
    empty = (parts == float("-inf")).all(0)
    return parts.masked_fill(empty, 0.0).logsumexp(0).masked_fill(empty, float("-inf"))


class GatherScope(Scope):
    """The batches of all ranks of a group, each of which holds all columns: (W − 1)·n·D numbers received a rank."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    @torch.compiler.disable(reason=NOT_TRACED)
    def shard(self, x: Tensor) -> Shard:
        sizes = sizes_of(self.ranks, "shard", x, {})
        rank = self.ranks.rank
        return Shard(local=sizes[rank], offset=sum(sizes[:rank]), total=sum(sizes), sizes=sizes)

    @torch.compiler.disable(reason=NOT_TRACED)
    def similarity_terms(
        self,
        q: Tensor,
        k: Tensor,
        scale: float | Tensor,
        *,
        bias: Tensor | None = None,
        row_ids: Tensor | None = None,
        col_ids: Tensor | None = None,
        columns: bool = False,
        positives: Tensor | None = None,
        hardest: bool = False,
    ) -> SimilarityTerms:
        sizes = self._agreed(q, k, scale, bias, row_ids, col_ids, columns, positives)
        terms = similarity_terms(
            q,
            gather_rows(k, sizes, self.ranks),
            scale,
            bias=None if bias is None else gather_rows(bias.to(accumulator(q)), sizes, self.ranks),
            row_ids=row_ids,
            col_ids=None if col_ids is None else gather_rows(col_ids.long(), sizes, self.ranks),
            columns=columns,
            positives=positives,
            hardest=hardest,
        )
        if terms.col_lse is None:
            return terms
        return terms._replace(col_lse=_merged_lse(parts_of_mine(terms.col_lse, sizes, self.ranks)))

    @torch.compiler.disable(reason=NOT_TRACED)
    def similarity_logsigmoid(
        self, q: Tensor, k: Tensor, scale: float | Tensor, bias: float | Tensor, *, row_ids: Tensor, col_ids: Tensor
    ) -> Tensor:
        sizes = self._agreed_pairs(q, k, scale, bias, row_ids, col_ids)
        k = gather_rows(k, sizes, self.ranks)
        col_ids = gather_rows(col_ids.long(), sizes, self.ranks)
        return similarity_logsigmoid(q, k, scale, bias, row_ids=row_ids, col_ids=col_ids)

    @torch.compiler.disable(reason=NOT_TRACED)
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
        return moments.second_moment(self.ranks, a, b, moments.Options(cross, center, scale, eps, statistics, form))

    @torch.compiler.disable(reason=NOT_TRACED)
    def gather(self, x: Tensor) -> Tensor:
        sizes = sizes_of(self.ranks, "gather", x, {"whether x needs a gradient": learns(x)})
        return gather_rows(x, sizes, self.ranks)

    @torch.compiler.disable(reason=NOT_TRACED)
    def total(self, x: Tensor) -> Tensor:
        return total(x, self.ranks)

    def _agreed(
        self,
        q: Tensor,
        k: Tensor,
        scale: float | Tensor,
        bias: Tensor | None,
        row_ids: Tensor | None,
        col_ids: Tensor | None,
        columns: bool,
        positives: Tensor | None,
    ) -> tuple[int, ...]:
        """The ranks' numbers of columns for ``similarity_terms``."""

        def check() -> None:
            check_keys(q, k)
            if (row_ids is None) != (col_ids is None):
                raise ValueError("row_ids and col_ids must be given together: pairs with equal ids are excluded")
            for name, ids, rows in (("row_ids", row_ids, q), ("col_ids", col_ids, k), ("positives", positives, q)):
                if ids is not None:
                    check_integers(name, ids, len(rows), q.device)
            if bias is not None and (bias.shape != k.shape[:1] or not bias.is_floating_point()):
                raise ValueError(
                    f"bias must be a floating-point tensor of shape ({len(k)},), "
                    f"got shape {tuple(bias.shape)}, {bias.dtype}"
                )

        traits = {
            "the strategy (True: ring)": self._is_ring,
            "whether bias is given": bias is not None,
            "whether ids are given": row_ids is not None,
            "columns": columns,
            "whether k needs a gradient": learns(k),
            "whether bias needs a gradient": learns(bias),
            "whether q or scale needs a gradient": learns(q) or _learns(scale),
        }
        sizes = sizes_of(self.ranks, "similarity_terms", k, traits, check)
        if positives is not None and readable(positives):
            low, high = (int(x) for x in torch.aminmax(positives))
            if low < -1 or high >= sum(sizes):
                raise ValueError(
                    f"positives must be columns of all ranks, 0 to {sum(sizes) - 1}, or -1 for none; "
                    f"got {low} to {high}"
                )
        return sizes

    def _agreed_pairs(
        self, q: Tensor, k: Tensor, scale: float | Tensor, bias: float | Tensor, row_ids: Tensor, col_ids: Tensor
    ) -> tuple[int, ...]:
        """The ranks' numbers of columns for ``similarity_logsigmoid``."""

        def check() -> None:
            check_keys(q, k)
            check_integers("row_ids", row_ids, len(q), q.device)
            check_integers("col_ids", col_ids, len(k), q.device)

        traits = {
            "the strategy (True: ring)": self._is_ring,
            "whether k needs a gradient": learns(k),
            "whether q, scale or bias needs a gradient": learns(q) or _learns(scale) or _learns(bias),
        }
        return sizes_of(self.ranks, "similarity_logsigmoid", k, traits, check)

    _is_ring = False
