"""One block of columns at a time: the pieces from which a pass over blocks that come and go is put together.

Forward, each block gives the base-2 maximum and sum of its rows and columns, and :func:`merge_statistics` adds blocks
up. Backward, the operators take statistics as inputs: with the *total* ones, gradients of blocks add up to the whole's.
These functions are called where autograd does not record; a custom ``autograd.Function`` around them keeps the graph.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import accumulator
from ..ops.similarity_logsigmoid import by_reference as logsigmoid_by_reference
from ..ops.types import Pairs, Want

_LOG2_E = 1 / math.log(2)


class Statistics(NamedTuple):
    """Base-2 maximum and sum of exponentials relative to it, of each row (or column): lse = ln 2 · (max + log2 sum)."""

    max: Tensor
    sum: Tensor

    def lse(self) -> Tensor:
        """Natural log-sum-exp; −inf where there was nothing to sum."""
        return (self.max + self.sum.log2()) / _LOG2_E


class BlockTerms(NamedTuple):
    """What one block gives its rows and columns; ``None`` where it was not asked for."""

    rows: Statistics
    columns: Statistics | None
    positive: Tensor | None
    hardest: Tensor | None


class LogsigmoidBlock(NamedTuple):
    """Loss and gradients of the pairwise sigmoid loss, in the accumulator's dtype."""

    loss: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dscale: Tensor
    dbias: Tensor


class BlockGradients(NamedTuple):
    """What one block adds to the gradients, in the accumulator's dtype; ``None`` where it was not asked for."""

    q: Tensor | None
    k: Tensor | None
    scale: Tensor
    bias: Tensor | None


class Incoming(NamedTuple):
    """Gradients of the row LSE [M], the column LSE [N] and the positives' logits [M]."""

    row: Tensor
    col: Tensor | None
    positive: Tensor | None


class Needs(NamedTuple):
    """Which gradients are wanted; that of the scale needs one of the first two."""

    q: bool
    k: bool
    bias: bool


def merge_statistics(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of both together. Where a sum is 0 its maximum means nothing and is not looked at."""
    nothing = float("-inf")
    first, second = (part.max.masked_fill(part.sum == 0, nothing) for part in (a, b))
    top = torch.maximum(first, second)
    # Relative to 0 where the maximum is infinite, because ∞ − ∞ is NaN: nothing so far, or an infinite similarity.
    shift = top.masked_fill(top.isinf(), 0.0)
    first, second = (x.masked_fill(x == float("inf"), 0.0) for x in (first, second))  # their sums are infinite already
    top = top.masked_fill(top == nothing, 0.0)
    return Statistics(top, a.sum * torch.exp2(first - shift) + b.sum * torch.exp2(second - shift))


def forward_block(backend: str, pairs: Pairs, want: Want) -> BlockTerms:
    """Row statistics of one block, and what else was asked for; ``positives`` are columns of this block."""
    if backend == "reference":
        return _forward_by_reference(pairs, want)
    _, _, positive, largest, row_max, row_sum, col_max, col_sum, _ = _operator("similarity_lse", backend)(
        *pairs, *want, 0
    )
    return BlockTerms(
        Statistics(row_max, row_sum),
        Statistics(col_max, col_sum) if want.columns else None,
        None if pairs.positives is None else positive,
        largest if want.hardest else None,
    )


def backward_block(
    backend: str, incoming: Incoming, pairs: Pairs, rows: Statistics, columns: Statistics | None, needs: Needs
) -> BlockGradients:
    """The block's part of the gradients; ``rows`` and ``columns`` are total statistics, over all blocks."""
    if backend == "reference":
        return _backward_by_reference(incoming, pairs, rows, columns, needs)
    empty = rows.max.new_empty(0)
    col_max, col_sum = (empty, empty) if columns is None else columns
    dq, dk, dscale, dbias = _operator("similarity_lse", backend, "_backward")(
        *incoming, *pairs, *rows, col_max, col_sum, empty, *needs
    )
    return BlockGradients(dq if needs.q else None, dk if needs.k else None, dscale, dbias if needs.bias else None)


def logsigmoid_block(backend: str, pairs: Pairs, bias: Tensor, need_q: bool, need_k: bool) -> LogsigmoidBlock:
    """Loss and gradients of one block of the pairwise sigmoid loss, in the accumulator's dtype.

    ``bias`` [] is the logits' one bias; that of ``pairs``, one a column, must be ``None``.
    """
    q, k, scale, row_ids, col_ids = pairs.q, pairs.columns, pairs.scale, pairs.row_ids, pairs.col_ids
    if backend != "reference":
        operator = _operator("similarity_logsigmoid", backend)
        loss, dq, dk, dscale, dbias = operator(q, k, scale, bias, row_ids, col_ids, need_q, need_k)
        return LogsigmoidBlock(loss, dq if need_q else None, dk if need_k else None, dscale, dbias)
    kind = accumulator(q)
    assert row_ids is not None and col_ids is not None
    with torch.enable_grad():
        q, k, scale, bias = (t.detach().to(kind).requires_grad_() for t in (q, k, scale, bias))
        loss = logsigmoid_by_reference(q, k, scale, bias, row_ids, col_ids)
        dq, dk, dscale, dbias = torch.autograd.grad(loss, (q, k, scale, bias))
    return LogsigmoidBlock(loss.detach(), dq if need_q else None, dk if need_k else None, dscale, dbias)


def _operator(name: str, backend: str, suffix: str = "") -> torch._ops.OpOverloadPacket:
    return getattr(torch.ops.sslfast, f"{name}{'_triton' if backend == 'triton' else ''}{suffix}")


def _logits(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """q·k and s, [M, N], in the accumulator's dtype."""
    kind = accumulator(pairs.q)
    with torch.autocast(pairs.q.device.type, enabled=False):
        dots = pairs.q.to(kind) @ pairs.columns.to(kind).T
    s = pairs.scale * dots
    return dots, s if pairs.bias is None else s + pairs.bias


def _masked(s: Tensor, pairs: Pairs) -> Tensor:
    """s, −inf where the ids exclude the pair."""
    if pairs.row_ids is None or pairs.col_ids is None:
        return s
    return s.masked_fill(pairs.row_ids[:, None] == pairs.col_ids[None, :], float("-inf"))


def _one_hot(positives: Tensor, pairs: Pairs) -> Tensor:
    return positives[:, None] == torch.arange(len(pairs.columns), device=positives.device)


def _statistics(x: Tensor, dim: int) -> Statistics:
    top = x.amax(dim)
    top = top.masked_fill(top == float("-inf"), 0.0)
    return Statistics(top, torch.exp2(x - top.unsqueeze(dim)).sum(dim))


def _forward_by_reference(pairs: Pairs, want: Want) -> BlockTerms:
    _, s = _logits(pairs)
    masked = _masked(s, pairs)
    positive, negatives = None, masked
    if pairs.positives is not None:
        one_hot = _one_hot(pairs.positives, pairs)
        positive = s.masked_fill(~one_hot, 0.0).sum(1)
        negatives = masked.masked_fill(one_hot, float("-inf"))
    x = masked * _LOG2_E
    return BlockTerms(
        _statistics(x, 1),
        _statistics(x, 0) if want.columns else None,
        positive,
        negatives.amax(1) if want.hardest else None,
    )


def _backward_by_reference(
    incoming: Incoming, pairs: Pairs, rows: Statistics, columns: Statistics | None, needs: Needs
) -> BlockGradients:
    dots, s = _logits(pairs)
    x = _masked(s, pairs) * _LOG2_E
    w = _softmax(x, rows, 1) * incoming.row[:, None]  # [M, N], the gradient of s
    if columns is not None and incoming.col is not None:
        w = w + _softmax(x, columns, 0) * incoming.col
    if pairs.positives is not None and incoming.positive is not None:
        w = w + _one_hot(pairs.positives, pairs) * incoming.positive[:, None]
    kind = w.dtype
    with torch.autocast(w.device.type, enabled=False):
        dq = pairs.scale * (w @ pairs.columns.to(kind)) if needs.q else None
        dk = pairs.scale * (w.T @ pairs.q.to(kind)) if needs.k else None
    return BlockGradients(dq, dk, (w * dots).sum(), w.sum(0) if needs.bias else None)


def _softmax(x: Tensor, statistics: Statistics, dim: int) -> Tensor:
    """The part of each row's (column's) total that x holds; 0 where the total is empty."""
    top, total = (part.unsqueeze(dim) for part in statistics)
    return torch.exp2(x - top) / total.masked_fill(total == 0, 1.0)
