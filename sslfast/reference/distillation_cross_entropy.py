from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def distillation_cross_entropy(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    bias: Tensor | None = None,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
    ignore_diagonal: bool = False,
    assigned: bool = False,
    rows: Tensor | None = None,
    teacher_rows: Tensor | None = None,
) -> Tensor:
    """Σ over the pairs of views of the cross entropy of each of B rows, [B].

    Args:
        student, teacher: tensors [views, B, K], one after another; of the teacher logits, or with ``assigned`` targets.
        bias: [teachers or 1, P, K], added to the teacher's logits over the temperature; row r takes r mod P.
        ignore_diagonal: leave out the pairs of view t with view t.
        rows: [], how many of the first rows count; the others give 0.
        teacher_rows: [B], the teacher's row [views, R, K] that a student's row meets; default: its own.
    """
    s = torch.cat(list(student))
    t = torch.cat(list(teacher))
    if not assigned:
        t = t / teacher_temperature
        if bias is not None:
            index = torch.arange(t.shape[1], device=t.device) % bias.shape[1]
            t = t + bias[:, index]
        t = torch.softmax(t, -1)
    if teacher_rows is not None:
        t = t[:, teacher_rows]
    log_s = F.log_softmax(s / student_temperature, -1)
    total = log_s.new_zeros(log_s.shape[1])
    for i, p in enumerate(t):
        for j, log_q in enumerate(log_s):
            if not (ignore_diagonal and i == j):
                total = total - (p * log_q).sum(-1)
    if rows is not None:
        total = torch.where(torch.arange(len(total), device=total.device) < rows, total, 0.0)
    return total
