"""Which prototypes a teacher uses, from features: collapse is seen before it shows in the loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._checks import check_matrix, real_number
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...ops.nearest_neighbours import nearest_neighbours
from ...ops.prototype_columns import TeacherRows, visit
from ...ops.prototype_cross_entropy import check_temperature, vector_of
from ...ops.types import NormalizedPrototypes
from .teacher_bias import check_teacher, rows_taken


class PrototypeUsage(NamedTuple):
    """What :func:`prototype_usage` found, without gradient.

    ``usage_perplexity`` []: exp of the entropy of the assignments' mean; K where all prototypes are used alike, 1 where
    all rows have the same one. ``teacher_entropy`` []: mean −Σ p log p; ln K means that the teacher says nothing, 0
    that it is certain. ``unused`` [] int64: prototypes that are no row's first choice. ``assignment`` [N] int64: each
    row's first choice, −1 of rows that take no part. The first three are of all ranks where it was asked for.

    Example:
        >>> sslfast.prototype_usage(torch.eye(3), torch.eye(3)).assignment.tolist()
        [0, 1, 2]
    """

    usage_perplexity: Tensor
    teacher_entropy: Tensor
    unused: Tensor
    assignment: Tensor


@over_ranks()
@torch.no_grad()
def prototype_usage(
    teacher: Tensor,
    prototypes: Tensor | NormalizedPrototypes,
    temperature: float = 0.04,
    *,
    teacher_bias: Tensor | None = None,
    row_weights: Tensor | None = None,
    gather_distributed: bool = False,
) -> PrototypeUsage:
    """How the teacher's assignments ``p = softmax_k(h·uᵀ/τ + β)`` use the prototypes; one product, no [N, K] in memory.

        usage perplexity = exp(−Σ_k p̄_k log p̄_k),  p̄ = mean_n p_n;   teacher entropy = −mean_n Σ_k p_nk log p_nk

    Args:
        teacher: h, [N, D]; float32, float64, bfloat16 or float16.
        prototypes: u, [K, D], or :class:`sslfast.NormalizedPrototypes`.
        temperature: τ, finite and not zero (default 0.04).
        teacher_bias: β, K numbers, as :func:`sslfast.prototype_cross_entropy` takes it. Default: none.
        row_weights: [N]; rows of weight 0 take no part, all others count alike. Default: all.
        gather_distributed: of the rows of all ranks, uneven ones too; ``False``: of this rank's alone.

    Returns:
        A :class:`PrototypeUsage`, numbers in float32 (float64 for float64 ``teacher``); NaN where no row takes part.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype, device or value does not fit; it is named. The ranks
            disagree on K.

    Source: the mean assignment of Assran et al. 2022, "Masked Siamese Networks for Label-Efficient Learning", whose
    entropy that method makes large.

    Example:
        >>> found = sslfast.prototype_usage(torch.eye(4)[[0, 0, 1, 1]], torch.eye(4))
        >>> round(found.usage_perplexity.item(), 3), found.unused.item()  # two of four prototypes
        (2.0, 2)
    """
    check_teacher(teacher, prototypes)
    check_temperature("temperature", temperature)
    scope = scope_of(gather_distributed)
    rows = TeacherRows.of(teacher, prototypes, temperature, rows_taken(row_weights, teacher))
    k, kind = len(rows.prototypes), rows.kind
    given = None if teacher_bias is None else vector_of("teacher_bias", teacher_bias, k, teacher, kind)
    bias = teacher.new_zeros(k, dtype=kind) if given is None else given.detach()
    scope.shard(rows.prototypes, {"how many prototypes": k})
    found = visit(rows, bias, by_row=True)
    assert found.entropy is not None and found.best is not None
    mass = torch.exp(found.column_lse + bias)
    chosen = mass.new_zeros(k + 1).index_add_(0, found.best + 1, torch.ones_like(found.entropy))[1:]
    count = mass.new_full((1,), len(teacher)) if rows.taken is None else rows.taken.sum(dtype=kind)[None]
    sums = scope.gather(torch.cat([mass, chosen, found.entropy.sum()[None], count])[None]).sum(0)
    mass, chosen, (entropy, count) = sums[:k], sums[k : 2 * k], sums[2 * k :]
    return PrototypeUsage(
        usage_perplexity=torch.special.entr(mass / count).sum().exp(),
        teacher_entropy=entropy / count,
        unused=(chosen == 0).sum(),
        assignment=found.best,
    )


@torch.no_grad()
def duplicate_prototypes(prototypes: Tensor | NormalizedPrototypes, threshold: float = 0.99) -> Tensor:
    """How many prototypes have another one in nearly their direction: partial collapse, which no loss shows.

    It is :func:`sslfast.nearest_neighbours` of the prototypes: K²·D operations on a CPU, no [K, K] in memory. Call it
    once an epoch, not once a step.

    Args:
        prototypes: u, [K, D], or :class:`sslfast.NormalizedPrototypes`; their norms do not matter.
        threshold: a cosine above it makes a duplicate (default 0.99).

    Returns:
        [] int64: prototypes whose nearest other one is above the threshold.

    Raises:
        TypeError, ValueError: the prototypes are no matrix, or the threshold is no finite number.

    Source: Govindarajan et al. 2024, "On Partial Prototype Collapse in the DINO Family of Self-Supervised Methods".

    Example:
        >>> sslfast.duplicate_prototypes(torch.tensor([[1.0, 0.0], [2.0, 0.01], [0.0, 1.0]])).item()
        2
    """
    u = prototypes.direction if isinstance(prototypes, NormalizedPrototypes) else prototypes
    check_matrix("prototypes", u)
    limit = real_number("threshold", threshold)
    if len(u) == 1:
        return torch.zeros((), dtype=torch.int64, device=u.device)
    return (nearest_neighbours(u.detach(), normalize=True).similarity > limit).sum()
