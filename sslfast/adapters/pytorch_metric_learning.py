"""pytorch-metric-learning's self-supervised losses with sslfast's kernels in them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pytorch_metric_learning import distances, losses, reducers
from pytorch_metric_learning.losses.generic_pair_loss import GenericPairLoss
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor

from .._checks import check_temperature
from ..losses.contrastive.pair_nt_xent import pair_nt_xent
from ..losses.contrastive.sup_con_keys import sup_con_keys
from ..losses.decorrelation.vicreg import vicreg
from ._serve import Package, Unserved, overridden, served, unserved_matrices, unserved_tensors

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# What the package's forward calls and the fast forms skip: a subclass's own keeps the package's path.
HOOKS = (
    "compute_loss",
    "_compute_loss",
    "zero_loss",
    "zero_losses",
    "reset_stats",
    "add_embedding_regularization_to_loss_dict",
    "embedding_regularization_loss",
)


class _Contrast(NamedTuple):
    """Anchors against keys; keys ``None``: each other."""

    anchors: Tensor  # [M, D]
    labels: Tensor  # [M]
    keys: Tensor | None  # [N, D]
    key_labels: Tensor | None  # [N]
    own: Tensor | None  # [M] the key that an anchor itself stands in; keys None: every row's own


# ------------------------------------------------------------------------------------- what of a loss object is served


def _plain(module: Any, *kinds: type) -> bool:
    """``module`` is of one of these very classes, keeps no statistics and has no hooks that want to be called."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) in kinds and not hooked and not module.collect_stats


def _unserved_pair_loss(loss: Any, base: type, method: str, kinds: tuple[type, ...]) -> Unserved | None:
    """Why the parts of a pair loss are not those that the fast forms compute."""
    if loss.embedding_regularizer is not None:
        return Unserved("an embedding_regularizer")
    distance = loss.distance
    if not _plain(distance, distances.CosineSimilarity, distances.DotProductSimilarity):
        return Unserved(f"the distance {type(distance).__name__}, or its statistics or hooks")
    if distance.power != 1 or not distance.is_inverted or (distance.normalize_embeddings and distance.p != 2):
        return Unserved(f"options of {type(distance).__name__}")
    if not _plain(loss.reducer, *kinds):
        return Unserved(f"the reducer {type(loss.reducer).__name__}, or its statistics or hooks")
    unserved = overridden(loss, base, *HOOKS)
    if unserved is None and getattr(loss.loss_method, "__func__", None) is not getattr(GenericPairLoss, method):
        unserved = Unserved(f"a {method} of its own")
    return unserved


def _unserved_temperature(temperature: object, like: Tensor) -> Unserved | None:
    if isinstance(temperature, Tensor) and temperature.dtype != like.dtype:
        return Unserved(f"a temperature of dtype {temperature.dtype}")
    try:
        check_temperature(temperature, like.device)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return Unserved("a temperature that is not a number from 1e-8 to 1e8 in size, or one element")
    return None


# -------------------------------------------------------------------------------------------- what of a call is served


def _unserved_labels(labels: object, embeddings: Tensor) -> Unserved | None:
    if not isinstance(labels, Tensor):
        return Unserved("no labels")
    if labels.shape != embeddings.shape[:1]:
        return Unserved(f"labels of shape {tuple(labels.shape)}")
    return Unserved(f"labels of dtype {labels.dtype}") if labels.dtype not in INTEGERS else None


def _contrast(
    embeddings: Tensor, labels: Tensor | None, indices_tuple: Any, ref_emb: Tensor | None, ref_labels: Tensor | None
) -> _Contrast | Unserved:
    """The arguments of a pair loss's ``forward`` as the package reads them."""
    if indices_tuple is not None:
        return Unserved("an indices_tuple, the pairs that a miner chose")
    unserved = unserved_tensors(embeddings, *(() if ref_emb is None else (ref_emb,)), dim=2)
    unserved = unserved or _unserved_labels(labels, embeddings)
    if unserved:
        return unserved
    assert labels is not None
    labels = c_f.to_device(labels, embeddings)
    if ref_emb is None:
        return _Contrast(embeddings, labels, None, None, None)
    unserved = _unserved_labels(ref_labels, ref_emb)
    if unserved or ref_emb.shape[1] != embeddings.shape[1]:
        return unserved or Unserved("embeddings and ref_emb of different widths")
    ref_labels = c_f.to_device(ref_labels, ref_emb)
    if ref_labels is not labels:
        return _Contrast(embeddings, labels, ref_emb, ref_labels, None)
    # The package tells a batch against itself by the labels: the same tensor, and row i is no positive of row i.
    if ref_emb is embeddings:
        return _Contrast(embeddings, labels, None, None, None)
    return _Contrast(embeddings, labels, ref_emb, ref_labels, torch.arange(len(ref_labels), device=ref_labels.device))


def _as_package(loss: Tensor, embeddings: Tensor) -> Tensor:
    """In the embeddings' dtype, as the package's; in an autocast region as it was computed, in float32 at least."""
    return loss if torch.is_autocast_enabled(embeddings.device.type) else loss.to(embeddings.dtype)


def _dtype_of_matrix(embeddings: Tensor) -> torch.dtype:
    """Of the package's matrix of similarities: in an autocast region that of its products, which leave float64 be."""
    kind = embeddings.device.type
    if torch.is_autocast_enabled(kind) and embeddings.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return embeddings.dtype


def _no_pairs(x: _Contrast) -> bool:
    """Whether there can be at most one positive and one negative pair, which the package takes for none."""
    rows, columns = len(x.anchors), len(x.anchors if x.keys is None else x.keys)
    return rows * columns - (rows if x.keys is None or x.own is not None else 0) <= 2


# ----------------------------------------------------------------------------------------------------------- the losses


def _unserved_nt_xent(loss: Any, embeddings: Tensor) -> Unserved | None:
    return _unserved_pair_loss(
        loss, losses.NTXentLoss, "pair_based_loss", (reducers.MeanReducer,)
    ) or _unserved_temperature(loss.temperature, embeddings)


def _nt_xent_of(loss: Any, x: _Contrast) -> Tensor:
    found = pair_nt_xent(
        x.anchors,
        x.labels,
        x.keys,
        x.key_labels,
        own=x.own,
        temperature=loss.temperature,
        normalize=loss.distance.normalize_embeddings,
        smallest=c_f.small_val(_dtype_of_matrix(x.anchors)),
    )
    return _as_package(found, x.anchors)


def _unserved_sup_con(loss: Any, embeddings: Tensor) -> Unserved | None:
    unserved = _unserved_pair_loss(
        loss, losses.SupConLoss, "mat_based_loss", (reducers.AvgNonZeroReducer, reducers.MeanReducer)
    )
    if unserved:
        return unserved
    reducer = loss.reducer
    if type(reducer) is reducers.AvgNonZeroReducer and not (reducer.low == 0 and reducer.high is None):
        return Unserved("an AvgNonZeroReducer with a low or high that was changed")
    return _unserved_temperature(loss.temperature, embeddings)


def _sup_con_of(loss: Any, x: _Contrast) -> Tensor:
    found = sup_con_keys(
        x.anchors,
        x.labels,
        x.keys,
        x.key_labels,
        own=x.own,
        temperature=loss.temperature,
        normalize=loss.distance.normalize_embeddings,
        reduction="mean" if type(loss.reducer) is reducers.MeanReducer else "mean_nonzero",
    )
    # Without a single negative the package's loss is 0.
    others = x.labels if x.key_labels is None else x.key_labels
    negatives = (x.labels != others[0]).any() | (others != others[0]).any()
    return _as_package(torch.where(negatives, found, 0.0), x.anchors)


FAST = {losses.NTXentLoss: (_unserved_nt_xent, _nt_xent_of), losses.SupConLoss: (_unserved_sup_con, _sup_con_of)}


def _pair_loss(kind: type) -> Any:
    unserved_loss, compute = FAST[kind]

    def fast(
        self: Any,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor | Unserved:
        x = _contrast(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if isinstance(x, Unserved):
            return x
        unserved = unserved_loss(self, embeddings)
        if unserved:
            return unserved
        return torch.sum(embeddings * 0) if _no_pairs(x) else compute(self, x)

    return fast


def _vicreg(
    self: Any,
    embeddings: Tensor,
    labels: Tensor | None = None,
    indices_tuple: Any = None,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
) -> Tensor | Unserved:
    if labels is not None or indices_tuple is not None or (ref_emb is not None and ref_labels is not None):
        return Unserved("labels or an indices_tuple")
    view = embeddings if ref_emb is None else ref_emb
    unserved = unserved_matrices(embeddings, view)
    if unserved or len(embeddings) < 2:
        return unserved or Unserved("a single row")
    reducer = self.reducer
    if not _plain(reducer, reducers.MultipleReducers) or not all(
        _plain(r, reducers.MeanReducer) for r in (*reducer.reducers.values(), reducer.default_reducer)
    ):
        return Unserved(f"the reducer {type(reducer).__name__}, its parts, or their statistics or hooks")
    parts = ("invariance_loss", "variance_loss", "covariance_loss", "_sub_loss_names")
    weights = (self.invariance_lambda, self.variance_mu, self.covariance_v, self.eps)
    if not all(isinstance(w, (int, float)) for w in weights) or self.eps <= 0:
        return Unserved("weights or an eps that are no numbers, or an eps that is not positive")
    unserved = overridden(self, losses.VICRegLoss, *HOOKS, *parts)
    if unserved:
        return unserved
    return _as_package(vicreg(embeddings, view, *weights[:3], eps=self.eps), embeddings)


def _unserved_cross_batch(
    memory: Any, embeddings: Tensor, labels: Tensor, indices_tuple: Any, enqueue_mask: Any
) -> Unserved | None:
    if memory.miner is not None or indices_tuple is not None:
        return Unserved("a miner, or an indices_tuple")
    kind = next((k for k in FAST if isinstance(memory.loss, k)), None)
    if kind is None:
        return Unserved(f"the loss {type(memory.loss).__name__}")
    loss = memory.loss
    if loss._forward_hooks or loss._forward_pre_hooks or loss._backward_hooks or loss._backward_pre_hooks:
        return Unserved("hooks of the loss")
    unserved = (
        unserved_tensors(embeddings, dim=2)
        or _unserved_labels(labels, embeddings)
        or overridden(memory, losses.CrossBatchMemory, "create_indices_tuple", "reset_stats")
        or overridden(loss, kind, "forward")
        or FAST[kind][0](loss, embeddings)
    )
    if unserved:
        return unserved
    if enqueue_mask is None:
        # Of one row the package keeps the comparison with itself.
        fits = 1 < len(embeddings) <= len(memory.embedding_memory)
        return None if fits else Unserved(f"{len(embeddings)} rows for a memory of {len(memory.embedding_memory)}")
    is_mask = isinstance(enqueue_mask, Tensor) and enqueue_mask.dtype == torch.bool
    if not is_mask or enqueue_mask.shape != embeddings.shape[:1]:
        return Unserved("an enqueue_mask that is no vector of booleans, one a row")
    return None


def _cross_batch(
    self: Any, embeddings: Tensor, labels: Tensor, indices_tuple: Any = None, enqueue_mask: Tensor | None = None
) -> Tensor | Unserved:
    unserved = _unserved_cross_batch(self, embeddings, labels, indices_tuple, enqueue_mask)
    if unserved:
        return unserved
    device = embeddings.device
    labels = c_f.to_device(labels, device=device)
    self.embedding_memory = c_f.to_device(self.embedding_memory, device=device, dtype=embeddings.dtype)
    self.label_memory = c_f.to_device(self.label_memory, device=device, dtype=labels.dtype)
    if enqueue_mask is None:
        self.add_to_memory(embeddings, labels, len(embeddings))
        own = self.curr_batch_idx
    else:
        entering = embeddings[enqueue_mask]
        self.add_to_memory(entering, labels[enqueue_mask], len(entering))
        embeddings, labels, own = embeddings[~enqueue_mask], labels[~enqueue_mask], None
    filled = slice(None) if self.has_been_filled else slice(self.queue_idx)
    # The backward reads the labels, and the next batch may be written before it.
    x = _Contrast(embeddings, labels, self.embedding_memory[filled], self.label_memory[filled].clone(), own)
    if _no_pairs(x):
        return torch.sum(embeddings * 0)
    compute = next(fast for kind, (_, fast) in FAST.items() if isinstance(self.loss, kind))
    return compute(self.loss, x)


# ---------------------------------------------------------------------------------------------------------- the package


class NTXentLoss(losses.NTXentLoss):
    """``pytorch_metric_learning.losses.NTXentLoss``."""

    forward = served(
        losses.NTXentLoss.forward, _pair_loss(losses.NTXentLoss), "pytorch_metric_learning.losses.NTXentLoss"
    )


class SupConLoss(losses.SupConLoss):
    """``pytorch_metric_learning.losses.SupConLoss``."""

    forward = served(
        losses.SupConLoss.forward, _pair_loss(losses.SupConLoss), "pytorch_metric_learning.losses.SupConLoss"
    )


class VICRegLoss(losses.VICRegLoss):
    """``pytorch_metric_learning.losses.VICRegLoss``."""

    forward = served(losses.VICRegLoss.forward, _vicreg, "pytorch_metric_learning.losses.VICRegLoss")


class CrossBatchMemory(losses.CrossBatchMemory):
    """``pytorch_metric_learning.losses.CrossBatchMemory`` around :class:`NTXentLoss` or :class:`SupConLoss`."""

    forward = served(losses.CrossBatchMemory.forward, _cross_batch, "pytorch_metric_learning.losses.CrossBatchMemory")


WRAPPERS = ("DistributedLossWrapper", "MultipleLosses", "SelfSupervisedLoss")
OTHER_FORMULAS = "margins, proxies or sorted lists: sslfast has no kernel for them"


def contents() -> Package:
    classes = (NTXentLoss, SupConLoss, VICRegLoss, CrossBatchMemory)
    known = {*WRAPPERS, *(cls.__name__ for cls in classes)}
    others = {
        name
        for name, value in vars(losses).items()
        if isinstance(value, type) and issubclass(value, losses.BaseMetricLossFunction) and name not in known
    }
    others -= {"BaseMetricLossFunction", "GenericPairLoss"}  # what the losses derive from
    return Package(
        classes=classes,
        through=dict.fromkeys(WRAPPERS, "the loss inside"),
        unchanged={
            **dict.fromkeys(sorted(others), OTHER_FORMULAS),
            "miners, distances, reducers, regularizers": "they need the full pair matrix",
        },
    )
