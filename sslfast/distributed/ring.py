"""Columns that visit rank after rank: no rank ever holds the global batch, and sending hides behind computing.

Forward, a block of k goes once round the ring (with its bias, ids and running column statistics); the rows' statistics
stay. Backward, it goes round again, with the total column statistics and their gradients, and collects its dk in
float32. A rank sends (W − 1)·n·D numbers forward; backward the same again and W·n·D float32 numbers of dk.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _backends
from .._checks import accumulator, scalar_tensor
from ..ops.similarity_logsigmoid import why_not as why_not_logsigmoid
from ..ops.similarity_lse import why_not as why_not_lse
from ..ops.types import SimilarityTerms
from . import blocks as blocks
from .blocks import Pairs, Statistics
from .collectives import Block, Ranks, recorded, travel
from .gather import NOT_TRACED, GatherScope, learns

_told: set[str] = set()


class _Plan(NamedTuple):
    """What does not change from hop to hop."""

    ranks: Ranks
    sizes: tuple[int, ...]
    backend: str
    columns: bool
    hardest: bool

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


class _RingTerms(torch.autograd.Function):
    """Row LSE, column LSE, the positives' logits and the hardest negatives' logits; ``None`` where not asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        row_ids: Tensor | None,
        col_ids: Tensor | None,
        positives: Tensor | None,
        plan: _Plan,
    ) -> tuple[Tensor | None, ...]:
        rows: Statistics | None = None
        positive: Tensor | None = None
        hardest: Tensor | None = None

        def visit(owner: int, block: Block) -> list[Tensor]:
            nonlocal rows, positive, hardest
            k, bias, ids = block
            assert k is not None
            pairs = Pairs(q, k, scale, bias, row_ids, ids, plan.positives_in(owner, positives))
            found = blocks.forward_block(plan.backend, pairs, plan.columns, plan.hardest)
            rows = found.rows if rows is None else blocks.merge_statistics(rows, found.rows)
            if found.positive is not None:
                positive = found.positive if positive is None else positive + found.positive
            if found.hardest is not None:
                hardest = found.hardest if hardest is None else torch.maximum(hardest, found.hardest)
            return [] if found.columns is None else list(found.columns)

        def merge(earlier: list[Tensor], latest: list[Tensor]) -> list[Tensor]:
            return list(blocks.merge_statistics(Statistics(*earlier), Statistics(*latest)))

        home = travel(plan.ranks, plan.sizes, (k, bias, col_ids), visit, merge)
        assert rows is not None
        columns = Statistics(*home) if plan.columns else None
        saved = (*rows, *(columns or (None, None)))
        ctx.save_for_backward(q, k, scale, bias, row_ids, col_ids, positives, *saved)
        ctx.plan = plan
        if hardest is not None:
            ctx.mark_non_differentiable(hardest)
        return rows.lse(), None if columns is None else columns.lse(), positive, hardest

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = _RingTerms.gradients(ctx, grads)
        return (*_once(found, ctx.saved_tensors[:4]), *(None,) * 4)

    @staticmethod
    def gradients(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """dq, dk, dscale and dbias, by a second trip round the ring."""
        grad_row, grad_col, grad_positive = grads[:3]
        q, k, scale, bias, row_ids, col_ids, positives, row_max, row_sum, col_max, col_sum = ctx.saved_tensors
        plan: _Plan = ctx.plan
        need_q, need_k, need_scale, need_bias = ctx.needs_input_grad[:4]
        also_q = need_q or (need_scale and not need_k)  # dscale comes from q·dq or k·dk
        dq: Tensor | None = None
        dscale = torch.zeros_like(scale)
        assert grad_row is not None

        def visit(owner: int, block: Block) -> list[Tensor]:
            nonlocal dq, dscale
            k, bias, ids, col_max, col_sum, grad_col = block
            assert k is not None
            pairs = Pairs(q, k, scale, bias, row_ids, ids, plan.positives_in(owner, positives))
            columns = None if col_max is None or col_sum is None else Statistics(col_max, col_sum)
            found_q, dk, found_scale, dbias = blocks.backward_block(
                plan.backend,
                (grad_row, grad_col, grad_positive),
                pairs,
                Statistics(row_max, row_sum),
                columns,
                (also_q, need_k, need_bias),
            )
            dscale = dscale + found_scale
            if found_q is not None:
                dq = found_q if dq is None else dq.add_(found_q)
            return [part for part in (dk, dbias) if part is not None]

        home = travel(plan.ranks, plan.sizes, (k, bias, col_ids, col_max, col_sum, grad_col), visit, _add)
        dk = home.pop(0).to(k.dtype) if need_k else None
        dbias = home.pop(0) if need_bias else None
        dq = dq.to(q.dtype) if need_q and dq is not None else None
        return dq, dk, dscale if need_scale else None, dbias


def _add(earlier: list[Tensor], latest: list[Tensor]) -> list[Tensor]:
    return [mine.add_(sent) for sent, mine in zip(earlier, latest, strict=True)]


class _Pass(NamedTuple):
    """One trip of the sigmoid loss: this rank's loss and gradients, and dk of its own block from all ranks."""

    loss: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dscale: Tensor
    dbias: Tensor


def _logsigmoid_pass(
    pairs: Pairs, bias: Tensor, plan: _Plan, need_q: bool, need_k: bool, weight: Tensor | None = None
) -> _Pass:
    """Every block visits once; ``weight`` [] multiplies what this rank adds to dk."""
    loss, dscale, dbias = (torch.zeros_like(pairs.scale) for _ in range(3))
    dq: Tensor | None = None

    def visit(_: int, block: Block) -> list[Tensor]:
        nonlocal loss, dscale, dbias, dq
        k, ids = block
        assert k is not None
        found = blocks.logsigmoid_block(plan.backend, pairs._replace(k=k, col_ids=ids), bias, need_q, need_k)
        loss, dscale, dbias = loss + found[0], dscale + found[3], dbias + found[4]
        if found[1] is not None:
            dq = found[1] if dq is None else dq.add_(found[1])
        if found[2] is None:
            return []
        return [found[2] if weight is None else weight * found[2]]

    home = travel(plan.ranks, plan.sizes, (pairs.k, pairs.col_ids), visit, _add)
    return _Pass(loss, dq, home[0] if need_k else None, dscale, dbias)


class _RingLogsigmoid(torch.autograd.Function):
    """The gradient needs no normaliser, so one trip round the ring gives value and gradients; dk comes home with k."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, scale: Tensor, bias: Tensor, row_ids: Tensor, col_ids: Tensor, plan: _Plan,
        need_q: bool, need_k: bool,
    ) -> Tensor:  # fmt: skip
        pairs = Pairs(q, k, scale, None, row_ids, col_ids, None)
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
                dk = _weighted(grad, dk, Pairs(q, k, scale, None, row_ids, col_ids, None), bias, ctx.plan).to(k.dtype)
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
    again = _logsigmoid_pass(pairs, bias, plan, False, True, grad).dk
    assert again is not None
    return again


class RingScope(GatherScope):
    """The batches of all ranks of a group, two visiting blocks of columns at a time.

    Not twice differentiable (use :class:`GatherScope`). Over a backend without safe point-to-point messages the columns
    are gathered instead, with one warning.
    """

    _is_ring = True

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
        if self._falls_back(q.device):
            return super().similarity_terms(
                q, k, scale, bias=bias, row_ids=row_ids, col_ids=col_ids, columns=columns, positives=positives,
                hardest=hardest,
            )  # fmt: skip
        sizes = self._agreed(q, k, scale, bias, row_ids, col_ids, columns, positives)
        backend = _backend("similarity_lse", why_not_lse, q)
        found = recorded(
            _RingTerms,
            q,
            k,
            scalar_tensor("scale", scale, q),
            None if bias is None else bias.to(accumulator(q)),
            None if row_ids is None else row_ids.long(),
            None if col_ids is None else col_ids.long(),
            None if positives is None else positives.long(),
            _Plan(self.ranks, sizes, backend, columns, hardest),
        )
        return SimilarityTerms(*found)

    @torch.compiler.disable(reason=NOT_TRACED)
    def similarity_logsigmoid(
        self, q: Tensor, k: Tensor, scale: float | Tensor, bias: float | Tensor, *, row_ids: Tensor, col_ids: Tensor
    ) -> Tensor:
        if self._falls_back(q.device):
            return super().similarity_logsigmoid(q, k, scale, bias, row_ids=row_ids, col_ids=col_ids)
        sizes = self._agreed_pairs(q, k, scale, bias, row_ids, col_ids)
        scale, bias = scalar_tensor("scale", scale, q), scalar_tensor("bias", bias, q)
        backend = _backend("similarity_logsigmoid", why_not_logsigmoid, q)
        return recorded(
            _RingLogsigmoid,
            q, k, scale, bias, row_ids.long(), col_ids.long(),
            _Plan(self.ranks, sizes, backend, False, False), learns(q) or learns(scale), learns(k),
        )  # fmt: skip

    def _falls_back(self, device: torch.device) -> bool:
        reason = self.ranks.why_no_ring(device)
        if reason is not None and reason not in _told:
            _told.add(reason)
            warnings.warn(
                f"strategy='ring' is not safe here ({reason}); using 'gather', which computes the same function",
                stacklevel=4,
            )
        return reason is not None


def _backend(op: str, why_not: Any, q: Tensor) -> str:
    preferred = "triton" if q.device.type == "cuda" else "cpu"
    return _backends.select(op, preferred, lambda name: why_not(name, q))
