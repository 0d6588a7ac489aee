"""Sinkhorn–Knopp: assignments of rows to prototypes that use all prototypes alike."""

from __future__ import annotations

import torch
from torch import Tensor

from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...ops.sinkhorn import as_count, assigned, check_iterations, check_logits

STARTS = ("columns", "rows")


def sinkhorn(
    logits: Tensor,
    temperature: float = 0.05,
    iterations: int = 3,
    *,
    start: str = "columns",
    rows: Tensor | None = None,
    gather_distributed: bool = False,
) -> Tensor:
    """Soft assignments of rows to prototypes, each prototype with about the same share; without gradient.

        Q = exp(logits/τ);   ``iterations`` times: each column divided by its sum, then each row by its sum

    in the log domain: finite for any finite logits, where the textbook's exponentials overflow (float32: above 88.7·τ,
    which is 3.5 at τ = 0.04). Every row of the result sums to 1; columns come closer to B/K with every iteration.

    Args:
        logits: [B, K], scores of B rows for K prototypes; or [B, S, K], S positions that are balanced each on its own,
            as CAPI does. float32, float64, bfloat16 or float16; any strides.
        temperature: τ (SwAV's ε), not zero; default 0.05.
        iterations: at least 1 (default 3).
        start: "columns" (default; SwAV, DINOv2, DINOv3), or "rows": each row of Q is first divided by its sum, as MSN
            does with probabilities. The results differ.
        rows: [] or [1], whole number on the logits' device: only so many of the first rows count, and the others get 0.
            It is not read by the host: for buffers of a fixed size, as DINOv2's masked tokens.
        gather_distributed: columns are those of all ranks, whose numbers of rows may differ (one may have none);
            ``False``: this rank's alone.

    Returns:
        As ``logits``, float32 (float64 for float64). Where a prototype has no mass (logits of −∞) its entries are 0.

    Raises:
        TypeError, ValueError: an argument does not fit; it is named. Over ranks also where they disagree on K, τ, or
            the number of iterations.

    Source: Cuturi 2013, "Sinkhorn Distances"; Caron et al. 2020, "Unsupervised Learning of Visual Features by
    Contrasting Cluster Assignments", appendix; value as ``distributed_sinkhorn`` of facebookresearch/swav,
    ``sinkhorn_knopp_teacher`` of DINOv2 and lightly 1.6.0's ``sinkhorn``.

    Example:
        >>> [round(q, 3) for q in sslfast.sinkhorn(torch.eye(2), temperature=1.0)[0].tolist()]
        [0.731, 0.269]
    """
    bias = sinkhorn_bias(logits, temperature, iterations, start=start, rows=rows, gather_distributed=gather_distributed)
    x = check_logits(logits, temperature, rows)
    return assigned(x, bias.view(x.shape[1:]), temperature, as_count(rows)).view(logits.shape)


@over_ranks()
@torch.no_grad()
def sinkhorn_bias(
    logits: Tensor,
    temperature: float = 0.05,
    iterations: int = 3,
    *,
    start: str = "columns",
    rows: Tensor | None = None,
    gather_distributed: bool = False,
) -> Tensor:
    """The bias ``f`` of every prototype by which ``softmax_k(logits/τ + f)`` are the assignments of :func:`sinkhorn`.

        f ← −log Σ_b exp(logits_bk/τ);   then  f ← f − log Σ_b softmax_k(logits_b/τ + f)_k

    It is K numbers in place of B·K: give it to :func:`distillation_cross_entropy` as ``teacher_bias``, and the
    assignments are never stored. Each iteration visits the logits once.

    Args:
        As :func:`sinkhorn`.

    Returns:
        [K], or [S, K] for logits [B, S, K]; float32 (float64 for float64).

    Raises:
        As :func:`sinkhorn`.

    Example:
        >>> scores = torch.tensor([[2.0, 0.0], [2.0, 1.0]])
        >>> f = sslfast.sinkhorn_bias(scores, temperature=1.0)
        >>> torch.allclose(torch.softmax(scores + f, 1), sslfast.sinkhorn(scores, temperature=1.0))
        True
    """
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(map(repr, STARTS))}, got {start!r}")
    x = check_logits(logits, temperature, rows)
    scope = scope_of(gather_distributed)
    bias = scope.sinkhorn_bias(
        x, temperature, check_iterations(iterations), row_start=start == "rows", rows=as_count(rows)
    )
    return bias.view(logits.shape[1:])
