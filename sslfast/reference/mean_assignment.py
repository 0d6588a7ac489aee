from __future__ import annotations

import torch
from torch import Tensor


def mean_assignment(
    logits: Tensor,
    targets: Tensor | None = None,
    weights: Tensor | None = None,
    temperature: float = 0.1,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the softmaxes p_n of B rows over K prototypes: ``Σ_n w_n p_n`` [K], and of each row the cross entropy
    ``−Σ_k t_nk ln p_nk`` [B] and the entropy ``−Σ_k p_nk ln p_nk`` [B].

    Args:
        logits: [B, K], over the temperature.
        targets: t, [R, K]; row n has row n mod R. Without them the cross entropy is 0.
        weights: w, [B]; default 1.
        rows: [], how many of the first rows count; the others give 0.
    """
    index = torch.arange(len(logits), device=logits.device)
    counts = index < (len(logits) if rows is None else rows)
    log_p = torch.log_softmax(torch.where(counts[:, None], logits, 0.0) / temperature, -1)
    p = log_p.exp() * counts[:, None]
    sums = (p if weights is None else torch.where(counts, weights, 0.0)[:, None] * p).sum(0)
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    if targets is None:
        return sums, torch.zeros_like(entropy), entropy
    cross_entropy = -(targets[index % len(targets)] * log_p).sum(-1)
    return sums, torch.where(counts, cross_entropy, 0.0), entropy
