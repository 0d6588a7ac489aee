"""DeepCluster-v2: features predict the cluster that k-means gave their sample in the epoch before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._checks import FLOATS, accumulator, ids_checked, whole_number, without_autocast
from ...clustering.k_means import k_means
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...nn.swav_prototypes import SwAVPrototypes
from ...ops.similarity_lse import similarity_terms
from ...ops.sinkhorn import check_number
from .._inputs import check_gather, in_one_dtype

NO_LABEL = -100

Heads = Tensor | Sequence[Tensor]


def deep_cluster_v2(
    outputs: Heads, assignments: Tensor, temperature: float = 0.1, *, prototypes: Heads | SwAVPrototypes | None = None
) -> Tensor:
    """Cross-entropy of features against hard labels, mean over the rows of all crops that have one, and over heads.

        loss = (1/H) Σ_h mean_{v,n} [ log Σ_k exp(z_vn·c_hk/τ) − z_vn·c_hy/τ ],   y = assignments[h, n]

    From features the logits are never stored (:func:`sslfast.similarity_terms`).

    Args:
        outputs: logits [H, ..., N, K] of H heads, or a sequence of H such [..., N, K_h]; or, with ``prototypes``,
            features [..., N, D], as a rule of norm 1. What stands before N are crops of the same samples. float32,
            float64, bfloat16 or float16.
        assignments: [H, N] (of one head also [N]) integers, the label of each sample in each head, below K; a negative
            one (−100, −1) is none.
        temperature: τ, not zero (default 0.1).
        prototypes: [K, D] of one head, a sequence of H such, or :class:`sslfast.SwAVPrototypes` without bias.

    Returns:
        [] float32 (float64 for float64), a mean over this rank's rows; differentiable in ``outputs`` and
        ``prototypes``, from features twice through the reference. A head without any label is NaN with zero gradient,
        as by ``F.cross_entropy``.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or values do not fit. Labels are only read on the CPU.

    Source: Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", appendix;
    value as main_deepclusterv2.py of facebookresearch/swav, and solo-learn 1.0's ``deepclusterv2_loss_func``.

    Example:
        >>> z = torch.eye(3).repeat(2, 1, 1)  # two crops of three samples
        >>> round(sslfast.deep_cluster_v2(z, torch.tensor([0, 1, -100]), 1.0, prototypes=torch.eye(3)).item(), 4)
        0.5514
    """
    heads = _parts("prototypes" if prototypes is not None else "outputs", outputs if prototypes is None else prototypes)
    features = outputs if prototypes is not None else None
    labels = _checked_labels(assignments, len(heads), features if isinstance(features, Tensor) else heads[0])
    check_number("temperature", temperature, heads[0])
    if prototypes is None:
        losses = [_of_logits(x, y, temperature) for x, y in zip(heads, labels, strict=True)]
    else:
        losses = [_of_features(features, w, y, temperature) for w, y in zip(heads, labels, strict=True)]
    return torch.stack(losses).mean()


def _of_features(z: object, w: Tensor, labels: Tensor, temperature: float) -> Tensor:
    if not isinstance(z, Tensor):
        raise TypeError(f"outputs must be a tensor of features where prototypes are given, got {type(z).__name__}")
    rows, weights = in_one_dtype(z.reshape(-1, z.shape[-1]), w)
    assert rows is not None and weights is not None
    y = _checked_rows("features", labels, len(rows), len(w))
    terms = similarity_terms(rows, weights, 1 / temperature, positives=y.clamp_min(-1))
    assert terms.positive is not None
    held = y >= 0
    count = held.sum()
    loss = (terms.row_lse - terms.positive).masked_fill(~held, 0.0).sum() / count.clamp_min(1)
    return torch.where(count > 0, loss, float("nan"))


def _of_logits(x: Tensor, labels: Tensor, temperature: float) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    y = _checked_rows("logits", labels, len(rows), x.shape[-1])
    with without_autocast(x):
        return F.cross_entropy(rows.to(accumulator(x)) / temperature, y.clamp_min(-1), ignore_index=-1)


def _parts(name: str, heads: Heads | SwAVPrototypes) -> list[Tensor]:
    """One tensor for each head: logits [..., N, K], or prototypes [K, D]."""
    if isinstance(heads, SwAVPrototypes):
        if any(head.bias is not None for head in heads.heads):
            raise ValueError("prototypes must be a head without bias: pass its logits, or SwAVPrototypes(bias=False)")
        heads = heads.prototypes
    if isinstance(heads, Tensor):
        parts = [heads] if name == "prototypes" else list(heads.unbind(0)) if heads.dim() > 2 else []
    elif isinstance(heads, Sequence) and all(isinstance(x, Tensor) for x in heads):
        parts = list(heads)
    else:
        raise TypeError(f"{name} must be a tensor or a sequence of tensors, got {type(heads).__name__}")
    if not parts:
        raise ValueError(f"{name} must be logits [heads, ..., N, K] of at least one head")
    for x in parts:
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
        if x.dim() < 2 or (name == "prototypes" and x.dim() > 2) or 0 in x.shape:
            shape = "[K, D]" if name == "prototypes" else "[..., N, K]"
            raise ValueError(f"{name} of a head must be {shape} and not empty, got shape {tuple(x.shape)}")
    return parts


def _checked_labels(assignments: Tensor, heads: int, like: Tensor) -> Tensor:
    """[H, N] int64."""
    if not isinstance(assignments, Tensor):
        raise TypeError(f"assignments must be a torch.Tensor, got {type(assignments).__name__}")
    if assignments.dtype.is_floating_point or assignments.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise TypeError(f"assignments must hold integers, got {assignments.dtype}")
    labels = assignments[None] if assignments.dim() == 1 else assignments
    if labels.dim() != 2 or len(labels) != heads or labels.shape[1] == 0:
        raise ValueError(f"assignments must be [{heads}, N], one row for each head, got {tuple(assignments.shape)}")
    if labels.device != like.device:
        raise ValueError(f"assignments must be on the outputs' device {like.device}, got {labels.device}")
    return labels.long()


def _checked_rows(what: str, labels: Tensor, rows: int, classes: int) -> Tensor:
    """The label of each row of all crops."""
    if rows % len(labels) != 0:
        raise ValueError(f"assignments must be one for each sample: {rows} rows of {what}, {len(labels)} assignments")
    if ids_checked(labels) and int(labels.max()) >= classes:
        raise ValueError(f"assignments must be below the {classes} prototypes, got {int(labels.max())}")
    return labels.repeat(rows // len(labels))


class DeepClusterV2Loss(nn.Module):
    """:func:`deep_cluster_v2` with what it needs from one epoch to the next, in buffers.

    ``embeddings`` [bank_views, bank_size, dim] and ``indices`` [bank_size] hold the features of this rank's samples and
    the samples' numbers; ``pointer`` [], how many were written since the last clustering; ``assignments`` [H, samples]
    the labels of all samples, −100 before the first :meth:`cluster`.

    Args:
        samples: how many the data set has.
        dim: D, width of the features (default 128).
        num_prototypes: K of each head (default 3000, three times).
        temperature: τ (default 0.1).
        iterations: of :func:`sslfast.k_means` (default 10).
        bank_size: samples that this rank sees in an epoch (default: ``samples``).
        bank_views: crops of a sample that are kept (default 2); head h is clustered from number ``h % bank_views``.
        gather_distributed: cluster the banks of all ranks together; every rank gets the same labels and centroids.

    Shapes:
        see :meth:`forward`; result: [].

    Raises:
        ValueError: a size is not a whole number of at least 1; ``gather_distributed`` without torch.distributed.

    Source: as :func:`deep_cluster_v2`.

    Example:
        >>> criterion = sslfast.DeepClusterV2Loss(samples=8, dim=4, num_prototypes=[2, 3])
        >>> head = sslfast.SwAVPrototypes(4, [2, 3])
        >>> z, index = torch.nn.functional.normalize(torch.randn(2, 8, 4), dim=2), torch.arange(8)
        >>> criterion.update(z, index)  # in each step
        >>> criterion.cluster(head)  # before each epoch
        >>> loss = criterion(z, index, prototypes=head)
        >>> bool((criterion.assignments >= 0).all())
        True
    """

    embeddings: Tensor
    indices: Tensor
    pointer: Tensor
    assignments: Tensor

    def __init__(
        self,
        samples: int,
        dim: int = 128,
        num_prototypes: Sequence[int] = (3000, 3000, 3000),
        temperature: float = 0.1,
        iterations: int = 10,
        *,
        bank_size: int | None = None,
        bank_views: int = 2,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.num_prototypes = tuple(whole_number("num_prototypes", k, 1) for k in num_prototypes)
        if not self.num_prototypes:
            raise ValueError("num_prototypes must name at least one head, got none")
        samples, dim = whole_number("samples", samples, 1), whole_number("dim", dim, 1)
        rows = samples if bank_size is None else whole_number("bank_size", bank_size, 1)
        check_gather(gather_distributed)
        self.temperature = temperature
        self.iterations = whole_number("iterations", iterations, 0)
        self.gather_distributed = gather_distributed
        self.register_buffer("embeddings", torch.zeros(whole_number("bank_views", bank_views, 1), rows, dim))
        self.register_buffer("indices", torch.full((rows,), -1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("assignments", torch.full((len(self.num_prototypes), samples), NO_LABEL))

    def forward(self, outputs: Heads, index: Tensor, prototypes: Heads | SwAVPrototypes | None = None) -> Tensor:
        """The loss of the samples ``index`` [N], of their logits or features as :func:`deep_cluster_v2` takes them."""
        labels = self.assignments[:, _checked_index(index, self.assignments)]
        return deep_cluster_v2(outputs, labels, self.temperature, prototypes=prototypes)

    @torch.no_grad()
    def update(self, features: Tensor, index: Tensor) -> None:
        """Write the features [bank_views, N, D] of the samples ``index`` [N] into the bank, over the oldest if full.

        Raises:
            TypeError, ValueError: they do not fit the bank.
        """
        views, size, dim = self.embeddings.shape
        count = len(_checked_index(index, self.assignments))
        if not isinstance(features, Tensor) or features.shape != (views, count, dim):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"features must have shape {(views, count, dim)}, got {got}")
        first = max(count - size, 0)
        places = (self.pointer + torch.arange(first, count, device=index.device)) % size
        self.embeddings.index_copy_(1, places, features[:, first:].detach().to(self.embeddings.dtype))
        self.indices.index_copy_(0, places, index[first:].long())
        self.pointer += count

    @over_ranks()
    @torch.no_grad()
    def cluster(self, prototypes: Heads | SwAVPrototypes, *, generator: torch.Generator | None = None) -> None:
        """Cluster the bank by spherical k-means for each head, copy the centroids into its prototypes, label samples.

        A sample that is not in the bank has no label. The bank then starts anew. The host reads how full it is: call
        this once an epoch.

        Args:
            prototypes: [K, D] of each head, which are overwritten.
            generator: as :func:`sslfast.k_means` takes it.

        Raises:
            TypeError, ValueError: prototypes do not fit ``num_prototypes`` and ``dim``; the bank is empty, or has fewer
                rows than a head prototypes.
        """
        targets = _parts("prototypes", prototypes)
        wanted = [(k, self.embeddings.shape[2]) for k in self.num_prototypes]
        if [tuple(w.shape) for w in targets] != wanted:
            raise ValueError(f"prototypes must have shapes {wanted}, got {[tuple(w.shape) for w in targets]}")
        filled = min(int(self.pointer), len(self.indices))
        if filled == 0:
            raise ValueError("the bank must hold samples to be clustered, got none: call update in each step")
        scope = scope_of(self.gather_distributed)
        samples = scope.gather(self.indices[:filled])
        for head, target in enumerate(targets):
            bank = self.embeddings[head % len(self.embeddings), :filled]
            gathered = self.gather_distributed
            found = k_means(
                bank, len(target), self.iterations, metric="cosine", generator=generator, gather_distributed=gathered
            )
            target.detach().copy_(found.centroids)
            # Of a sample that is there twice (a sampler fills up) the larger label, whatever the order.
            labels = scope.gather(found.assignments)
            self.assignments[head].fill_(NO_LABEL).scatter_reduce_(0, samples, labels, "amax")
        self.pointer.zero_()

    def extra_repr(self) -> str:
        views, size, dim = self.embeddings.shape
        return (
            f"samples={self.assignments.shape[1]}, dim={dim}, num_prototypes={self.num_prototypes}, "
            f"temperature={self.temperature}, iterations={self.iterations}, bank_size={size}, bank_views={views}"
        )


def _checked_index(index: Tensor, assignments: Tensor) -> Tensor:
    samples = assignments.shape[1]
    if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
        raise TypeError("index must be a tensor [N] of the samples' numbers, int64 or int32")
    if index.device != assignments.device:
        raise ValueError(f"index must be on the loss's device {assignments.device}, got {index.device}")
    if ids_checked(index) and len(index) and not 0 <= int(index.min()) <= int(index.max()) < samples:
        raise ValueError(f"index must be from 0 to {samples - 1}, got {int(index.min())} to {int(index.max())}")
    return index
