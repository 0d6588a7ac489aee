"""What a contrastive pass knows besides the loss, on request and without gradient.

A loss's private function takes ``diagnostics`` and returns ``(loss, Diagnostics or None)``; the public function returns
the loss, the module what it was made to return.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...ops.l2_normalize import l2_normalize
from ...ops.types import Pairs, SimilarityTerms, Want
from ._inputs import inverse


class Diagnostics(NamedTuple):
    """Means over the rows of this rank that have a positive, each [] float32 (float64 for float64 inputs).

    ``accuracy``: share of rows whose positive has a larger logit than every negative (contrastive top-1; a tie is
    wrong). ``positive_similarity``, ``hardest_negative_similarity``: means of ``q_i·k_p`` and of ``max_j q_i·k_j`` over
    the row's negatives, those of all ranks; −inf where rows have none. ``alignment``: mean ``‖q_i − k_p‖²``, and
    ``uniformity_at_temperature``: ``log mean exp(−‖q_i − k_j‖²/(2τ))`` over all pairs in the sums, both for unit rows
    (Wang & Isola 2020, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere", equations 8 and 9). The latter moves with the temperature: only at τ = 1/4 is it comparable with
    :func:`sslfast.uniformity`, whose t is 2.

    Example:
        >>> loss, found = sslfast.NTXentLoss(diagnostics=True)(torch.eye(4), torch.eye(4))
        >>> found.positive_similarity.item(), found.hardest_negative_similarity.item()
        (1.0, 0.0)
    """

    accuracy: Tensor
    positive_similarity: Tensor
    hardest_negative_similarity: Tensor
    alignment: Tensor
    uniformity_at_temperature: Tensor


Diagnosed = tuple[Tensor, Diagnostics | None]


def with_diagnostics(diagnosed: Diagnosed) -> Tensor | tuple[Tensor, Diagnostics]:
    """What a module returns: the loss, and the diagnostics where it was asked for them."""
    loss, found = diagnosed
    return loss if found is None else (loss, found)


@torch.no_grad()
def diagnostics_of(
    terms: SimilarityTerms,
    scale: float | Tensor,
    pairs: int | Tensor,
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
        rows: [M] bool, the rows that have a positive (default: all); the others enter the uniformity alone.
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
        uniformity_at_temperature=terms.row_lse.logsumexp(0) - _log(pairs, kind) - scale,
    )


def _log(pairs: int | Tensor, kind: torch.dtype) -> Tensor | float:
    return pairs.clamp(min=1).to(kind).log() if isinstance(pairs, Tensor) else math.log(max(pairs, 1))


@over_ranks()
def contrastive_diagnostics(
    q: Tensor,
    k: Tensor | None = None,
    temperature: float | Tensor = 0.25,
    *,
    positives: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    normalize: bool = True,
    gather_distributed: bool = False,
    strategy: str = "gather",
) -> Diagnostics:
    """:class:`Diagnostics` of queries against keys, by a forward pass of its own and without gradient.

    The modules give those of their loss for nothing (``diagnostics=True``); this is for losses called as functions.

    Args:
        q, k: [M, D] and [N, D]; float32, float64, bfloat16 or float16. Default of k: the rows of q themselves, which
            then need ``positives``.
        temperature: τ, which ``uniformity_at_temperature`` is taken at. Default 0.25: that of :func:`uniformity`.
        positives: [M] integers, the key of each query (of all ranks' keys), −1 for none. Default: key i of query i.
        row_ids, col_ids: [M] and [N] integers; pairs with equal ids are no negatives. Without k, ``row_ids`` alone.
        normalize: divide each row by its norm first (default).
        gather_distributed: against the keys of all ranks; ``False``: this rank's.
        strategy: how, ``"gather"`` or ``"ring"``.

    Raises:
        TypeError, ValueError: as :func:`similarity_terms`; there is no k and no positives; τ is zero or not finite.

    Example:
        >>> z0 = z1 = torch.eye(4)
        >>> sslfast.contrastive_diagnostics(z0, z1).accuracy.item()
        1.0
        >>> z, ids = torch.cat([z0, z1]), torch.arange(8)  # as NT-Xent: both views against all rows
        >>> sslfast.contrastive_diagnostics(z, positives=ids.roll(4), row_ids=ids).positive_similarity.item()
        1.0
    """
    scope = scope_of(gather_distributed, strategy)
    with torch.no_grad():
        if normalize:
            q, k = l2_normalize(q), None if k is None else l2_normalize(k)
        pairs = Pairs(q, k, inverse(temperature, q), None, row_ids, col_ids, positives).checked()
        if positives is None:
            if k is None:
                raise ValueError("positives must say which row belongs to which where k is None")
            if len(q) != len(k):
                raise ValueError(
                    f"q has {len(q)} rows and k {len(k)}: say with positives which row of k belongs to which"
                )
        keys = scope.shard(pairs.columns)
        if positives is None:
            pairs = pairs._replace(positives=keys.ids(q.device))
        terms = scope.terms(pairs, Want(hardest=True))
        assert pairs.positives is not None
        count: int | Tensor = len(q) * keys.total
        if row_ids is not None:
            count = count - excluded_pairs(row_ids, scope.gather(row_ids if col_ids is None else col_ids))
        return diagnostics_of(terms, pairs.scale, count, rows=pairs.positives >= 0)


def excluded_pairs(row_ids: Tensor, col_ids: Tensor) -> Tensor:
    """[] how many pairs have equal ids."""
    ordered = col_ids.sort().values
    first, last = (torch.searchsorted(ordered, row_ids, right=right) for right in (False, True))
    return (last - first).sum()
