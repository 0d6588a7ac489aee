"""Supervised contrastive loss: the log-sum-exp of each row minus its mean positive, which comes from class sums."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._checks import FLOATS, accumulator, is_real, without_autocast
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...distributed.scope import Scope, Shard
from ...ops.l2_normalize import l2_normalize
from ...ops.types import Pairs, SimilarityTerms, Want
from .._inputs import expect_unit_rows
from ._inputs import ContrastiveLoss, inverse
from ._labels import class_ids
from .diagnostics import Diagnosed, Diagnostics, diagnostics_of, with_diagnostics

CONTRAST_MODES = ("all", "one")
REDUCTIONS = ("mean", "mean_nonzero")
# Below this an anchor has no positive (a float mask may hold rounding).
LEAST_COUNT = 1e-6


def _check_features(features: Tensor) -> None:
    if not isinstance(features, Tensor):
        raise TypeError(f"features must be a torch.Tensor, got {type(features).__name__}")
    if features.dim() < 3:
        raise ValueError(
            "features must be [samples, views, features ...] (one view: features[:, None]), "
            f"got shape {tuple(features.shape)}"
        )
    if features.dtype not in FLOATS:
        raise TypeError(f"features must be float32, float64, bfloat16 or float16, got {features.dtype}")
    if features.numel() == 0:
        raise ValueError(
            f"features must have at least one sample, one view and one feature, got shape {tuple(features.shape)}"
        )


def _check_mask(mask: Tensor, samples: int, device: torch.device) -> None:
    """All but how many columns it has: that is for all ranks to agree on."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dim() != 2 or len(mask) != samples:
        raise ValueError(f"mask must have shape ({samples}, samples of all ranks), got {tuple(mask.shape)}")
    if mask.is_complex():
        raise TypeError(f"mask must be bool, integer or floating point, got {mask.dtype}")
    if mask.device != device:
        raise ValueError(f"mask must be on the features' device {device}, got {mask.device}")


def _sum_by_class(index: Tensor, rows: Tensor, classes: int) -> Tensor:
    """``out[c] = Σ rows[i]`` over ``index[i] == c`` [classes, D], in a fixed order on either device."""
    out = rows.new_zeros(classes, rows.shape[1])
    if rows.device.type == "cuda":
        return out.index_put((index,), rows, accumulate=True)  # sorts; index_add would use atomics
    return out.index_add(0, index, rows)


def _positive_sums(
    scope: Scope, shard: Shard, z: Tensor, labels: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Over the positives of each local sample, its own views among them: their sum, count, and its own weight.

    ``z`` [B, V, D] in the accumulator's dtype; returns [B, D], [B], [B].
    """
    batch, views = z.shape[:2]
    per_sample = z.sum(1)
    own = z.new_ones(batch)
    if labels is not None:
        # A class is numbered by the first place of its label in the sorted batch: static shapes, no host sync.
        everyone = scope.gather(labels).sort().values
        first = torch.searchsorted(everyone, labels)
        members = torch.searchsorted(everyone, labels, right=True) - first
        sums = scope.total(_sum_by_class(first, per_sample, shard.total))
        return sums.index_select(0, first), views * members.to(z.dtype), own
    if mask is not None:
        weights = mask.to(z.dtype)
        here = weights[:, shard.offset : shard.offset + shard.local]
        with without_autocast(z):
            return weights @ scope.gather(per_sample), views * weights.sum(1), here.diagonal()
    return per_sample, views * own, own


def sup_con(
    features: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    contrast_mode: str = "all",
    base_temperature: float = 0.07,
    normalize: bool = False,
    reduction: str = "mean",
    gather_distributed: bool = False,
    strategy: str = "gather",
) -> Tensor:
    """Supervised contrastive loss, the form L_out: log-probability first, then the mean over the positives.

        ℓ_i = log Σ_{a≠i} exp(z_i·z_a/τ) − (1/|P(i)|) Σ_{p∈P(i)} z_i·z_p/τ,   loss = (τ/τ_base) · mean_i ℓ_i

    ``P(i)``: the other rows of i's class. Extra memory grows as N·D; the positives cost class sums, not an N × N mask.
    The value is that of the authors' code by default. That of pytorch-metric-learning 2.9.0 is ``features[:, None]``,
    ``temperature=0.1, base_temperature=0.1, normalize=True, reduction="mean_nonzero"`` (but a batch with a single class
    is 0 there, here the formula).

    Args:
        features: [B, V, D], V views of each of B samples (further dimensions are flattened into D); float32, float64,
            bfloat16 or float16. Used as they are, so normalised already, unless ``normalize``.
        labels: [B] classes, as integers, floats or truth values. ``None`` (without mask): each sample is its own class,
            which is SimCLR's loss.
        mask: [B, B] in place of labels; sample j is a positive of sample i, to that weight, where ``mask[i, j]`` is not
            zero. Need not be symmetric. Over several ranks [B, sum of all B]. It is B² numbers itself, but nothing of
            the size (B·V)² is made from it.
        temperature: τ, finite and not zero; a float, or a one-element tensor, which receives its gradient.
        contrast_mode: ``"all"``: every view is an anchor; ``"one"``: the first view of each sample.
        base_temperature: τ_base.
        normalize: divide each row by its norm first (16-bit rows are rounded again).
        reduction: ``"mean"``: over all anchors, one without a positive counting as 0. ``"mean_nonzero"``: over the
            anchors with ℓ_i > 0; 0 where there is none.
        gather_distributed: contrast with the samples of all ranks; ``False``: this rank's alone. V and D must agree.
        strategy: how, ``"gather"`` or ``"ring"``.

    Returns:
        [] float32 (float64 for float64 inputs). Over several ranks the mean of their values
        is the loss of the global batch.

    Raises:
        TypeError: features, labels or mask have a wrong dtype.
        ValueError: shapes or devices do not fit; both labels and mask; an option is not among those named.

    Source: Khosla et al. 2020, "Supervised Contrastive Learning", equation 2.

    Example:
        >>> features = torch.eye(4).view(4, 1, 4)  # one view of each of four samples
        >>> loss = sslfast.sup_con(features, torch.tensor([0, 0, 1, 1]), temperature=0.5)
        >>> round(loss.item(), 4)
        7.8472
    """
    options = Options(temperature, contrast_mode, base_temperature, normalize, reduction)
    return _sup_con(features, labels, mask, options, scope_of(gather_distributed, strategy))[0]


class Options(NamedTuple):
    """As :func:`sup_con` takes them."""

    temperature: float | Tensor
    contrast_mode: str
    base_temperature: float
    normalize: bool
    reduction: str

    def check(self) -> None:
        base = self.base_temperature
        if not is_real(base) or base == 0:
            raise ValueError(f"base_temperature must be a number and not zero, got {base!r}")
        if self.contrast_mode not in CONTRAST_MODES:
            raise ValueError(f"contrast_mode must be 'all' or 'one', got {self.contrast_mode!r}")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be 'mean' or 'mean_nonzero', got {self.reduction!r}")


@over_ranks("options.temperature")
def _sup_con(
    features: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    options: Options,
    scope: Scope,
    diagnostics: bool = False,
) -> Diagnosed:
    options.check()
    _check_features(features)
    if labels is not None and mask is not None:
        raise ValueError("give labels or mask, not both")
    if diagnostics and mask is not None:
        raise ValueError("diagnostics=True needs labels (or neither labels nor mask): a mask defines no negatives")
    batch, views = features.shape[:2]
    device, kind = features.device, accumulator(features)
    if labels is not None:
        labels = class_ids("labels", labels, batch, device)
    z = features.reshape(batch * views, -1)  # [B·V, D], the views of a sample together
    if options.normalize:
        z = l2_normalize(z)
    else:
        expect_unit_rows("sup_con", "normalize=True", features=z)
    scale = inverse(options.temperature, z)
    if mask is None:
        shard = scope.shard(features.flatten(1))
    else:
        _check_mask(mask, batch, device)
        shard = scope.shard(features.flatten(1), {"how many columns mask has": mask.shape[1]})
        if mask.shape[1] != shard.total:
            raise ValueError(f"mask must have shape ({batch}, {shard.total}), got {tuple(mask.shape)}")

    # Row i·V + v holds view v of sample i.
    every = 1 if options.contrast_mode == "all" else views
    ids = torch.arange(shard.offset * views, (shard.offset + batch) * views, device=device)
    pairs = Pairs(z, None, scale, row_ids=ids)
    if every > 1:
        pairs = pairs._replace(q=z[::every], k=z, row_ids=ids[::every], col_ids=ids)
    terms = scope.terms(pairs, Want(hardest=diagnostics))

    wide = z.to(kind).view(batch, views, -1)
    sums, count, own = _positive_sums(scope, shard, wide, labels, mask)
    a = wide[:, ::every]  # [B, V or 1, D]
    dots = (a * (sums[:, None] - own[:, None, None] * a)).sum(2)  # Σ over the positives of z_i·z_p
    count = (count - own)[:, None].expand_as(dots)
    rows = count >= LEAST_COUNT
    positive = pairs.scale * dots / torch.where(rows, count, 1.0)
    row_loss = torch.where(rows, terms.row_lse.view_as(positive) - positive, 0.0)
    loss = _reduced(row_loss, options.reduction, scope, shard) / (pairs.scale * options.base_temperature)
    if not diagnostics:
        return loss, None
    classes = (shard.ids(device) if labels is None else labels).repeat_interleave(views)
    terms = terms._replace(positive=positive.flatten())
    return loss, _diagnostics(scope, shard, terms, pairs, classes, rows.flatten())


def _reduced(row_loss: Tensor, reduction: str, scope: Scope, shard: Shard) -> Tensor:
    """This rank's part of the mean over the anchors of all ranks; ``row_loss`` [B, anchors of a sample]."""
    if reduction == "mean":
        return shard.weight / row_loss.shape[1] * row_loss.sum()
    nonzero = ~(row_loss <= 0)  # a NaN counts, and comes out
    count = scope.total(nonzero.sum().to(row_loss.dtype))
    return shard.world_size * torch.where(nonzero, row_loss, 0.0).sum() / count.clamp(min=1)


@torch.no_grad()
def _diagnostics(
    scope: Scope, shard: Shard, terms: SimilarityTerms, pairs: Pairs, classes: Tensor, rows: Tensor
) -> Diagnostics:
    """From ``terms`` whose ``hardest`` is each anchor's nearest neighbour, and a pass over the other classes alone."""
    columns, anchors = len(pairs.columns), len(pairs.q)
    if pairs.k is None:
        others = pairs._replace(row_ids=classes)
    else:
        others = pairs._replace(row_ids=classes[:: columns // anchors], col_ids=classes)
    negatives = scope.terms(others, Want(hardest=True)).hardest
    count = anchors * (shard.total * (columns // shard.local) - 1)
    # A nearest neighbour beyond every other class is of the anchor's own.
    return diagnostics_of(terms._replace(hardest=negatives), pairs.scale, count, rows=rows, best_positive=terms.hardest)


class SupConLoss(ContrastiveLoss):
    """The module form of :func:`sup_con`, with the constructor of the authors' class.

    Args:
        temperature: τ, finite and not zero (default 0.07). A float, or a one-element tensor or ``nn.Parameter`` that
            learns (moves with the module; part of the ``state_dict`` if a parameter).
        contrast_mode: ``"all"`` (default) or ``"one"``: which views are anchors.
        base_temperature: τ_base (default 0.07); the loss is multiplied by τ/τ_base.
        normalize, reduction, gather_distributed, strategy: as in :func:`sup_con`.
        diagnostics: return ``(loss, Diagnostics)``.

    Shapes:
        ``features``: [B, V, D]; ``labels``: [B] integers; ``mask``: [B, B]; output: [].

    Raises:
        As :func:`sup_con`; wrong options already in the constructor.

    Example:
        >>> criterion = sslfast.SupConLoss(temperature=0.5)
        >>> round(criterion(torch.eye(4).view(4, 1, 4), torch.tensor([0, 0, 1, 1])).item(), 4)
        7.8472
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        contrast_mode: str = "all",
        base_temperature: float = 0.07,
        *,
        normalize: bool = False,
        reduction: str = "mean",
        gather_distributed: bool = False,
        strategy: str = "gather",
        diagnostics: bool = False,
    ) -> None:
        super().__init__(temperature, gather_distributed, strategy, diagnostics)
        Options(temperature, contrast_mode, base_temperature, normalize, reduction).check()
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature
        self.normalize = normalize
        self.reduction = reduction

    def forward(
        self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Diagnostics]:
        """The loss of B samples in V views; without labels and mask every sample is its own class."""
        options = Options(self.temperature, self.contrast_mode, self.base_temperature, self.normalize, self.reduction)
        return with_diagnostics(_sup_con(features, labels, mask, options, self.scope(), self.diagnostics))

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, contrast_mode={self.contrast_mode!r}, base_temperature={self.base_temperature}, "
            f"normalize={self.normalize}, reduction={self.reduction!r}"
        )
