"""Columns that visit rank after rank: no rank ever holds the global batch, and sending hides behind computing.

Forward, a block of k goes once round the ring (with its bias, ids and running column statistics); the rows' statistics
stay. Backward, it goes round again, with the total column statistics and their gradients, and collects its dk in
float32. A rank sends (W − 1)·n·D numbers forward; backward the same again and W·n·D float32 numbers of dk.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _backends, _library
from .._checks import scalar_tensor
from .._warn import warn_user
from ..ops.similarity_logsigmoid import why_not as why_not_logsigmoid
from ..ops.similarity_lse import why_not as why_not_lse
from ..ops.types import ROW_LSE, Pairs, SimilarityTerms, Want
from . import blocks
from .blocks import LogsigmoidBlock, Statistics
from .collectives import Block, Ranks, recorded, travel
from .gather import NOT_TRACED, GatherScope, learns

_told: set[str] = set()


class _Plan(NamedTuple):
    """What does not change from hop to hop."""

    ranks: Ranks
    sizes: tuple[int, ...]
    backend: str
    want: Want

    def positives_in(self, owner: int, positives: Tensor | None) -> Tensor | None:
        """Global columns as columns of ``owner``'s block, −1 where they are elsewhere."""
        if positives is None:
            return None
        first = list(accumulate(self.sizes, initial=0))[owner]
        inside = (positives >= first) & (positives < first + self.sizes[owner])
        return torch.where(inside, positives - first, -1)


class _Refusal(torch.autograd.Function):
    """Passes a gradient on, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *_: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        raise RuntimeError("strategy='ring' can be differentiated once only; strategy='gather' twice")


def _once(grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Under ``create_graph=True``: gradients that depend on the inputs, but raise when that is to be differentiated.

    torch's ``once_differentiable`` lets them pass as constants unless the incoming gradients carry a graph themselves.
    """
    if not torch.is_grad_enabled():
        return tuple(grads)
    learning = [t for t in inputs if t is not None and t.requires_grad]
    return tuple(None if grad is None else recorded(_Refusal, grad, *learning) for grad in grads)


class _Totals:
    """What the visits of all blocks add up to for the rows of this rank, forward."""

    def __init__(self, pairs: Pairs, plan: _Plan) -> None:
        self.pairs, self.plan = pairs, plan
        self.rows: Statistics | None = None
        self.positive: Tensor | None = None
        self.hardest: Tensor | None = None

    def visit(self, owner: int, block: Block) -> list[Tensor]:
        k, bias, col_ids = block
        pairs = self.pairs._replace(
            k=k, bias=bias, col_ids=col_ids, positives=self.plan.positives_in(owner, self.pairs.positives)
        )
        found = blocks.forward_block(self.plan.backend, pairs, self.plan.want)
        self.rows = found.rows if self.rows is None else blocks.merge_statistics(self.rows, found.rows)
        if found.positive is not None:
            self.positive = found.positive if self.positive is None else self.positive + found.positive
        if found.hardest is not None:
            self.hardest = found.hardest if self.hardest is None else torch.maximum(self.hardest, found.hardest)
        return [] if found.columns is None else list(found.columns)

    @staticmethod
    def merge(earlier: list[Tensor], latest: list[Tensor]) -> list[Tensor]:
        return list(blocks.merge_statistics(Statistics(*earlier), Statistics(*latest)))


class _RowGradients:
    """What the visits of all blocks add up to for the rows of this rank, backward."""

    def __init__(
        self, pairs: Pairs, plan: _Plan, rows: Statistics, incoming: blocks.Incoming, needs: blocks.Needs
    ) -> None:
        self.pairs, self.plan, self.rows, self.incoming, self.needs = pairs, plan, rows, incoming, needs
        self.q: Tensor | None = None
        self.scale = torch.zeros_like(pairs.scale)

    def visit(self, owner: int, block: Block) -> list[Tensor]:
        k, bias, col_ids, col_max, col_sum, grad_col = block
        pairs = self.pairs._replace(
            k=k, bias=bias, col_ids=col_ids, positives=self.plan.positives_in(owner, self.pairs.positives)
        )
        columns = None if col_max is None or col_sum is None else Statistics(col_max, col_sum)
        found = blocks.backward_block(
            self.plan.backend, self.incoming._replace(col=grad_col), pairs, self.rows, columns, self.needs
        )
        self.scale = self.scale + found.scale
        if found.q is not None:
            self.q = found.q if self.q is None else self.q.add_(found.q)
        return [part for part in (found.k, found.bias) if part is not None]


class _RingTerms(torch.autograd.Function):
    """Row LSE, column LSE, the positives' logits and the hardest negatives' logits; ``None`` where not asked for.

    Its inputs are those of :class:`Pairs`, in order, and the plan.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        *given, plan = inputs
        pairs = Pairs(*given)
        totals = _Totals(pairs, plan)
        home = travel(plan.ranks, plan.sizes, (pairs.columns, pairs.bias, pairs.col_ids), totals.visit, totals.merge)
        assert totals.rows is not None
        columns = Statistics(*home) if plan.want.columns else None
        ctx.save_for_backward(*pairs, *totals.rows, *(columns or (None, None)))
        ctx.plan = plan
        if totals.hardest is not None:
            ctx.mark_non_differentiable(totals.hardest)
        return totals.rows.lse(), None if columns is None else columns.lse(), totals.positive, totals.hardest

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *given, row_max, row_sum, col_max, col_sum = ctx.saved_tensors
        pairs = Pairs(*given)
        row, col, positive, *_ = grads
        assert row is not None
        need_q, need_k, need_scale, need_bias, *_ = ctx.needs_input_grad
        # The scale's gradient comes from q·dq or k·dk.
        needs = blocks.Needs(need_q or (need_scale and not need_k), need_k, need_bias)
        incoming = blocks.Incoming(row, None, positive)  # that of a column comes with its block
        with torch.no_grad():
            mine = _RowGradients(pairs, ctx.plan, Statistics(row_max, row_sum), incoming, needs)
            block = (pairs.columns, pairs.bias, pairs.col_ids, col_max, col_sum, col)
            home = travel(ctx.plan.ranks, ctx.plan.sizes, block, mine.visit, _add)
            dk = home.pop(0).to(pairs.columns.dtype) if need_k else None
            dbias = home.pop(0) if need_bias else None
            dq = mine.q.to(pairs.q.dtype) if need_q and mine.q is not None else None
        learning = (pairs.q, pairs.k, pairs.scale, pairs.bias)
        dq, dk, dscale, dbias = _once((dq, dk, mine.scale if need_scale else None, dbias), learning)
        return _library.gradients((*Pairs._fields, "plan"), q=dq, k=dk, scale=dscale, bias=dbias)


def _add(earlier: list[Tensor], latest: list[Tensor]) -> list[Tensor]:
    return [mine.add_(sent) for sent, mine in zip(earlier, latest, strict=True)]


def _logsigmoid_pass(
    pairs: Pairs, bias: Tensor, plan: _Plan, need_q: bool, need_k: bool, weight: Tensor | None = None
) -> LogsigmoidBlock:
    """One trip of the sigmoid loss, every block a visitor once: this rank's loss and gradients, and dk of its own block
    from all ranks; ``weight`` [] multiplies what this rank adds to dk."""
    loss, dscale, dbias = (torch.zeros_like(pairs.scale) for _ in range(3))
    dq: Tensor | None = None

    def visit(_: int, block: Block) -> list[Tensor]:
        nonlocal loss, dscale, dbias, dq
        k, ids = block
        assert k is not None
        found = blocks.logsigmoid_block(plan.backend, pairs._replace(k=k, col_ids=ids), bias, need_q, need_k)
        loss, dscale, dbias = loss + found.loss, dscale + found.dscale, dbias + found.dbias
        if found.dq is not None:
            dq = found.dq if dq is None else dq.add_(found.dq)
        if found.dk is None:
            return []
        return [found.dk if weight is None else weight * found.dk]

    home = travel(plan.ranks, plan.sizes, (pairs.columns, pairs.col_ids), visit, _add)
    return LogsigmoidBlock(loss, dq, home[0] if need_k else None, dscale, dbias)


class _RingLogsigmoid(torch.autograd.Function):
    """The gradient needs no normaliser, so one trip round the ring gives value and gradients; dk comes home with k."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, scale: Tensor, bias: Tensor, row_ids: Tensor, col_ids: Tensor, plan: _Plan,
        need_q: bool, need_k: bool,
    ) -> Tensor:  # fmt: skip
        pairs = Pairs(q, k, scale, row_ids=row_ids, col_ids=col_ids)
        found = _logsigmoid_pass(pairs, bias, plan, need_q, need_k)
        ctx.save_for_backward(q, k, scale, bias, row_ids, col_ids, *found[1:])
        ctx.plan = plan
        return found.loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, scale, bias, row_ids, col_ids, dq, dk, dscale, dbias = ctx.saved_tensors
        needed = ctx.needs_input_grad
        with torch.no_grad():
            if dk is not None:
                dk = _weighted(grad, dk, Pairs(q, k, scale, row_ids=row_ids, col_ids=col_ids), bias, ctx.plan).to(
                    k.dtype
                )
            found = (
                (grad * dq).to(q.dtype) if needed[0] else None,
                dk if needed[1] else None,
                grad * dscale if needed[2] else None,
                grad * dbias if needed[3] else None,
            )
        return (*_once(found, (q, k, scale, bias)), *(None,) * 5)


def _weighted(grad: Tensor, dk: Tensor, pairs: Pairs, bias: Tensor, plan: _Plan) -> Tensor:
    """dk when each rank's loss has its own incoming gradient, from dk when all are 1.

    They are usually all the same number. Where they are not, every rank sees that and the ring is run once more.
    """
    every = plan.ranks.all_gather(grad.reshape(1), (1,) * plan.ranks.size)
    if bool((every == every[0]).all()):
        return grad * dk
    weighted = _logsigmoid_pass(pairs, bias, plan, False, True, grad).dk
    assert weighted is not None
    return weighted


class RingScope(GatherScope):
    """The batches of all ranks of a group, two visiting blocks of columns at a time.

    Not twice differentiable (use :class:`GatherScope`). Over a backend without safe point-to-point messages the columns
    are gathered instead, with one warning.
    """

    _is_ring = True

    @torch.compiler.disable(reason=NOT_TRACED)
    def terms(self, pairs: Pairs, want: Want = ROW_LSE, *, trusted: bool = True) -> SimilarityTerms:
        if self._falls_back(pairs.q.device):
            return super().terms(pairs, want, trusted=trusted)
        sizes = self._agreed(pairs, want, trusted)
        pairs = (pairs if trusted else pairs.converted()).rectangular()
        pairs.check_positives(sum(sizes), "all ranks")
        backend = _backends.serve("similarity_lse", pairs.q, "triton", why_not_lse)
        return SimilarityTerms(*recorded(_RingTerms, *pairs, _Plan(self.ranks, sizes, backend, want)))

    @torch.compiler.disable(reason=NOT_TRACED)
    def similarity_logsigmoid(
        self, q: Tensor, k: Tensor, scale: float | Tensor, bias: float | Tensor, *, row_ids: Tensor, col_ids: Tensor
    ) -> Tensor:
        if self._falls_back(q.device):
            return super().similarity_logsigmoid(q, k, scale, bias, row_ids=row_ids, col_ids=col_ids)
        sizes = self._agreed_pairs(q, k, scale, bias, row_ids, col_ids)
        scale, bias = scalar_tensor("scale", scale, q), scalar_tensor("bias", bias, q)
        backend = _backends.serve("similarity_logsigmoid", q, "triton", why_not_logsigmoid)
        return recorded(
            _RingLogsigmoid,
            q, k, scale, bias, row_ids.long(), col_ids.long(),
            _Plan(self.ranks, sizes, backend, Want()), learns(q) or learns(scale), learns(k),
        )  # fmt: skip

    def _falls_back(self, device: torch.device) -> bool:
        reason = self.ranks.why_no_ring(device)
        if reason is not None and reason not in _told:
            _told.add(reason)
            warn_user(f"strategy='ring' is not safe here ({reason}); using 'gather', which computes the same function")
        return reason is not None
