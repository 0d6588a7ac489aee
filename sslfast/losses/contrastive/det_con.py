"""DetCon: mask-pooled regions of two views, each against all others; positives are the other view's of its mask."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..._checks import FLOATS, accumulator, check_same, without_autocast
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...distributed.scope import Scope
from ...ops.l2_normalize import l2_normalize
from ...ops.types import Pairs
from .._inputs import in_one_dtype
from ._inputs import ContrastiveLoss, inverse


def det_con_s(
    view0: Tensor,
    view1: Tensor,
    mask_view0: Tensor,
    mask_view1: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    normalize: bool = True,
    gather_distributed: bool = False,
    strategy: str = "gather",
) -> Tensor:
    """DetCon-S: contrast of regions, sum of the two views' means over their B·m regions.

        ℓ_r = (1/a_r)·( log Σ_{c∈C(r)} exp(s_rc) − (1/|P(r)|) Σ_{p∈P(r)} s_rp ),        s_rc = z_r·z_c / τ

    ``P(r)``: the regions of r's image and mask in the other view; ``C(r)``: all regions of both views and all images
    but those of r's image and mask in its own view, itself among them; ``a_r``: how many these are. A region without
    a positive counts as 0. The (2B·m)² similarities are never stored, and half of them is computed; pairs within an
    image are, B·m² truth values.

    Args:
        view0, view1: [B, m, D], features of m regions of each image, pooled under its masks; float32, float64, bfloat16
            or float16.
        mask_view0, mask_view1: [B, m] integers, the mask of each region; a mask may have several regions of an image
            (sampled with replacement), and none in a view. Any numbers: they are compared within an image alone.
        temperature: τ, finite and not zero (default 0.1); or a one-element tensor, which receives its gradient.
        normalize: divide each region's features by their norm first (default).
        gather_distributed: contrast with the regions of all ranks; ``False``: this rank's. m and D must agree.
        strategy: how, ``"gather"`` or ``"ring"``.

    Returns:
        [] float32 (float64 for float64 inputs). Over several ranks the mean of their values
        is the loss of the global batch.

    Raises:
        TypeError: features are not floating point or their dtypes differ, masks are not integers.
        ValueError: shapes or devices do not fit, or the temperature is zero or not finite.

    Source: Hénaff et al. 2021, "Efficient Visual Pretraining with Contrastive Detection", section 3.1; value as lightly
    1.6.0's ``DetConSLoss``.

    Example:
        >>> z, masks = torch.eye(4).view(2, 2, 4), torch.tensor([[0, 1], [0, 1]])  # two images, two regions each
        >>> loss = sslfast.det_con_s(z, z, masks, masks, temperature=0.5)
        >>> round(loss.item(), 4)
        1.1889
    """
    return _det_con(
        {"view0": view0, "view1": view1},
        {},
        {"mask_view0": mask_view0, "mask_view1": mask_view1},
        temperature,
        normalize,
        scope_of(gather_distributed, strategy),
    )


def det_con_b(
    pred_view0: Tensor,
    pred_view1: Tensor,
    target_view0: Tensor,
    target_view1: Tensor,
    mask_view0: Tensor,
    mask_view1: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    normalize: bool = True,
    gather_distributed: bool = False,
    strategy: str = "gather",
) -> Tensor:
    """DetCon-B: :func:`det_con_s` with predictions as rows and a target network's projections as columns.

        ℓ_r = (1/a_r)·( log Σ_{c∈C(r)} exp(s_rc) − (1/|P(r)|) Σ_{p∈P(r)} s_rp ),        s_rc = q_r·t_c / τ

    With targets that want no gradient, as a momentum encoder's, the gradient comes along in the forward.

    Args:
        pred_view0, pred_view1, target_view0, target_view1: [B, m, D]; the targets receive a gradient if they want one.
        The others, the result and the errors are those of :func:`det_con_s`.

    Source: Hénaff et al. 2021, "Efficient Visual Pretraining with Contrastive Detection", section 3.1; value as the
    authors' ``byol_nce_detcon`` (google-deepmind/detcon) and lightly 1.6.0's ``DetConBLoss``.

    Example:
        >>> z, masks = torch.eye(4).view(2, 2, 4), torch.tensor([[0, 1], [0, 1]])
        >>> loss = sslfast.det_con_b(z, z, -z, -z, masks, masks, temperature=0.5)
        >>> round(loss.item(), 4)
        7.6281
    """
    return _det_con(
        {"pred_view0": pred_view0, "pred_view1": pred_view1},
        {"target_view0": target_view0, "target_view1": target_view1},
        {"mask_view0": mask_view0, "mask_view1": mask_view1},
        temperature,
        normalize,
        scope_of(gather_distributed, strategy),
    )


Named = Mapping[str, Tensor]


@over_ranks("temperature")
def _det_con(
    views: Named, targets: Named, masks: Named, temperature: float | Tensor, normalize: bool, scope: Scope
) -> Tensor:
    """Both views' regions are the rows, those of the targets (by default the rows themselves) the columns.

    ``views`` and ``masks``: of the first and the second view, as are ``targets`` where there are any.
    """
    regions = _checked({**views, **targets})
    mask = _checked_masks(masks, regions[0])  # [B, 2, m]
    b, _, m = mask.shape
    scale = inverse(temperature, regions[0])
    shard = scope.shard(regions[0], {"how many regions an image has": m})
    rows, columns = _flat(regions[:2], normalize), _flat(regions[2:], normalize) if targets else None

    # A mask of a view of an image is numbered by its first region, which is unique over all ranks.
    place = torch.arange(m, device=mask.device)
    beside = mask.unsqueeze(3) == mask.unsqueeze(2)  # [B, 2, m, m]: regions of the same view and mask
    view = 2 * shard.ids(mask.device)[:, None] + torch.arange(2, device=mask.device)  # [B, 2]
    ids = (m * view.unsqueeze(2) + torch.where(beside, place, m).amin(3)).flatten()
    row_lse = scope.terms(Pairs(rows, columns, scale, None, ids, None if columns is None else ids)).row_lse

    across = mask.unsqueeze(3) == mask.flip(1).unsqueeze(2)  # [B, 2, m, m]: positives, of the other view
    count = across.sum(3)
    with without_autocast(rows):
        kind = accumulator(rows)
        wide, other = (x.to(kind).view(b, 2, m, -1) for x in (rows, rows if columns is None else columns))
        mean = across.to(kind) @ other.flip(1) / count.clamp(min=1).unsqueeze(3)  # [B, 2, m, D]
        positive = scale * (wide * mean).sum(3)
    each = torch.where(count > 0, row_lse.view(b, 2, m) - positive, 0.0) / beside.sum(3)
    return shard.weight / m * each.sum()


def _flat(views: tuple[Tensor, ...], normalize: bool) -> Tensor:
    """[B·2·m, D]: image by image the regions of its two views."""
    rows = torch.stack(views, 1).flatten(0, 2)
    return l2_normalize(rows) if normalize else rows


def _checked(views: Named) -> tuple[Tensor, ...]:
    """Tensors [B, m, D] of one shape, device and dtype."""
    for name, x in views.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
        if x.dim() != 3 or x.numel() == 0:
            raise ValueError(
                f"{name} must be [images, regions, features], at least one of each, got shape {tuple(x.shape)}"
            )
    found = tuple(x for x in in_one_dtype(*views.values()) if x is not None)
    first, *names = views
    for name, x in zip(names, found[1:], strict=True):
        check_same(first, found[0], name, x)
    return found


def _checked_masks(masks: Named, regions: Tensor) -> Tensor:
    """Those of both views, [B, 2, m] int64."""
    for name, mask in masks.items():
        if not isinstance(mask, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(mask).__name__}")
        if mask.is_floating_point() or mask.is_complex() or mask.dtype == torch.bool:
            raise TypeError(f"{name} must hold integers, got {mask.dtype}")
        if mask.shape != regions.shape[:2]:
            raise ValueError(f"{name} must have shape {tuple(regions.shape[:2])}, got {tuple(mask.shape)}")
        if mask.device != regions.device:
            raise ValueError(f"{name} must be on the features' device {regions.device}, got {mask.device}")
    return torch.stack([mask.long() for mask in masks.values()], 1)


class _DetConLoss(ContrastiveLoss):
    """The constructor of lightly 1.6.0's classes."""

    def __init__(
        self, temperature: float | Tensor = 0.1, gather_distributed: bool = True, *, strategy: str = "gather"
    ) -> None:
        super().__init__(temperature, gather_distributed, strategy, diagnostics=False)

    def scope(self) -> Scope:
        """Over all ranks where there are any: that is the default, which one process need not switch off."""
        distributed = torch.distributed
        there = distributed.is_available() and distributed.is_initialized()
        return scope_of(self.gather_distributed and there, self.strategy)


class DetConSLoss(_DetConLoss):
    """The module form of :func:`det_con_s`, with the constructor of lightly 1.6.0's class.

    Args:
        temperature: as :func:`det_con_s`; a tensor or ``nn.Parameter`` moves with the module.
        gather_distributed: contrast with the regions of all ranks (default, as lightly's); of this process's alone
            where no process group is initialised, or with ``False``.
        strategy: how, ``"gather"`` (default) or ``"ring"``.

    Shapes:
        ``view0``, ``view1``: [B, m, D], normalised here; ``mask_view0``, ``mask_view1``: [B, m]; output: [].

    Raises:
        As :func:`det_con_s`.

    Example:
        >>> criterion = sslfast.DetConSLoss(temperature=0.5)
        >>> z, masks = torch.eye(4).view(2, 2, 4), torch.tensor([[0, 1], [0, 1]])
        >>> round(criterion(z, z, masks, masks).item(), 4)
        1.1889
    """

    def forward(self, view0: Tensor, view1: Tensor, mask_view0: Tensor, mask_view1: Tensor) -> Tensor:
        """The loss of m regions in two views of each image."""
        views, masks = {"view0": view0, "view1": view1}, {"mask_view0": mask_view0, "mask_view1": mask_view1}
        return _det_con(views, {}, masks, self.temperature, True, self.scope())


class DetConBLoss(_DetConLoss):
    """The module form of :func:`det_con_b`, with the constructor of lightly 1.6.0's class.

    Args:
        temperature, gather_distributed, strategy: as :class:`DetConSLoss`.

    Shapes:
        ``pred_view0``, ``pred_view1``, ``target_view0``, ``target_view1``: [B, m, D], normalised here; ``mask_view0``,
        ``mask_view1``: [B, m]; output: [].

    Raises:
        As :func:`det_con_b`.

    Example:
        >>> criterion = sslfast.DetConBLoss(temperature=0.5)
        >>> z, masks = torch.eye(4).view(2, 2, 4), torch.tensor([[0, 1], [0, 1]])
        >>> round(criterion(z, z, -z, -z, masks, masks).item(), 4)
        7.6281
    """

    def forward(
        self,
        pred_view0: Tensor,
        pred_view1: Tensor,
        target_view0: Tensor,
        target_view1: Tensor,
        mask_view0: Tensor,
        mask_view1: Tensor,
    ) -> Tensor:
        """The loss of m regions in two views of each image."""
        views = {"pred_view0": pred_view0, "pred_view1": pred_view1}
        targets = {"target_view0": target_view0, "target_view1": target_view1}
        masks = {"mask_view0": mask_view0, "mask_view1": mask_view1}
        return _det_con(views, targets, masks, self.temperature, True, self.scope())
