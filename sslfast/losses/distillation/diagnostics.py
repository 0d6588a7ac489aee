"""What tells a prototype loss that learns from one that is stuck or has collapsed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._checks import accumulator

PART = 1 << 24  # numbers of a view at a time: of all rows, softmaxes would be more than all else


class PrototypeDiagnostics(NamedTuple):
    """Means over this rank's rows, each [] float32 (float64 for float64 logits), without gradient.

    ``loss_above_uniform``: the loss minus ln K. At 0 the student is uniform, which is where runs get stuck (8.0064 for
    3,000 prototypes, 11.0904 for 65,536). ``teacher_entropy``: mean −Σ p log p of the targets; ln K means that the
    teacher says nothing, 0 that it is certain. ``usage_perplexity``: exp of the entropy of the targets' mean; K where
    all prototypes are used alike, 1 where all rows have the same one.

    Example:
        >>> criterion = sslfast.DINOLoss(4, diagnostics=True)
        >>> loss, found = criterion([torch.eye(4)] * 2, [torch.eye(4)] * 2)
        >>> round(found.usage_perplexity.item(), 4)
        4.0
    """

    loss_above_uniform: Tensor
    teacher_entropy: Tensor
    usage_perplexity: Tensor


@torch.no_grad()
def prototype_diagnostics(
    loss: Tensor,
    teacher: Sequence[Tensor],
    bias: Tensor | None,
    temperature: float,
    rows: Tensor | None = None,
) -> PrototypeDiagnostics:
    """Diagnostics of targets ``softmax_k(teacher/τt + bias)``, for views [v, B, K] and a bias [T or 1, P, K].

    ``rows``: [], how many of the first rows count.
    """
    kind = accumulator(teacher[0])
    prototypes, batch = teacher[0].shape[2], teacher[0].shape[1]
    count = torch.full((), batch, device=loss.device) if rows is None else rows
    places = torch.arange(batch, device=loss.device).split(max(1, PART // prototypes))
    usage, entropy = loss.new_zeros(prototypes, dtype=kind), loss.new_zeros((), dtype=kind)
    views = [view for part in teacher for view in part]
    for t, view in enumerate(views):
        for at, part in zip(places, view.split(max(1, PART // prototypes)), strict=True):
            x = part.to(kind) / temperature
            if bias is not None:
                of_view = bias[t if len(bias) > 1 else 0]
                x = x + of_view[at % len(of_view)]
            p = torch.where((at < count)[:, None], torch.softmax(x, 1), 0.0)
            usage += p.sum(0)
            entropy += torch.special.entr(p).sum()
    total = count * len(views)
    return PrototypeDiagnostics(
        loss_above_uniform=loss.detach() - math.log(prototypes),
        teacher_entropy=entropy / total,
        usage_perplexity=torch.special.entr(usage / total).sum().exp(),
    )


Diagnosed = tuple[Tensor, PrototypeDiagnostics | None]


def with_diagnostics(diagnosed: Diagnosed) -> Tensor | tuple[Tensor, PrototypeDiagnostics]:
    """What a module returns: the loss, and the diagnostics where it was asked for them."""
    loss, found = diagnosed
    return loss if found is None else (loss, found)
