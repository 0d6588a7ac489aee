"""Cross-entropy of student against teacher over prototypes in plain PyTorch, with all logits in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def prototype_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    pairs: Sequence[tuple[int, int]],
    student_temperature: float,
    teacher_temperature: float,
    teacher_bias: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Mean over pairs (t, v) of ``Σ_b weight_b·H(softmax(g_tb·uᵀ/τ_t + β), softmax(h_vb·wᵀ/τ_s))``; h [V, B, D]."""
    if row_weights is not None:
        # A row without weight takes no part, whatever it holds.
        taken = (row_weights != 0)[:, None]
        student, teacher = torch.where(taken, student, 0), torch.where(taken, teacher, 0)
    with torch.no_grad():
        logits = teacher @ teacher_prototypes.T / teacher_temperature  # [V_t, B, K]
        p = F.softmax(logits if teacher_bias is None else logits + teacher_bias, -1)
    log_q = F.log_softmax(student @ student_prototypes.T / student_temperature, -1)  # [V_s, B, K]
    entropy = torch.stack([-(p[t] * log_q[v]).sum(-1) for t, v in pairs])  # [pairs, B]
    return (entropy.mean(1) if row_weights is None else entropy @ row_weights.to(entropy.dtype)).mean()


def normalized_prototypes(direction: Tensor, gain: Tensor | None = None, eps: float = 1e-12) -> Tensor:
    """``gain_k·v_k/max(‖v_k‖, eps)`` of the rows v [K, D]."""
    rows = F.normalize(direction, dim=1, eps=eps)
    return rows if gain is None else gain[:, None] * rows
