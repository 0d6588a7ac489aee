"""Losses of a teacher, of prototypes and of distributions in plain PyTorch, as users write them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def byol(p0: Tensor, p1: Tensor, t0: Tensor, t1: Tensor) -> Tensor:
    """2 − 2cos of predictions and targets of the other view, the sum of both directions (Grill et al. 2020)."""
    first, second = (F.cosine_similarity(p, t.detach(), dim=1).mean() for p, t in ((p0, t1), (p1, t0)))
    return 4 - 2 * (first + second)


def sim_siam(p0: Tensor, p1: Tensor, z0: Tensor, z1: Tensor) -> Tensor:
    """−cos of predictions and embeddings of the other view, the mean of both directions (Chen & He 2021)."""
    first, second = (F.cosine_similarity(p, z.detach(), dim=1).mean() for p, z in ((p0, z1), (p1, z0)))
    return -(first + second) / 2


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Parameters move by 1 − momentum of the way; buffers are copied."""
    for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        mine.mul_(momentum).add_(theirs, alpha=1 - momentum)
    for mine, theirs in zip(teacher.buffers(), student.buffers(), strict=True):
        mine.copy_(theirs)


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Assignments [B, K] of scores [B, K] that use all prototypes alike."""
    q = torch.exp((scores - scores.max()) / epsilon)
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    return q


class SwAV(nn.Module):
    """The swapped prediction with its [B, K] assignments in memory (Caron et al. 2020)."""

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, high: Sequence[Tensor], low: Sequence[Tensor] = ()) -> Tensor:
        views = [*high, *low]
        terms = []
        for i, scores in enumerate(high):
            q = sinkhorn(scores.detach())
            terms += [
                -(q * F.log_softmax(other / self.temperature, dim=1)).sum(1).mean()
                for v, other in enumerate(views)
                if v != i
            ]
        return torch.stack(terms).mean()


class DINO(nn.Module):
    """The cross entropy of all pairs of views, with its [B, K] softmaxes in memory (Caron et al. 2021)."""

    center: Tensor

    def __init__(self, prototypes: int, teacher_temp: float = 0.04, student_temp: float = 0.1) -> None:
        super().__init__()
        self.teacher_temp, self.student_temp = teacher_temp, student_temp
        self.register_buffer("center", torch.zeros(prototypes))

    def forward(self, teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
        targets = [torch.softmax((t.detach() - self.center) / self.teacher_temp, dim=1) for t in teacher]
        terms = [
            -(target * F.log_softmax(scores / self.student_temp, dim=1)).sum(1).mean()
            for i, target in enumerate(targets)
            for v, scores in enumerate(student)
            if v != i
        ]
        with torch.no_grad():
            self.center.lerp_(torch.cat(list(teacher)).mean(0), 0.1)
        return torch.stack(terms).mean()


def le_jepa(z: Tensor, slices: Tensor, lambda_param: float) -> Tensor:
    """LeJEPA (Balestriero & LeCun 2025) of views [V, N, D] on slices [D, S], all [V, 16, N, S] angles in memory."""
    t = torch.linspace(0, 3, 17)[1:].view(-1, 1, 1)
    angles = (z @ slices).unsqueeze(1) * t
    normal = torch.exp(-t.square() / 2).squeeze(-1)  # [16, 1]
    weight = 2 * 3 / 16 * normal
    weight[-1] /= 2
    difference = (angles.cos().mean(2) - normal).square() + angles.sin().mean(2).square()  # [V, 16, S]
    statistic = z.shape[1] * (weight * difference).sum(1).mean()
    return lambda_param * statistic + (1 - lambda_param) * (z - z.mean(0)).square().mean()
