"""VICRegL: VICReg of the views' global features, and of local features matched by content and by location."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._checks import FLOATS, accumulator, check_matrix, check_same
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...ops.types import STATISTICS
from .._inputs import check_gather, in_one_dtype
from .vicreg import check_choice, check_eps, invariance_loss, vicreg

Features = Sequence[tuple[Tensor, Tensor]]


@over_ranks()
def vicregl(
    global_view_features: Features,
    global_view_grids: Sequence[Tensor],
    local_view_features: Features | None = None,
    local_view_grids: Sequence[Tensor] | None = None,
    *,
    lambda_param: float = 25.0,
    mu_param: float = 25.0,
    nu_param: float = 1.0,
    alpha: float = 0.75,
    eps: float = 1e-4,
    num_matches: tuple[int | None, int | None] = (20, 4),
    gather_distributed: bool = False,
    invariance: str = "global",
) -> Tensor:
    """VICRegL, ``α · global loss + (1 − α) · local loss``, of views that are crops of one image.

    Pairs are those of two views of which the first is a global one; "mean" is over pairs, or over views.

    - Global: λ · mean of the pairs' invariance + μ · mean variance + ν · mean covariance of the views.
    - Local: mean of the pairs' VICReg, with ν/2, of matched local features. The features of one view are matched with
      those of the other that are nearest, and of these matches the closest are kept, closest first: once by
      the distance of the features, once by that of their places in the image. Either is the mean of both directions.

    Args:
        global_view_features: ``(global features [N, D], local features [N, H, W, C])`` of each global view; float32,
            float64, bfloat16 or float16. N ≥ 2; D and C are the same for all views, H and W may differ.
        global_view_grids: [N, H, W, 2], the places of each view's local features.
        local_view_features, local_view_grids: the same for the local views; ``None``: there are none.
        lambda_param, mu_param, nu_param: λ, μ, ν (default 25, 25, 1).
        alpha: α (default 0.75).
        eps: added to the variance, positive (default 1e-4).
        num_matches: how many matches are kept from the first view of a pair to the second, and back (default 20, 4);
            ``None``, -1, or more than there are: all.
        gather_distributed: variances and covariances of the rows of all ranks; ``False``: of this rank's.
        invariance: of the local features, as :func:`sslfast.vicreg`.

    Returns:
        [] float32 (float64 for float64 inputs). (lightly's has shape [1].) Over several ranks the mean of their values
        is the loss of the global batch.

    Raises:
        TypeError, ValueError: numbers of views and grids differ; local views without grids or the other way round;
            fewer than two views; shapes, dtypes or devices do not fit; eps is not positive; num_matches are not two
            positive integers, -1 or ``None``.

    Source: Bardes et al. 2022, "VICRegL: Self-Supervised Learning of Local Visual Features", equations 3 to 5; value
    as lightly 1.6.0's ``VICRegLLoss``, whose order of matches this is.

    Example:
        >>> features = torch.eye(8, 4), torch.ones(8, 2, 2, 3)  # of a view: [N, D] and [N, H, W, C]
        >>> grid = torch.zeros(8, 2, 2, 2)
        >>> round(sslfast.vicregl([features, features], [grid, grid]).item(), 3)
        24.494
    """
    check_eps(eps)
    _check_matches(num_matches)
    global_views = _checked("global_view", global_view_features, global_view_grids)
    if (local_view_features is None) != (local_view_grids is None):
        given, missing = ("features", "grids") if local_view_grids is None else ("grids", "features")
        raise ValueError(f"local_view_{given} and local_view_{missing} must be given together, or neither")
    views = list(global_views)
    if local_view_features is not None and local_view_grids is not None:
        views += _checked("local_view", local_view_features, local_view_grids)
    if len(views) < 2 or not global_views:
        raise ValueError(
            f"VICRegL needs a global view and another one, got {len(global_views)} global and "
            f"{len(views) - len(global_views)} local views"
        )
    wholes, locals_ = (in_one_dtype(*(view[part] for view in views)) for part in (0, 1))
    views = [
        (w, x, view[2]) for w, x, view in zip(wholes, locals_, views, strict=True) if w is not None and x is not None
    ]
    for i, view in enumerate(views[1:], start=1):
        check_same("the first view's global features", views[0][0], f"those of view {i}", view[0])
        # One row of each: numbers of places may differ.
        first, other = (v[1][:, 0] for v in (views[0], view))
        check_same("a local feature of the first view", first, f"one of view {i}", other)
    pairs = [(i, j) for i in range(len(global_views)) for j in range(i + 1, len(views))]
    # A pair of global views stands for both of its orders.
    orders = [2 if j < len(global_views) else 1 for _, j in pairs]
    scope = scope_of(gather_distributed)
    shard = scope.shard(views[0][0])
    if shard.total < 2:
        raise ValueError(f"VICRegL needs at least two rows, got {shard.total}: one row has no variance")

    features = [view[0] for view in views]
    errors = [order * invariance_loss(features[i], features[j]) for (i, j), order in zip(pairs, orders, strict=True)]
    moments = [scope.second_moment(*features[i : i + 2]) for i in range(0, len(features), 2)]
    diagonal = torch.cat([moment.diagonal for moment in moments])  # [V, D]
    off_diagonal = torch.cat([moment.off_diagonal for moment in moments])  # [V]
    variance = F.relu(1 - (diagonal / (shard.total - 1) + eps).sqrt()).mean()
    covariance = off_diagonal.mean() / ((shard.total - 1) ** 2 * features[0].shape[1])
    global_loss = (
        lambda_param * shard.weight * shard.local * torch.stack(errors).sum() / sum(orders)
        + mu_param * variance
        + nu_param * covariance
    )

    ranks: dict[str, Any] = {"gather_distributed": gather_distributed, "invariance": invariance}
    local_losses = [
        vicreg(a, b, lambda_param, mu_param, 0.5 * nu_param, eps=eps, **ranks)
        for (i, j), order in zip(pairs, orders, strict=True)
        for a, b in _matches(views[i], views[j], num_matches, both_orders=order == 2)
    ]
    local_loss = 0.5 * torch.stack(local_losses).sum() / sum(orders)
    return alpha * global_loss + (1 - alpha) * local_loss


View = tuple[Tensor, Tensor, Tensor]  # global features [N, D], local features [N, P, C], places [N, P, 2]


def _checked(kind: str, features: Features, grids: Sequence[Tensor]) -> list[View]:
    """The views, their local features and places each in one row of P = H·W."""
    if len(features) != len(grids):
        raise ValueError(
            f"{kind}_features and {kind}_grids must have the same length, got {len(features)} and {len(grids)}"
        )
    views = []
    for i, (pair, grid) in enumerate(zip(features, grids, strict=True)):
        name = f"{kind}_features[{i}]"
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(t, Tensor) for t in (*pair, grid)):
            raise TypeError(
                f"{name} must be a pair of tensors (global, local features), and {kind}_grids[{i}] a tensor"
            )
        whole, local = pair
        check_matrix(f"{name}[0]", whole)
        if local.dtype not in FLOATS:
            raise TypeError(f"{name}[1] must be float32, float64, bfloat16 or float16, got {local.dtype}")
        if local.dim() != 4 or local.numel() == 0 or len(local) != len(whole):
            raise ValueError(
                f"{name}[1] must have shape [{len(whole)}, height, width, features], got {tuple(local.shape)}"
            )
        if grid.shape != (*local.shape[:3], 2):
            raise ValueError(
                f"{kind}_grids[{i}] must have shape {(*local.shape[:3], 2)}, as {name}[1], got {tuple(grid.shape)}"
            )
        if not local.device == grid.device == whole.device:
            raise ValueError(
                f"{name} and {kind}_grids[{i}] must be on the same device, "
                f"got {whole.device}, {local.device} and {grid.device}"
            )
        views.append((whole, local.flatten(1, 2), grid.detach().flatten(1, 2)))
    return views


def _check_matches(num_matches: tuple[int | None, int | None]) -> None:
    allowed = isinstance(num_matches, Sequence) and len(num_matches) == 2
    if not allowed or not all(m is None or (isinstance(m, int) and (m >= 1 or m == -1)) for m in num_matches):
        raise ValueError(f"num_matches must be two positive integers, -1 or None, got {num_matches!r}")


def _matches(
    view_a: View, view_b: View, num_matches: tuple[int | None, int | None], *, both_orders: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Matched local features [N, matches, C], by content and by place, from a to b and back.

    In both orders of the pair, each direction is a first and a second one.
    """
    (_, z_a, grid_a), (_, z_b, grid_b) = view_a, view_b
    for x, y in ((z_a, z_b), (grid_a, grid_b)):
        with torch.no_grad():  # which features match has no gradient
            x, y = x.detach().to(accumulator(x)), y.detach().to(accumulator(y))
            # Two products, not one and its transpose: places on a grid lie equally far apart, rounding decides which of
            # them match, and both directions are to match as lightly's do.
            there, back = torch.cdist(x, y), torch.cdist(y, x)  # [N, P_a, P_b] and [N, P_b, P_a]
        for count in num_matches if both_orders else num_matches[:1]:
            yield _nearest(z_a, z_b, there, count)
        for count in num_matches if both_orders else num_matches[1:]:
            yield _nearest(z_b, z_a, back, count)


def _nearest(z: Tensor, candidates: Tensor, distances: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """The ``count`` features of ``z`` [N, P, C] whose nearest candidate is closest, closest first, and the latter.

    Args:
        candidates: [N, Q, C].
        distances: [N, P, Q].
    """
    places = z.shape[1]
    if count is None or count == -1 or count > places:
        count = places
    least, nearest = distances.topk(1, dim=2, largest=False)  # [N, P, 1]
    chosen = least.squeeze(2).topk(count, dim=1, largest=False).indices  # [N, count]
    return _taken(z, chosen), _taken(candidates, nearest.squeeze(2).gather(1, chosen))


def _taken(z: Tensor, places: Tensor) -> Tensor:
    """``z`` [N, P, C] at ``places`` [N, count]."""
    return z.gather(1, places.unsqueeze(2).expand(-1, -1, z.shape[2]))


class VICRegLLoss(nn.Module):
    """The module form of :func:`vicregl`, with the constructor and ``forward`` of lightly 1.6.0's class.

    Args:
        lambda_param, mu_param, nu_param, alpha, gather_distributed, eps, num_matches, invariance: as :func:`vicregl`.

    Shapes:
        As :func:`vicregl`; output: [].

    Raises:
        As :func:`vicregl`.

    Example:
        >>> criterion = sslfast.VICRegLLoss(alpha=0.75)
        >>> features, grid = (torch.eye(8, 4), torch.ones(8, 2, 2, 3)), torch.zeros(8, 2, 2, 2)
        >>> round(criterion([features, features], [grid, grid]).item(), 3)
        24.494
    """

    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        alpha: float = 0.75,
        gather_distributed: bool = False,
        eps: float = 1e-4,
        num_matches: tuple[int | None, int | None] = (20, 4),
        *,
        invariance: str = "global",
    ) -> None:
        super().__init__()
        check_gather(gather_distributed)
        check_eps(eps)
        _check_matches(num_matches)
        check_choice("invariance", invariance, STATISTICS)
        self.lambda_param = lambda_param
        self.mu_param = mu_param
        self.nu_param = nu_param
        self.alpha = alpha
        self.gather_distributed = gather_distributed
        self.eps = eps
        self.num_matches = num_matches
        self.invariance = invariance

    def forward(
        self,
        global_view_features: Features,
        global_view_grids: Sequence[Tensor],
        local_view_features: Features | None = None,
        local_view_grids: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The loss of the views, each ``(global features [N, D], local features [N, H, W, C])`` and a grid."""
        return vicregl(
            global_view_features,
            global_view_grids,
            local_view_features,
            local_view_grids,
            lambda_param=self.lambda_param,
            mu_param=self.mu_param,
            nu_param=self.nu_param,
            alpha=self.alpha,
            eps=self.eps,
            num_matches=self.num_matches,
            gather_distributed=self.gather_distributed,
            invariance=self.invariance,
        )

    def extra_repr(self) -> str:
        return (
            f"lambda_param={self.lambda_param}, mu_param={self.mu_param}, nu_param={self.nu_param}, "
            f"alpha={self.alpha}, gather_distributed={self.gather_distributed}, eps={self.eps}, "
            f"num_matches={self.num_matches}, invariance={self.invariance!r}"
        )
