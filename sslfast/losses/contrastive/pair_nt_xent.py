"""NT-Xent with one term for every positive pair, its denominator the pair itself and the anchor's negatives.

    ℓ_ap = −log e^{s_ap} / (e^{s_ap} + Σ_{n: other class} e^{s_an}) = log(1 + e^{L_a − s_ap}),   L_a = log Σ_n e^{s_an}

``L_a`` is the streaming log-sum-exp with class labels as ids. Where no anchor has two positives, the pairs are the
positives of the same pass; else they are blocks of the similarity matrix with rows and columns sorted by label.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _library
from ..._checks import accumulator, without_autocast
from ...ops.similarity_lse import terms_of
from ._inputs import inverse, softplus
from ._labels import LabelledRows, Matches, labelled_rows

# Anchors of a block of pairs, at most, and its entries: several such blocks are all that is in memory at a time.
BLOCK_ROWS = 128
BLOCK = 2**20


def pair_nt_xent(
    z: Tensor,
    labels: Tensor,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    *,
    own: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    smallest: float = 0.0,
) -> Tensor:
    """NT-Xent over labelled pairs: the mean over all (anchor, positive) of one cross entropy each.

        ℓ_ap = −log( e^{s_ap} / (e^{s_ap} + Σ_{n: label_n ≠ label_a} e^{s_an}) + smallest ),     s = z·keysᵀ/τ

    An anchor's other positives are not in the denominator. Where every class has two members this is SimCLR's NT-Xent.
    Extra memory grows as (M + N)·D; neither the pairs nor their negatives are stored, in the backward either. Where an
    anchor has two positives or more, the pairs are visited in blocks of at most 2²⁰ similarities (of more than 2²⁰
    keys: one row), a few of which are in memory at a time: M·N·D more arithmetic, at most, for a few large classes.

    Args:
        z: [M, D] anchors; float32, float64, bfloat16 or float16.
        labels: [M] classes, as integers, floats or truth values.
        keys, key_labels: [N, D] and [N]: what the anchors are contrasted with. Default: each other, and no row with
            itself. Without gradient if they want none (a memory).
        own: [M] integers, the key that an anchor itself stands in, which is no positive of its; −1 for none. Default:
            none. Only with keys.
        temperature: τ, finite and not zero (default 0.07); or a one-element tensor, which receives its gradient.
        normalize: divide each row by its norm first (default).
        smallest: added to the probability inside the logarithm (default 0), so that no term exceeds −log of it; a term
            is not negative all the same.

    Returns:
        [] float32 (float64 for float64 inputs); 0 without a positive pair. On a GPU the sizes of the classes are read
        once, which waits for the device. Differentiable twice, with the matrix in memory.

    Raises:
        TypeError, ValueError: shapes, widths, dtypes or devices do not fit; labels are not integers; the temperature is
            zero or not finite; smallest is negative or not finite.

    Source: the loss of pytorch-metric-learning 2.9.0, ``NTXentLoss``; Chen et al. 2020, "A Simple Framework for
    Contrastive Learning of Visual Representations", equation 1, for classes of two.

    Example:
        >>> z, labels = torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2)  # four classes of two
        >>> round(sslfast.pair_nt_xent(z, labels, temperature=0.5).item(), 4)
        0.5944
    """
    if not (math.isfinite(smallest) and smallest >= 0):
        raise ValueError(f"smallest must be finite and not negative, got {smallest!r}")
    x = labelled_rows(z, labels, keys, key_labels, own, normalize)
    scale = inverse(temperature, x.rows)
    matches = x.matches()
    blocks, most = _blocks(x, matches, smallest)
    single = most <= 1
    terms = terms_of(x.pairs(scale, x.labels, x.column_labels, matches.only if single else None))
    count = matches.positives.sum()
    if single:
        assert terms.positive is not None
        each = _term(terms.row_lse - terms.positive, smallest)[0]
        total = torch.where(matches.positives > 0, each, 0.0).sum()
    else:
        scaled = x.rows.to(accumulator(x.rows)) * scale
        pairs = _with_every_block if _library.in_forward_mode() else _Pairs.apply
        total = pairs(scaled, x.columns, terms.row_lse, blocks)
    return total / count.clamp(min=1)


class _Blocks(NamedTuple):
    """All pairs, with anchors and columns sorted by label; blocks of them, and what is added to their probability."""

    rows: Tensor  # [M] the anchors' order
    columns: Tensor  # [N] the columns' order
    first: Tensor  # [M] of the sorted anchors: their class is the sorted columns from first to last
    last: Tensor  # [M]
    own: Tensor | None  # [M]
    edges: list[tuple[int, int, int, int]]  # first row, last row, first column, last column
    smallest: float

    def is_pair(self, start: int, end: int, left: int, right: int) -> Tensor:
        """Of one block, [end − start, right − left]."""
        at = torch.arange(left, right, device=self.first.device)
        inside = (at >= self.first[start:end, None]) & (at < self.last[start:end, None])
        return inside if self.own is None else inside & (self.columns[left:right] != self.own[start:end, None])


def _blocks(x: LabelledRows, matches: Matches, smallest: float) -> tuple[_Blocks, int]:
    """The blocks, and how many positives an anchor has at most: the numbers that are read from the device."""
    m, rows = len(x.labels), max(1, min(BLOCK_ROWS, BLOCK // len(x.column_labels)))
    by_label = matches.order if x.labels is x.column_labels else x.labels.argsort(stable=True)
    first, last = matches.first.index_select(0, by_label), matches.last.index_select(0, by_label)
    bottom = torch.arange(rows - 1, m + rows - 1, rows, device=by_label.device).clamp(max=m - 1)
    *columns, most = torch.cat([first[::rows], last[bottom], matches.positives.max()[None]]).tolist()
    starts = range(0, m, rows)
    every = zip(starts, columns[: len(starts)], columns[len(starts) :], strict=True)
    edges = [(start, min(start + rows, m), left, right) for start, left, right in every if right > left]
    own = None if x.own is None else x.own.index_select(0, by_label)
    return _Blocks(by_label, matches.order, first, last, own, edges, smallest), most


def _term(x: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    """``max(0, −log(σ(−x) + smallest))``, without loss where σ(−x) is 1 or underflows; and its derivative's factor.

    That is ``σ(−x) / (σ(−x) + smallest)``, which is multiplied by σ(x); 0 where the maximum is 0.
    """
    plain = softplus(x)
    if smallest == 0:
        return plain, torch.ones_like(plain)
    term = -torch.logaddexp(-plain, plain.new_full((), math.log(smallest)))
    return term.clamp(min=0), torch.where(term < 0, 0.0, torch.exp(term - plain))


class _Pairs(torch.autograd.Function):
    """Sum of the terms of all pairs, and its gradients in the same pass: the backward is a multiplication.

    ``scaled`` [M, D], in the accumulator's dtype, ``columns`` [N, D], ``lse`` [M].
    """

    @staticmethod
    def forward(ctx: Any, scaled: Tensor, columns: Tensor, lse: Tensor, blocks: _Blocks) -> Tensor:
        q, negatives = scaled.index_select(0, blocks.rows), lse.index_select(0, blocks.rows)
        k = columns.index_select(0, blocks.columns).to(q.dtype)
        need_q, need_k, need_lse, _ = ctx.needs_input_grad
        dq, dk = torch.zeros_like(q) if need_q else None, torch.zeros_like(k) if need_k else None
        dlse = torch.zeros_like(negatives) if need_lse else None
        total = scaled.new_zeros(())
        with without_autocast(scaled):
            for start, end, left, right in blocks.edges:
                is_pair = blocks.is_pair(start, end, left, right)
                above = negatives[start:end, None] - q[start:end] @ k[left:right].T
                term, factor = _term(above, blocks.smallest)
                total += torch.where(is_pair, term, 0.0).sum()
                weights = torch.where(is_pair, torch.sigmoid(above) * factor, 0.0)  # d term / d above
                if dlse is not None:
                    dlse[start:end] = weights.sum(1)
                if dq is not None:
                    torch.mm(weights, k[left:right], out=dq[start:end])
                if dk is not None:
                    dk[left:right].addmm_(weights.T, q[start:end])
        made = (_unsorted(dq, blocks.rows, -1), _unsorted(dk, blocks.columns, -1), _unsorted(dlse, blocks.rows, 1))
        ctx.save_for_backward(scaled, columns, lse, *made)
        ctx.blocks = blocks
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled, columns, lse, dq, dk, dlse = ctx.saved_tensors
        if torch.is_grad_enabled():  # under create_graph=True
            blocks = ctx.blocks

            def function(scaled: Tensor, columns: Tensor, lse: Tensor) -> Tensor:
                return _with_every_block(scaled, columns, lse, blocks)

            found = _library.second_order(function, (scaled, columns, lse), ctx.needs_input_grad[:3], grad)
            return (*found, None)
        return (
            None if dq is None else grad * dq,
            None if dk is None else (grad * dk).to(columns.dtype),
            None if dlse is None else grad * dlse,
            None,
        )


def _with_every_block(scaled: Tensor, columns: Tensor, lse: Tensor, blocks: _Blocks) -> Tensor:
    """What :class:`_Pairs` computes, by operations that are differentiable twice; its blocks stay in memory."""
    q, negatives = scaled.index_select(0, blocks.rows), lse.index_select(0, blocks.rows)
    k = columns.index_select(0, blocks.columns).to(q.dtype)
    total = scaled.new_zeros(())
    for start, end, left, right in blocks.edges:
        above = negatives[start:end, None] - q[start:end] @ k[left:right].T
        term, _ = _term(above, blocks.smallest)
        total = total + torch.where(blocks.is_pair(start, end, left, right), term, 0.0).sum()
    return total


def _unsorted(x: Tensor | None, order: Tensor, sign: int) -> Tensor | None:
    """``sign · x`` with row i at ``order[i]``."""
    if x is None:
        return None
    return torch.empty_like(x).index_copy_(0, order, x if sign > 0 else x.neg_())
