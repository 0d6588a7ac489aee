from __future__ import annotations

import torch
from torch import Tensor


def prototype_columns(
    teacher: Tensor, prototypes: Tensor, bias: Tensor | None, temperature: float, taken: Tensor | None = None
) -> Tensor:
    """``log Σ_n exp(T_nk − r_n)`` [K] of ``T = h·uᵀ/τ``; r_n is 0, or with a bias f ``log Σ_k exp(T_nk + f_k)``.

    Rows that are not ``taken`` [N] take no part, whatever they hold.
    """
    logits = teacher @ prototypes.T / temperature  # [N, K]
    if bias is not None:
        logits = logits - torch.logsumexp(logits + bias, 1, keepdim=True)
    if taken is not None:
        logits = torch.where(taken[:, None], logits, -torch.inf)
    return torch.logsumexp(logits, 0)


def prototype_rows(
    teacher: Tensor, prototypes: Tensor, bias: Tensor, temperature: float, taken: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Entropy and arg max of each row of ``softmax_k(T + f)``, [N] both; 0 and −1 of rows that are not taken."""
    logits = teacher @ prototypes.T / temperature + bias
    entropy, best = torch.special.entr(torch.softmax(logits, 1)).sum(1), logits.argmax(1)
    if taken is None:
        return entropy, best
    return torch.where(taken, entropy, 0.0), torch.where(taken, best, -1)
