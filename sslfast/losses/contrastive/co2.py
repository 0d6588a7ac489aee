"""CO2: a query and its key are to resemble the other keys alike; a divergence of two softmaxes over the same columns.

Its gradient weighs each column by both softmaxes and by the difference of their logits, which no pass of log-sum-exps
gives. So rows go by in blocks, each with the products of its own columns, and leave value and gradient behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import _library
from ..._checks import accumulator, check_temperature, is_real, without_autocast
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...ops.l2_normalize import l2_normalize
from .._inputs import check_gather, two_views, views_and_queue
from ..memory_queue import memory_bank
from ._inputs import inverse, row_dots
from .pair_nt_xent import BLOCK


@over_ranks("temperature")
def co2(
    q: Tensor,
    k: Tensor,
    queue: Tensor | None = None,
    temperature: float | Tensor = 0.05,
    *,
    normalize: bool = True,
    gather_distributed: bool = False,
) -> Tensor:
    """Consistent contrast (CO2): half the symmetric divergence of queries' and keys' similarities, mean over N rows.

        P_i = softmax_j(q_i·c_j / τ),   Q_i = softmax_j(k_i·c'_j / τ),   ℓ_i = ½ KL(P_i‖Q_i) + ½ KL(Q_i‖P_i)

    With a queue both are over ``q_i·k_i`` and the queue's keys ``c = c'``; without one ``c`` are the keys of the batch
    and ``c'`` its queries. A regulariser, to be added to :func:`moco` or :func:`nt_xent`. Rows are visited in blocks of
    at most 2²⁰ similarities (of more than 2²⁰ keys: one row), a few of which are in memory at a time; the gradient
    comes along in the forward.

    Args:
        q, k: [N, D], row ``i`` of both from image ``i``; float32, float64, bfloat16 or float16. Both receive a gradient
            if they want one.
        queue: [K, D] negatives, as they are and without gradient (default: the rows of the batch). In 16 bits it is
            copied to float32.
        temperature: τ, finite and not zero (default 0.05); or a one-element tensor, which receives its gradient.
        normalize: divide the rows of q and k by their norms first (default).
        gather_distributed: over the batches of all ranks; with a queue, which every rank has a copy of, weigh this
            rank's mean for the mean over all ranks' rows. ``False``: this rank's.

    Returns:
        [] float32 (float64 for float64 inputs). Over several ranks the mean of their values is the loss of the global
        batch. Differentiable twice, with the matrix in memory.

    Raises:
        TypeError, ValueError: shapes, widths, dtypes or devices do not fit, or the temperature is zero or not finite.

    Source: Wei et al. 2021, "CO2: Consistent Contrast for Unsupervised Visual Representation Learning", section 3, but
    for the positive, which the paper leaves out of both softmaxes; value as lightly 1.6.0's ``CO2Regularizer``, whose
    result has no gradient.

    Example:
        >>> q, k = torch.eye(4), torch.eye(4).roll(1, 0)
        >>> round(sslfast.co2(q, k, temperature=0.5).item(), 4)
        1.23
    """
    if queue is None:
        q, k = two_views("q", q, "k", k, normalize=False)
    else:
        q, k, queue = views_and_queue(("q", q), ("k", k), queue, normalize=False)
    kind = accumulator(q)
    q, k = q.to(kind), k.to(kind)  # first: a divergence is small beside what rounded rows differ by
    if normalize:
        q, k = l2_normalize(q), l2_normalize(k)
    scale, scope = inverse(temperature, q), scope_of(gather_distributed)
    shard = scope.shard(q)
    with without_autocast(q):
        if queue is None:
            columns = Columns(scope.gather(k), scope.gather(q), None)
        else:
            columns = Columns(queue.to(kind), None, scale * row_dots(q, k.unsqueeze(1)).squeeze(1))
        total = _with_the_matrix if _library.in_forward_mode() else _Divergence.apply
        return shard.weight * total(scale * q, scale * k, *columns)


class Columns(NamedTuple):
    """What the rows of either side are compared with.

    Attributes:
        of_q, of_k: [K, D] in the accumulator's dtype; ``of_k`` is ``None`` where it is the same.
        positive: [N], one more logit of each row, the same for both sides; or ``None``.
    """

    of_q: Tensor
    of_k: Tensor | None
    positive: Tensor | None


def _logits(rows: Tensor, keys: Tensor, positive: Tensor | None) -> Tensor:
    """[n, K], or [n, K + 1] with the positive."""
    logits = rows @ keys.T
    return logits if positive is None else torch.cat([logits, positive[:, None]], 1)


def _with_the_matrix(q: Tensor, k: Tensor, of_q: Tensor, of_k: Tensor | None, positive: Tensor | None) -> Tensor:
    """What :class:`_Divergence` computes, by operations that are differentiable twice."""
    of_k = of_q if of_k is None else of_k
    log_p, log_q = (_logits(*side, positive).log_softmax(1) for side in ((q, of_q), (k, of_k)))
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()


class _Divergence(torch.autograd.Function):
    """Sum of the rows' divergences, and its gradients in the same pass: the backward is a multiplication.

    ``q``, ``k`` [N, D], already divided by τ; the others as :class:`Columns`.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, of_q: Tensor, of_k: Tensor | None, positive: Tensor | None) -> Tensor:
        inputs = (q, k, of_q, of_k, positive)
        made = [
            torch.zeros_like(x) if needed and x is not None else None
            for x, needed in zip(inputs, ctx.needs_input_grad, strict=True)
        ]
        total = q.new_zeros(())
        block = max(1, BLOCK // len(of_q))
        for start in range(0, len(q), block):
            here = slice(start, start + block)
            total += _add_block(q[here], k[here], of_q, of_k, None if positive is None else positive[here], made, here)
        ctx.save_for_backward(q, k, positive, *made)
        # The first derivative does not read the columns: a queue may take in new keys before it.
        ctx.columns = (of_q, of_k)
        ctx.version = 0 if torch.compiler.is_compiling() else of_q._version
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, positive, *made = ctx.saved_tensors
        if torch.is_grad_enabled():  # under create_graph=True
            if ctx.columns[0]._version != ctx.version:
                raise RuntimeError(
                    "the queue was overwritten after the loss was computed: create_graph=True needs it unchanged"
                )
            inputs = (q, k, *ctx.columns, positive)
            return _library.second_order(_with_the_matrix, inputs, ctx.needs_input_grad, grad)
        return tuple(None if x is None else grad * x for x in made)


def _add_block(
    q: Tensor,
    k: Tensor,
    of_q: Tensor,
    of_k: Tensor | None,
    positive: Tensor | None,
    made: list[Tensor | None],
    here: slice,
) -> Tensor:
    """The sum of the divergences of some rows, which stand ``here``; their gradients are put into ``made``.

    With ``g = log P − log Q``, d/d(logits of P) of ½ KL(P‖Q) + ½ KL(Q‖P) is ``½(P·(g − KL(P‖Q)) + P − Q)``.
    """
    of_k = of_q if of_k is None else of_k
    with without_autocast(q):
        log_p, log_q = (_logits(*side, positive).log_softmax(1) for side in ((q, of_q), (k, of_k)))
        p, p_of_k = log_p.exp(), log_q.exp()
        gap, apart = log_p.sub_(log_q), p - p_of_k
        total = 0.5 * (apart * gap).sum()
        dq, dk, dof_q, dof_k, dpositive = made
        for rows, keys, drows, dkeys, own, half in (
            (q, of_q, dq, dof_q, p, 0.5),
            (k, of_k, dk, dof_k, p_of_k, -0.5),
        ):
            mean = torch.linalg.vecdot(own, gap)[:, None]
            if dpositive is not None:
                dpositive[here] += half * (own[:, -1] * (gap[:, -1] - mean[:, 0]) + apart[:, -1])
            if drows is None and dkeys is None:
                continue
            weights = (gap - mean).mul_(own).add_(apart)[:, : len(keys)]
            if drows is not None:
                drows[here] = half * (weights @ keys)
            if dkeys is not None:
                dkeys.addmm_(weights.T, rows, alpha=half)
        return total


class CO2Regularizer(nn.Module):
    """The module form of :func:`co2` times ``alpha``, with the constructor of lightly 1.6.0's class.

    With a memory bank the keys enter it after the loss, where the loss is to be differentiated with respect to
    ``out0``; it is a :class:`MemoryQueue`, apart from that of the contrastive loss.

    Args:
        alpha: weight of the regulariser (default 1).
        t_consistency: τ, finite and not zero (default 0.05).
        memory_bank_size: 0 (default): no bank; or ``(K, D)``, the number of keys and their width.
        gather_distributed: as :func:`co2`; with a bank, the keys of all ranks enter it.

    Shapes:
        ``out0``, ``out1``: [N, D], row ``i`` of each a view of image ``i``, normalised here; output: [].

    Raises:
        ValueError: as :func:`co2`; memory_bank_size is negative, a bare number above 0, or not two numbers.
        TypeError: as :func:`co2`; alpha is no number.

    Example:
        >>> regularizer = sslfast.CO2Regularizer(alpha=2.0, t_consistency=0.5)
        >>> round(regularizer(torch.eye(4), torch.eye(4).roll(1, 0)).item(), 4)
        2.4599
    """

    def __init__(
        self,
        alpha: float = 1,
        t_consistency: float = 0.05,
        memory_bank_size: int | Sequence[int] = 0,
        *,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        if not is_real(alpha):
            raise TypeError(f"alpha must be a number, got {alpha!r}")
        check_temperature(t_consistency, torch.device("cpu"))
        check_gather(gather_distributed)
        self.alpha = alpha
        self.t_consistency = t_consistency
        self.gather_distributed = gather_distributed
        self.memory_bank = memory_bank(memory_bank_size, gather_distributed)

    @over_ranks()
    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The divergence of two views, each [N, D]."""
        out0, out1 = two_views("out0", out0, "out1", out1, normalize=False)
        queue = None if self.memory_bank is None else self.memory_bank.queue
        loss = co2(out0, out1, queue, self.t_consistency, gather_distributed=self.gather_distributed)
        if self.memory_bank is not None and out0.requires_grad:
            self.memory_bank.enqueue(l2_normalize(out1.detach()))
        return self.alpha * loss

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, t_consistency={self.t_consistency}, gather_distributed={self.gather_distributed}"
