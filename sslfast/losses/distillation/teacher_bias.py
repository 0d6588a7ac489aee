"""What keeps a teacher's assignments from collapsing, as a bias for each prototype: Sinkhorn's and DINO's centre."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import accumulator, check_matrix, check_share, whole_number, without_autocast
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...distributed.scope import Scope
from ...ops.prototype_columns import TeacherRows, numbers_to_keep, visit
from ...ops.prototype_cross_entropy import check_temperature
from ...ops.types import NormalizedPrototypes


@over_ranks()
def prototype_sinkhorn(
    teacher: Tensor,
    prototypes: Tensor | NormalizedPrototypes,
    temperature: float = 0.04,
    iterations: int = 3,
    *,
    row_weights: Tensor | None = None,
    gather_distributed: bool = False,
) -> Tensor:
    """Sinkhorn–Knopp assignments of features to prototypes, as the bias f [K] that makes them.

    After any number of iterations, which end with the rows, the assignments are ``softmax_k(T + f)`` of the logits
    ``T = h·uᵀ/τ``, so f says all: it is the ``teacher_bias`` of :func:`sslfast.prototype_cross_entropy`. Iterations
    are in the log domain, so no logit overflows; each visits the rows once, and a bounded part of the logits is stored:

        f = −log Σ_n exp(T_n − r_n),   r_n = log Σ_k exp(T_nk + f_k)          (r = 0 at first; f ``iterations`` times)

    Args:
        teacher: h, [N, D]; float32, float64, bfloat16 or float16. No gradient.
        prototypes: u, [K, D], or :class:`sslfast.NormalizedPrototypes`. No gradient.
        temperature: τ, finite and not zero (default 0.04).
        iterations: at least 1 (default 3, as everywhere).
        row_weights: [N]; rows of weight 0 take no part, whatever they hold, all others count alike (so that one buffer
            serves here and in the loss). Default: all.
        gather_distributed: rows of all ranks are balanced together, uneven ones too: K numbers travel from each rank in
            each iteration. ``False``: this rank's alone.

    Returns:
        f [K] float32 (float64 for float64 ``teacher``), without gradient, the same on every rank.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype, device or value does not fit; it is named. The ranks
            disagree on K or ``iterations``.

    Source: Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", section
    3.1 and appendix A; values as the distributed Sinkhorn of facebookresearch/swav and dinov2, where these are finite.

    Example:
        >>> h = torch.eye(2)[[0, 0, 0, 1]]  # three rows of four prefer the first prototype
        >>> f = sslfast.prototype_sinkhorn(h, torch.eye(2), temperature=1.0, iterations=50)
        >>> p = torch.softmax(h @ torch.eye(2) + f, 1)
        >>> [round(x, 3) for x in p.sum(0).tolist()]  # each gets half of the rows
        [2.0, 2.0]
    """
    check_teacher(teacher, prototypes)
    check_temperature("temperature", temperature)
    count = whole_number("iterations", iterations, 1)
    scope = scope_of(gather_distributed)
    rows = TeacherRows.of(teacher, prototypes, temperature, rows_taken(row_weights, teacher))
    with torch.no_grad():
        # Or the ranks would wait for each other for ever. Of rows a rank may have none.
        scope.shard(rows.prototypes, {"how many prototypes": len(rows.prototypes), "how many iterations": count})
        keep = numbers_to_keep(rows) if count > 1 else 0
        f: Tensor | None = None
        kept: Tensor | None = None
        for step in range(count):
            found = visit(rows, f, kept=kept, keep=0 if step else keep)
            kept = found.kept if step == 0 else kept
            f = -_over_ranks(found.column_lse, scope)
            f = f.masked_fill(f == float("inf"), 0.0)  # no row takes part
    assert f is not None
    return f


def _over_ranks(columns: Tensor, scope: Scope) -> Tensor:
    """Log-sum-exp over the ranks."""
    every = scope.gather(columns[None])  # [W, K]
    return columns if len(every) == 1 else every.logsumexp(0)


@over_ranks()
def center_update_(
    center: Tensor,
    teacher: Tensor,
    prototypes: Tensor | NormalizedPrototypes,
    momentum: float = 0.9,
    *,
    row_weights: Tensor | None = None,
    gather_distributed: bool = False,
) -> Tensor:
    """Moves DINO's centre towards the mean of the teacher's logits, in place: ``c ← m·c + (1 − m)·mean_n(h_n)·uᵀ``.

    Logits are linear in the features, so their mean is one product of the mean feature with the prototypes: 2·K·D
    operations whatever the number of rows. It is a call of its own: with gradient accumulation, make it once a step.

    Args:
        center: K numbers in any shape ([K], [1, K], [1, 1, K]); float32, float64, bfloat16 or float16.
        teacher: h, [N, D] or [views, B, D].
        prototypes: u, [K, D], or :class:`sslfast.NormalizedPrototypes`.
        momentum: m, between 0 and 1 (default 0.9).
        row_weights: [N], or [B] for all views alike: rows of weight 0 take no part, all others count alike. Default:
            all.
        gather_distributed: the mean over the rows of all ranks, each row counting once; ``False``: over this rank's.

    Returns:
        ``center``. Without a row that takes part it stays as it is.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype, device or value does not fit; it is named.

    Source: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", equation 4.

    Example:
        >>> center = torch.zeros(1, 2)
        >>> sslfast.center_update_(center, torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.eye(2), 0.5).tolist()
        [[1.0, 0.5]]
        >>> loss = sslfast.prototype_cross_entropy(
        ...     torch.eye(2), torch.eye(2), torch.eye(2), teacher_temperature=0.04, teacher_bias=-center / 0.04
        ... )
    """
    if not isinstance(teacher, Tensor) or teacher.dim() not in (2, 3):
        check_matrix("teacher", teacher)
    if row_weights is not None and teacher.dim() == 3 and isinstance(row_weights, Tensor):
        row_weights = row_weights.repeat(len(teacher))
    teacher = teacher.reshape(-1, teacher.shape[-1])
    check_teacher(teacher, prototypes)
    u = prototypes.direction if isinstance(prototypes, NormalizedPrototypes) else prototypes
    if not isinstance(center, Tensor) or not center.is_floating_point():
        raise TypeError("center must be a torch.Tensor of floating-point numbers")
    if center.numel() != len(u):
        raise ValueError(f"center must have one number for each of {len(u)} prototypes, got {center.numel()}")
    share = check_share("momentum", momentum)
    taken = rows_taken(row_weights, teacher)
    scope = scope_of(gather_distributed)
    kind = accumulator(teacher)
    with torch.no_grad(), without_autocast(teacher):
        h = teacher.to(kind)
        if taken is None:
            count = h.new_full((1,), len(h))
        else:
            h, count = torch.where(taken[:, None], h, 0), taken.sum(dtype=kind)[None]
        sums = scope.gather(torch.cat([h.sum(0), count])[None]).sum(0)  # [D + 1], over the ranks in their order
        mean = sums[:-1] / sums[-1].clamp_min(1)
        logits = logits_of(mean, prototypes)
        before = center.to(kind)
        after = torch.lerp(logits.view(center.shape), before, share)
        center.copy_(torch.where(sums[-1] > 0, after, before))
    return center


def logits_of(feature: Tensor, prototypes: Tensor | NormalizedPrototypes) -> Tensor:
    """``h·uᵀ`` [K] of one feature [D], in its dtype."""
    if not isinstance(prototypes, NormalizedPrototypes):
        return prototypes.to(feature.dtype) @ feature
    u, gain = prototypes
    logits = u.to(feature.dtype) @ feature
    logits = logits / torch.linalg.vector_norm(u, dim=1, dtype=feature.dtype).clamp_min(1e-12)
    return logits if gain is None else logits * gain.reshape(-1).to(feature.dtype)


def check_teacher(teacher: Tensor, prototypes: Tensor | NormalizedPrototypes) -> None:
    if not isinstance(teacher, Tensor) or teacher.dim() != 2 or len(teacher) > 0:  # a rank may have no row
        check_matrix("teacher", teacher)
    u = prototypes.direction if isinstance(prototypes, NormalizedPrototypes) else prototypes
    check_matrix("prototypes", u)
    if u.shape[1] != teacher.shape[1]:
        raise ValueError(f"prototypes must have teacher's {teacher.shape[1]} features, got {u.shape[1]}")
    if u.device != teacher.device:
        raise ValueError(f"prototypes must be on teacher's device {teacher.device}, got {u.device}")


def rows_taken(row_weights: Tensor | None, teacher: Tensor) -> Tensor | None:
    """Which rows take part, [N]; ``None`` for all."""
    if row_weights is None:
        return None
    if not isinstance(row_weights, Tensor):
        raise TypeError(f"row_weights must be a torch.Tensor, got {type(row_weights).__name__}")
    if row_weights.shape != teacher.shape[:1]:
        raise ValueError(f"row_weights must have shape ({len(teacher)},), got {tuple(row_weights.shape)}")
    if row_weights.device != teacher.device:
        raise ValueError(f"row_weights must be on teacher's device {teacher.device}, got {row_weights.device}")
    return row_weights != 0
