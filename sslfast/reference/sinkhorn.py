from __future__ import annotations

import torch
from torch import Tensor


def sinkhorn_sums(
    logits: Tensor, bias: Tensor | None, temperature: float, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Column statistics [S, K] of logits [B, S, K]: ``(max, Σ exp(x − max))``; with a bias ``(0, Σ softmax_k(x + f))``.

    ``x`` is ``logits / temperature``; only the first ``rows`` rows count.
    """
    x = logits / temperature
    counts = _counted(x, rows)
    if bias is None:
        x = torch.where(counts, x, -torch.inf)
        shape = (1, *x.shape[1:])
        largest = torch.cat([x, x.new_full(shape, torch.finfo(x.dtype).min / 2)]).amax(0)
        return largest, torch.exp(x - largest).sum(0)
    assignments = torch.where(counts, torch.softmax(x + bias, -1), 0.0)
    return torch.zeros_like(bias), assignments.sum(0)


def sinkhorn_update(bias: Tensor | None, largest: Tensor, sums: Tensor) -> Tensor:
    """``f ← f − log Σ``; a prototype that no row reaches keeps its bias."""
    before = torch.zeros_like(sums) if bias is None else bias
    return torch.where(sums == 0, before, before - (largest + sums.log()))


def sinkhorn_bias(
    logits: Tensor, temperature: float, iterations: int = 3, row_start: bool = False, rows: Tensor | None = None
) -> Tensor:
    """The bias f [S, K] after ``iterations``: the assignments are ``softmax_k(logits/temperature + f)``."""
    bias = logits.new_zeros(logits.shape[1:]) if row_start else None
    for _ in range(iterations):
        bias = sinkhorn_update(bias, *sinkhorn_sums(logits, bias, temperature, rows))
    assert bias is not None
    return bias


def sinkhorn_assign(logits: Tensor, bias: Tensor, temperature: float, rows: Tensor | None = None) -> Tensor:
    """``softmax_k(logits/temperature + bias)`` [B, S, K], zero beyond the rows that count."""
    x = logits / temperature
    return torch.where(_counted(x, rows), torch.softmax(x + bias, -1), 0.0)


def _counted(x: Tensor, rows: Tensor | None) -> Tensor:
    index = torch.arange(len(x), device=x.device)
    return (index < (len(x) if rows is None else rows)).view(-1, 1, 1)
