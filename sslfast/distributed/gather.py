"""The columns of all ranks on every rank: one gather forward, one exchange of gradients backward."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .._checks import accumulator, check_integers, check_keys
from ..ops.similarity_logsigmoid import similarity_logsigmoid
from ..ops.similarity_lse import terms_of
from ..ops.sinkhorn import column_sums, updated
from ..ops.types import ROW_LSE, MomentOptions, Pairs, SecondMoment, SimilarityTerms, Want
from . import moments
from .agreement import Trait, sizes_of
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
    def shard(self, x: Tensor, traits: Mapping[str, int | float | str] | None = None) -> Shard:
        sizes = sizes_of(self.ranks, "shard", x, traits or {})
        rank = self.ranks.rank
        return Shard(local=sizes[rank], offset=sum(sizes[:rank]), total=sum(sizes), sizes=sizes)

    @torch.compiler.disable(reason=NOT_TRACED)
    def terms(self, pairs: Pairs, want: Want = ROW_LSE, *, trusted: bool = True) -> SimilarityTerms:
        sizes = self._agreed(pairs, want, trusted)
        pairs = (pairs if trusted else pairs.converted()).rectangular()
        pairs.check_positives(sum(sizes), "all ranks")
        terms = terms_of(
            pairs._replace(
                k=gather_rows(pairs.columns, sizes, self.ranks),
                bias=None if pairs.bias is None else gather_rows(pairs.bias, sizes, self.ranks),
                col_ids=None if pairs.col_ids is None else gather_rows(pairs.col_ids, sizes, self.ranks),
            ),
            want,
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
    def moment(self, a: Tensor, b: Tensor | None, options: MomentOptions) -> SecondMoment:
        return moments.second_moment(self.ranks, a, b, options)

    @torch.compiler.disable(reason=NOT_TRACED)
    def sinkhorn_bias(
        self,
        logits: Tensor,
        temperature: float,
        iterations: int = 3,
        *,
        row_start: bool = False,
        rows: Tensor | None = None,
    ) -> Tensor:
        positions, prototypes = logits.shape[1:]
        traits = {
            "positions": positions,
            "prototypes": prototypes,
            "iterations": iterations,
            "the temperature": float(temperature),
            "the start (True: rows)": row_start,
        }
        self._agreed_columns("sinkhorn", logits, traits)
        bias = logits.new_zeros(positions, prototypes, dtype=accumulator(logits)) if row_start else None
        for _ in range(iterations):
            largest, sums = column_sums(logits, bias, temperature, rows)
            if bias is None:
                most = self.ranks.all_reduce_largest(largest)
                sums = torch.exp(largest - most) * sums
                largest = most
            bias = updated(bias, largest, self.ranks.all_reduce(sums))
        assert bias is not None
        return bias

    @torch.compiler.disable(reason=NOT_TRACED)
    def row_totals(self, total: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        self._agreed_columns("row_totals", total, {"features": len(total)})
        every = self.ranks.all_reduce(torch.cat([total, rows.reshape(1).to(total)]))
        return every[:-1], every[-1]

    def _agreed_columns(self, call: str, x: Tensor, traits: Mapping[str, Trait]) -> None:
        """What the ranks are about to sum has the same columns; its rows are each rank's own, and may be none."""
        sizes_of(self.ranks, call, x.new_empty(1), traits)

    @torch.compiler.disable(reason=NOT_TRACED)
    def gather(self, x: Tensor) -> Tensor:
        sizes = sizes_of(self.ranks, "gather", x, {"whether x needs a gradient": learns(x)})
        return gather_rows(x, sizes, self.ranks)

    @torch.compiler.disable(reason=NOT_TRACED)
    def total(self, x: Tensor) -> Tensor:
        return total(x, self.ranks)

    def _agreed(self, pairs: Pairs, want: Want, trusted: bool) -> tuple[int, ...]:
        """The ranks' numbers of columns; what one of them refuses is told to all."""
        traits = {
            "the strategy (True: ring)": self._is_ring,
            "whether bias is given": pairs.bias is not None,
            "whether ids are given": pairs.row_ids is not None,
            "columns": want.columns,
            "whether k needs a gradient": learns(pairs.columns),
            "whether bias needs a gradient": learns(pairs.bias),
            "whether q or scale needs a gradient": learns(pairs.q) or _learns(pairs.scale),
        }
        return sizes_of(self.ranks, "similarity_terms", pairs.columns, traits, None if trusted else pairs.check)

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
