"""What a contrastive pass knows besides the loss, on request and without gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.types import SimilarityTerms


class Diagnostics(NamedTuple):
    """Means over the rows of this rank that have a positive, each [] float32 (float64 for float64 inputs).

    ``accuracy``: share of rows whose positive has a larger logit than every negative (contrastive top-1; a tie is
    wrong). ``positive_similarity``, ``hardest_negative_similarity``: means of ``q_i·k_p`` and of ``max_j q_i·k_j`` over
    the row's negatives, those of all ranks; −inf where rows have none. ``alignment``: mean ``‖q_i − k_p‖²``, and
    ``uniformity``: ``log mean exp(−t‖q_i − k_j‖²)`` over all pairs in the sums with ``t = scale/2``, both for unit rows
    (Wang & Isola 2020, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere", equations 8 and 9).

    Example:
        >>> loss, found = sslfast.nt_xent(torch.eye(4), torch.eye(4), diagnostics=True)
        >>> found.positive_similarity.item(), found.hardest_negative_similarity.item()
        (1.0, 0.0)
    """

    accuracy: Tensor
    positive_similarity: Tensor
    hardest_negative_similarity: Tensor
    alignment: Tensor
    uniformity: Tensor


@torch.no_grad()
def diagnostics_of(
    terms: SimilarityTerms,
    scale: float | Tensor,
    pairs: int,
    *,
    rows: Tensor | None = None,
    best_positive: Tensor | None = None,
) -> Diagnostics:
    """Diagnostics from terms that were made with ``positives`` and ``hardest=True``, and without a bias.

    Args:
        terms: ``positive`` and ``hardest`` of each row; where a row has several positives, ``positive`` is the mean of
            their logits.
        scale: the one that the terms were made with, positive.
        pairs: how many pairs the row sums hold together.
        rows: [M] bool, the rows that have a positive (default: all); the others enter ``uniformity`` alone.
        best_positive: [M], the logit that must exceed ``hardest`` for the row to count as right, where that is not
            ``positive``.
    """
    if terms.positive is None or terms.hardest is None:
        raise ValueError("terms must have been made with positives and hardest=True")
    kind = terms.positive.dtype
    if isinstance(scale, Tensor):
        scale = scale.reshape(()).to(kind)
    right = (terms.positive if best_positive is None else best_positive) > terms.hardest

    def mean(x: Tensor) -> Tensor:
        # where, not a product: a row that is left out may hold −inf.
        return x.mean() if rows is None else torch.where(rows, x, 0.0).sum() / rows.sum()

    positive = mean(terms.positive / scale)
    return Diagnostics(
        accuracy=mean(right.to(kind)),
        positive_similarity=positive,
        hardest_negative_similarity=mean(terms.hardest / scale),
        alignment=2 - 2 * positive,
        uniformity=terms.row_lse.logsumexp(0) - math.log(max(pairs, 1)) - scale,
    )
