"""Multiple-negatives ranking: text retrieval's InfoNCE over queries and documents, with hard negatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..._checks import check_matrix, scalar_tensor
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...distributed.scope import Scope, Shard
from ...ops.l2_normalize import l2_normalize
from ...ops.types import Pairs, Want
from .._inputs import check_fits, check_gather, in_one_dtype, two_views
from .diagnostics import Diagnosed, Diagnostics, diagnostics_of, with_diagnostics

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
PARTITION_MODES = ("joint", "per_direction")


@over_ranks()
def multiple_negatives_ranking(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    scale: float | Tensor = 20.0,
    *,
    directions: Sequence[str] = ("query_to_doc",),
    partition_mode: str = "joint",
    normalize: bool = True,
    gather_distributed: bool = False,
    strategy: str = "gather",
) -> Tensor:
    """Multiple-negatives ranking loss, mean over the N queries: ``ℓ_i = log Z_i − scale·q_i·d_i``.

    Queries ``q`` are the anchors; documents are the positives ``d`` and all hard negatives. ``Z_i`` sums
    ``exp(scale·…)`` over the similarities that ``directions`` names:

        query_to_doc    q_i to every document (always: the positive is among them)
        query_to_query  q_i to every other query
        doc_to_query    d_i to every query
        doc_to_doc      d_i to every document of another query

    Args:
        anchors, positives: [N, D], row ``i`` of both a pair; float32, float64, bfloat16 or float16.
        negatives: [N, D] or [N, H, D], hard negatives: documents for all queries, and of query ``i`` in ``doc_to_doc``.
        scale: multiplies the similarities, ``1/τ``, positive (default 20); or a one-element tensor, which receives its
            gradient.
        directions: which, ``query_to_doc`` among them.
        partition_mode: ``"joint"``: one sum over all directions; ``"per_direction"``: the mean of one ``log Z_i`` each,
            for the directions that hold the positive (``query_to_doc``, ``doc_to_query``).
        normalize: divide each row by its norm first (default: cosine similarity; ``False``: dot products).
        gather_distributed: queries and documents of all ranks; ``False``: this rank's. H must agree between ranks.
        strategy: how, ``"gather"`` or ``"ring"``.

    Returns:
        [] float32 (float64 for float64 inputs). Over several ranks the mean of their values is the loss of the global
        batch.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, scale is a number and not positive (a tensor is not
            read), a direction or the partition mode is not one of the above, or they do not go together.

    Source: Henderson et al. 2017, "Efficient Natural Language Response Suggestion for Smart Reply", section 4.4; all
    four directions: Li et al. 2023, "Towards General Text Embeddings with Multi-stage Contrastive Learning", section
    3.3. Value as sentence-transformers 6.2.0's ``MultipleNegativesRankingLoss`` (without its hardness weights).

    Example:
        >>> anchors, positives = torch.eye(4), torch.eye(4)
        >>> round(sslfast.multiple_negatives_ranking(anchors, positives, scale=2.0).item(), 4)
        0.3408
        >>> round(sslfast.multiple_negatives_ranking(anchors, positives, -torch.eye(4), scale=2.0).item(), 4)
        0.6045
    """
    texts = _checked(anchors, positives, negatives, normalize)
    scope = scope_of(gather_distributed, strategy)
    return _ranking(texts, scale, directions, partition_mode, scope)[0]


class _Texts(NamedTuple):
    """Checked, in one dtype, rows normalised if asked."""

    queries: Tensor  # [N, D]
    positives: Tensor  # [N, D]
    documents: Tensor  # [(1 + H)·N, D]: the positives, then the hard negatives
    hard: int  # H


@over_ranks("scale")
def _ranking(
    texts: _Texts,
    scale: float | Tensor,
    directions: Sequence[str],
    partition_mode: str,
    scope: Scope,
    diagnostics: bool = False,
) -> Diagnosed:
    _check_options(scale, directions, partition_mode)
    q, documents, hard = texts.queries, texts.documents, texts.hard
    factor = scalar_tensor("scale", scale, q)
    shard = scope.shard(documents.view(q.shape[0], -1))  # [N, (1 + H)·D]: the ranks must agree on H too
    # A rank's documents are its positives, then its hard negatives, so they start at (1 + H) times its first query.
    first = (1 + hard) * shard.offset
    pairs = Pairs(q, documents, factor, positives=first + torch.arange(shard.local, device=q.device))
    to_docs = scope.terms(pairs, Want(columns="doc_to_query" in directions, hardest=diagnostics))
    assert to_docs.positive is not None
    parts = [to_docs.row_lse, *_other_directions(texts, factor, scope, shard, directions)]
    if to_docs.col_lse is not None:
        parts.append(to_docs.col_lse[: shard.local])  # the columns of the positives: d_i to every query
    if partition_mode == "joint":
        log_z = parts[0]
        for part in parts[1:]:
            log_z = torch.logaddexp(log_z, part)
    else:
        log_z = torch.stack(parts).mean(0)
    loss = shard.weight * (log_z - to_docs.positive).sum()
    count = shard.local * (1 + hard) * shard.total
    return loss, diagnostics_of(to_docs, factor, count) if diagnostics else None


def _check_options(scale: float | Tensor, directions: Sequence[str], partition_mode: str) -> None:
    if not isinstance(scale, Tensor) and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    unknown = [name for name in directions if name not in DIRECTIONS]
    if isinstance(directions, str) or unknown:
        raise ValueError(f"directions must be some of {DIRECTIONS}, got {directions!r}")
    if "query_to_doc" not in directions:
        raise ValueError(f"directions must include 'query_to_doc', which holds the positive, got {tuple(directions)}")
    if partition_mode not in PARTITION_MODES:
        raise ValueError(f"partition_mode must be one of {PARTITION_MODES}, got {partition_mode!r}")
    if partition_mode == "per_direction" and {"query_to_query", "doc_to_doc"} & set(directions):
        raise ValueError(
            "partition_mode='per_direction' takes directions that hold the positive: query_to_doc and doc_to_query, "
            f"got {tuple(directions)}"
        )


def _checked(anchors: Tensor, positives: Tensor, negatives: Tensor | None, normalize: bool) -> _Texts:
    if negatives is None:
        q, d = two_views("anchors", anchors, "positives", positives, normalize)
        return _Texts(q, d, d, 0)
    q, d = two_views("anchors", anchors, "positives", positives, normalize=False)
    if not isinstance(negatives, Tensor):
        raise TypeError(f"negatives must be a torch.Tensor, got {type(negatives).__name__}")
    if negatives.dim() not in (2, 3) or negatives.shape[0] != q.shape[0] or negatives.numel() == 0:
        raise ValueError(
            f"negatives must have shape ({q.shape[0]}, D) or ({q.shape[0]}, H, D), got {tuple(negatives.shape)}"
        )
    rows = negatives.reshape(-1, negatives.shape[-1])
    check_matrix("negatives", rows)
    q, d, rows = in_one_dtype(q, d, rows)  # type: ignore[assignment]
    check_fits("negatives", rows, "anchors", q)
    documents = torch.cat([d, rows])
    if normalize:
        q, documents = l2_normalize(q), l2_normalize(documents)
    return _Texts(q, documents[: q.shape[0]], documents, rows.shape[0] // q.shape[0])


def _other_directions(
    texts: _Texts, scale: Tensor, scope: Scope, shard: Shard, directions: Sequence[str]
) -> list[Tensor]:
    """``log Z_i`` of ``query_to_query`` and ``doc_to_doc``, where asked for."""
    numbers = shard.ids(texts.queries.device)  # of the queries
    parts = []
    if "query_to_query" in directions:
        parts.append(scope.terms(Pairs(texts.queries, None, scale, row_ids=numbers)).row_lse)
    if "doc_to_doc" in directions:
        pairs = Pairs(texts.positives, None, scale, row_ids=numbers)
        if texts.hard:
            query_of = torch.cat([numbers, numbers.repeat_interleave(texts.hard)])  # of each document
            pairs = pairs._replace(k=texts.documents, col_ids=query_of)
        parts.append(scope.terms(pairs).row_lse)
    return parts


class MultipleNegativesRankingLoss(nn.Module):
    """The module form of :func:`multiple_negatives_ranking`, on embeddings rather than around a model.

    Args:
        scale, directions, partition_mode, normalize, gather_distributed, strategy, diagnostics: as
            :func:`multiple_negatives_ranking`; a scale that is a tensor or ``nn.Parameter`` moves with the module.

    Shapes:
        ``anchors``, ``positives`` [N, D], ``negatives`` [N, D] or [N, H, D]; output: [], or ``(loss, diagnostics)``.

    Raises:
        As :func:`multiple_negatives_ranking`.

    Example:
        >>> criterion = sslfast.MultipleNegativesRankingLoss(scale=2.0)
        >>> round(criterion(torch.eye(4), torch.eye(4)).item(), 4)
        0.3408
    """

    scale: float | Tensor

    def __init__(
        self,
        scale: float | Tensor = 20.0,
        *,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        normalize: bool = True,
        gather_distributed: bool = False,
        strategy: str = "gather",
        diagnostics: bool = False,
    ) -> None:
        super().__init__()
        _check_options(scale, directions, partition_mode)
        check_gather(gather_distributed, strategy)
        if isinstance(scale, Tensor) and not isinstance(scale, nn.Parameter):
            self.register_buffer("scale", scale, persistent=False)
        else:
            self.scale = scale
        self.directions = tuple(directions)
        self.partition_mode = partition_mode
        self.normalize = normalize
        self.gather_distributed = gather_distributed
        self.strategy = strategy
        self.diagnostics = diagnostics

    @over_ranks()
    def forward(
        self, anchors: Tensor, positives: Tensor, negatives: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Diagnostics]:
        """The loss of N queries, their positives and their hard negatives."""
        texts = _checked(anchors, positives, negatives, self.normalize)
        scope = scope_of(self.gather_distributed, self.strategy)
        return with_diagnostics(
            _ranking(texts, self.scale, self.directions, self.partition_mode, scope, self.diagnostics)
        )

    def extra_repr(self) -> str:
        return f"scale={self.scale}, directions={self.directions}, partition_mode={self.partition_mode!r}"
