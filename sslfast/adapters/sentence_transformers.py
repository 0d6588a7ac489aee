"""sentence-transformers' losses (``sentence_transformers.losses``) with sslfast's kernels in them.

Encoders, batches, gradient cache and trainer stay the package's: what is replaced is the loss of the embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sentence_transformers.sentence_transformer.losses as upstream
import torch
import torch.distributed as dist
from sentence_transformers.util import all_gather_with_grad
from sentence_transformers.util.similarity import cos_sim, dot_score, pytorch_cos_sim
from torch import Tensor

from .._checks import FLOATS
from ..losses.contrastive.ranking import DIRECTIONS, PARTITION_MODES, multiple_negatives_ranking
from ._serve import Package, Unserved, served, unserved_matrices

_COSINE = (cos_sim, pytorch_cos_sim)
_WITHOUT_POSITIVE = {"query_to_query", "doc_to_doc"}


def _from_embeddings(self: Any, embeddings: Any, labels: Any) -> Tensor | Unserved:
    return _ranking(self, embeddings)


def _from_minibatches(self: Any, reps: Any, labels: Any = None, *, with_backward: Any = False) -> Tensor | Unserved:
    loss = _ranking(self, [torch.cat(minibatches) for minibatches in reps])
    if isinstance(loss, Unserved) or not with_backward:
        return loss
    loss.backward()
    return loss.detach()


def _ranking(options: Any, embeddings: Sequence[Tensor]) -> Tensor | Unserved:
    """The loss of queries, positives and hard negatives, with the options that both classes hold."""
    unserved = _unserved_embeddings(embeddings) or _unserved_options(options, embeddings[0])
    if unserved:
        return unserved
    first = embeddings[0]
    if first.dtype in (torch.bfloat16, torch.float16) and not torch.is_autocast_enabled(first.device.type):
        embeddings = [x.float() for x in embeddings]  # as the package: similarities of 16-bit rows are float32
    gather = options.gather_across_devices
    if gather and not (dist.is_available() and dist.is_initialized()):
        all_gather_with_grad(first)  # the package's own words, once, about what is then its local batch
        gather = False
    queries, positives, *negatives = embeddings
    loss = multiple_negatives_ranking(
        queries,
        positives,
        torch.stack(negatives, 1) if negatives else None,
        options.scale,
        directions=options.directions,
        partition_mode=options.partition_mode,
        normalize=options.similarity_fct in _COSINE,
        gather_distributed=gather,
    )
    assert isinstance(loss, Tensor)
    return loss


def _unserved_embeddings(embeddings: object) -> Unserved | None:
    if not isinstance(embeddings, (list, tuple)) or len(embeddings) < 2:
        return Unserved("no two columns of embeddings")
    return unserved_matrices(*embeddings)


def _unserved_options(options: Any, like: Tensor) -> Unserved | None:
    if options.similarity_fct not in (*_COSINE, dot_score):
        return Unserved("a similarity_fct other than cos_sim and dot_score")
    if options.hardness_mode is not None and options.hardness_strength > 0.0:
        return Unserved(f"hardness_mode={options.hardness_mode!r}")
    # The constructor refuses these; an assignment after it does not.
    directions, mode = set(options.directions), options.partition_mode
    if "query_to_doc" not in directions or not directions <= set(DIRECTIONS) or mode not in PARTITION_MODES:
        return Unserved(f"directions={options.directions!r}, partition_mode={mode!r}")
    if mode == "per_direction" and directions & _WITHOUT_POSITIVE:
        return Unserved(f"partition_mode={mode!r} with directions={options.directions!r}")
    scale = options.scale
    if isinstance(scale, Tensor):
        if scale.dim() or scale.dtype not in FLOATS or scale.device != like.device:
            return Unserved(f"a scale of shape {tuple(scale.shape)}, {scale.dtype}, {scale.device}")
    elif not isinstance(scale, (int, float)) or isinstance(scale, bool) or not scale > 0:
        return Unserved(f"scale={scale!r}")
    return None


class MultipleNegativesRankingLoss(upstream.MultipleNegativesRankingLoss):
    """``sentence_transformers.losses.MultipleNegativesRankingLoss``.

    Args:
        model, scale, similarity_fct, gather_across_devices, directions, partition_mode, hardness_mode,
            hardness_strength: as there. A ``similarity_fct`` other than ``cos_sim`` and ``dot_score``, and a hardness
            mode with a strength, are the package's own code.

    Shapes:
        ``compute_loss_from_embeddings``: [N, D] for anchors, positives, and any number of hard negatives; float32,
        float64, bfloat16 or float16. Output: [] float32 (float64 for float64).

    Raises:
        What sentence-transformers raises.
    """

    compute_loss_from_embeddings = served(
        upstream.MultipleNegativesRankingLoss.compute_loss_from_embeddings, _from_embeddings
    )


class CachedMultipleNegativesRankingLoss(upstream.CachedMultipleNegativesRankingLoss):
    """``sentence_transformers.losses.CachedMultipleNegativesRankingLoss``: the gradient cache is the package's.

    Args:
        As there. ``mini_batch_size`` splits the encoder's work alone: the loss needs no splitting.

    Shapes, errors: as :class:`MultipleNegativesRankingLoss`.
    """

    calculate_loss = served(upstream.CachedMultipleNegativesRankingLoss.calculate_loss, _from_minibatches)


_UNCHANGED = {
    "a guide model's similarities mask single pairs": ("GISTEmbedLoss", "CachedGISTEmbedLoss"),
    "they choose triplets from the full pair matrix": (
        "BatchAllTripletLoss",
        "BatchHardTripletLoss",
        "BatchSemiHardTripletLoss",
        "MegaBatchMarginLoss",
    ),
    "sslfast has no kernel for them": ("ContrastiveTensionLossInBatchNegatives", "GlobalOrthogonalRegularizationLoss"),
    "sums over pairs of labels": ("CoSENTLoss", "AnglELoss"),
    "one pass over the rows already": (
        "CosineSimilarityLoss",
        "ContrastiveLoss",
        "TripletLoss",
        "MSELoss",
        "SoftmaxLoss",
        "others by row",
    ),
    "scores that are no dot products of two rows": ("cross_encoder.losses", "multi_vector_encoder.losses"),
}


def contents() -> Package:
    return Package(
        classes=(CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss),
        through=dict.fromkeys(
            ("AdaptiveLayerLoss", "CSRLoss", "Matryoshka2dLoss", "MatryoshkaLoss", "SpladeLoss"), "the loss inside"
        ),
        unchanged={name: reason for reason, names in _UNCHANGED.items() for name in names},
    )
