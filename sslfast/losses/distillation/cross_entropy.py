"""Cross entropy of a student's stored logits against a teacher's, or against given assignments, over pairs of views."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._checks import FLOATS, accumulator
from ...ops.distillation_cross_entropy import distillation_cross_entropy as cross_entropy_of_rows
from ...ops.sinkhorn import as_count, check_count, check_number
from ._views import Views, count_of, matching_views


def distillation_cross_entropy(
    student_logits: Views,
    teacher_logits: Views,
    *,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
    teacher_bias: Tensor | None = None,
    row_weights: Tensor | None = None,
    rows: Tensor | None = None,
    ignore_diagonal: bool = False,
) -> Tensor:
    """Cross entropy of softened softmaxes over prototypes, a mean over pairs of a teacher's and a student's view.

        p_t = softmax_k(teacher_t/τt + bias),      CE_ts = −Σ_k p_tk log softmax_k(student_s/τs)_k
        loss = Σ_b w_b · mean over (t, s) of CE_ts[b],      w_b = 1/B

    Each view is read once forward, and once backward, which writes the student's gradient: no softmax is stored.

    Args:
        student_logits: [B, K], or S views as [S, B, K] or as a sequence of [B, K]; float32, float64, bfloat16 or
            float16. With several dtypes all are copied to the widest.
        teacher_logits: T views likewise; receives no gradient.
        student_temperature, teacher_temperature: τs (default 0.1) and τt (default 0.04), numbers, not zero.
        teacher_bias: [K], or [T, K] one for each view, added to the teacher's logits over τt: ``−center/τt`` for DINO's
            centre, :func:`sinkhorn_bias` for SwAV's, DINOv2's and DINOv3's assignments. No gradient.
        row_weights: [B], w (default 1/B each), without gradient: 1/(masked tokens of the image · images) for iBOT.
        rows: [] or [1], whole number on the logits' device: only so many of the first rows count, which the host does
            not read; the default weights are then 1/rows.
        ignore_diagonal: leave out the pairs of view t with view t, which are the same crop for DINO and SwAV.

    Returns:
        [] float32 (float64 for float64 logits). Differentiable in the student's logits, twice through the reference.
        Without a row it is NaN, as the mean of nothing; with ``row_weights`` 0, with zero gradients.

    Raises:
        TypeError, ValueError: an argument does not fit, or no pair is left; it is named.

    Source: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", equation 3 and algorithm 1.
    DINOv2's ``DINOLoss`` is the sum over the pairs, this times their number.

    Example:
        >>> student, teacher = torch.zeros(3, 2, 4), torch.eye(4)[:2]
        >>> loss = sslfast.distillation_cross_entropy(student, teacher)  # uniform students: ln K
        >>> round(loss.item(), 4)
        1.3863
    """
    student, teacher = matching_views("student_logits", student_logits, "teacher_logits", teacher_logits)
    check_number("student_temperature", student_temperature, student[0])
    check_number("teacher_temperature", teacher_temperature, student[0])
    bias = None if teacher_bias is None else _checked_bias(teacher_bias, student[0], count_of(teacher))
    pairing = Pairing(ignore_diagonal, False, (student_temperature, teacher_temperature))
    return mean_of_pairs(student, teacher, bias, pairing, row_weights, rows)


def assignment_cross_entropy(
    student_logits: Views,
    assignments: Views,
    *,
    temperature: float = 0.1,
    row_weights: Tensor | None = None,
    rows: Tensor | None = None,
    ignore_diagonal: bool = False,
) -> Tensor:
    """:func:`distillation_cross_entropy` against assignments that are given, such as those of :func:`sinkhorn`.

        CE_ts = −Σ_k q_tk log softmax_k(student_s/τ)_k

    Args:
        student_logits: as there.
        assignments: q, T views [B, K] likewise; rows need not sum to 1. No gradient.
        temperature: τ of the student (default 0.1).
        row_weights, rows, ignore_diagonal: as there.

    Returns:
        As there.

    Raises:
        As there.

    Example:
        >>> scores = torch.eye(4)
        >>> loss = sslfast.assignment_cross_entropy(scores, sslfast.sinkhorn(scores), temperature=1.0)
        >>> round(loss.item(), 4)
        0.7437
    """
    student, teacher = matching_views("student_logits", student_logits, "assignments", assignments)
    check_number("temperature", temperature, student[0])
    return mean_of_pairs(student, teacher, None, Pairing(ignore_diagonal, True, (temperature, 1.0)), row_weights, rows)


class Pairing(NamedTuple):
    """Which views meet, and what the teacher's numbers are: targets, or logits; with both temperatures (τs, τt)."""

    ignore_diagonal: bool
    assigned: bool
    temperatures: tuple[float, float]

    def pairs(self, students: int, teachers: int) -> int:
        return students * teachers - (min(students, teachers) if self.ignore_diagonal else 0)


def mean_of_pairs(
    student: list[Tensor],
    teacher: list[Tensor],
    bias: Tensor | None,
    pairing: Pairing,
    row_weights: Tensor | None,
    rows: Tensor | None,
    teacher_rows: Tensor | None = None,
) -> Tensor:
    """The loss of checked views [v, B, K] and bias [T or 1, P, K]; ``teacher_rows``: [B] into a teacher's [v, R, K]."""
    students, teachers = count_of(student), count_of(teacher)
    pairs = pairing.pairs(students, teachers)
    if pairs == 0:
        raise ValueError(
            f"ignore_diagonal=True leaves no pair of views: {teachers} of the teacher and {students} of the student"
        )
    batch = student[0].shape[1]
    if rows is not None:
        check_count(rows, student[0])
    count = as_count(rows)
    of_row = cross_entropy_of_rows(
        student,
        teacher,
        bias,
        pairing.temperatures,
        ignore_diagonal=pairing.ignore_diagonal,
        assigned=pairing.assigned,
        rows=count,
        teacher_rows=teacher_rows,
    )
    if row_weights is not None:
        return (of_row * checked_weights(row_weights, student[0], batch)).sum() / pairs
    return of_row.sum() / (pairs * (batch if count is None else count))


def checked_weights(weights: Tensor, like: Tensor, batch: int) -> Tensor:
    """``row_weights`` [B] of logits like ``like``, in the accumulator's dtype."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"row_weights must be a torch.Tensor, got {type(weights).__name__}")
    if weights.shape != (batch,):
        raise ValueError(f"row_weights must have shape ({batch},), got {tuple(weights.shape)}")
    if weights.device != like.device:
        raise ValueError(f"row_weights must be on the logits' device {like.device}, got {weights.device}")
    return weights.detach().to(accumulator(like))


def _checked_bias(bias: Tensor, like: Tensor, teachers: int) -> Tensor:
    """``bias`` as [T or 1, 1, K]."""
    if not isinstance(bias, Tensor) or bias.dtype not in FLOATS:
        raise TypeError(f"teacher_bias must be a floating-point tensor, got {getattr(bias, 'dtype', type(bias))}")
    prototypes = like.shape[2]
    if bias.shape not in ((prototypes,), (teachers, prototypes)):
        raise ValueError(
            f"teacher_bias must have shape ({prototypes},) or ({teachers}, {prototypes}), got {tuple(bias.shape)}"
        )
    if bias.device != like.device:
        raise ValueError(f"teacher_bias must be on the logits' device {like.device}, got {bias.device}")
    return bias.detach().to(accumulator(like)).view(-1, 1, prototypes)


def as_bias(bias: Tensor, like: Tensor) -> Tensor:
    """A bias of this package's own making for logits like ``like``: [K] or [T, K] as [T or 1, 1, K]."""
    return bias.to(accumulator(like)).view(-1, 1, like.shape[-1])


def stacked(views: list[Tensor]) -> Tensor:
    """Views [v, B, K] as the rows [V·B, K] of one matrix."""
    return (views[0] if len(views) == 1 else torch.cat(views)).flatten(0, 1)
