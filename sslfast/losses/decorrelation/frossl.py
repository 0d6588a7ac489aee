"""FroSSL: the Frobenius norm of each view's second moments, and every view close to the mean of all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._checks import accumulator
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...distributed.scope import Scope
from .._inputs import check_gather
from ._views import checked_views

EPS = 1e-12  # lower bound of a column's norm, as F.normalize


@over_ranks()
def frossl(z_views: Sequence[Tensor], invariance_weight: float = 1.0, *, gather_distributed: bool = False) -> Tensor:
    """FroSSL: log-norm of each view's second moments, plus the views' distance from their mean.

        loss = Σ_v 2 log( ‖Ẑ_vᵀẐ_v‖_F / tr(Ẑ_vᵀẐ_v) ) + w (V/N) Σ_v ‖Ẑ_v − (1/V) Σ_u Ẑ_u‖²_F

    ``Ẑ`` is ``z`` with its columns divided by their norms, not centred. Neither D × D nor N × N matrices survive the
    forward where :func:`sslfast.second_moment` can do without.

    Args:
        z_views: V ≥ 2 views, each [N, D], row ``i`` of all from sample ``i``; float32, float64, bfloat16 or float16.
        invariance_weight: w (default 1).
        gather_distributed: columns, their norms and their moments over the rows of all ranks; ``False``: this rank's
            alone.

    Returns:
        [] float32 (float64 for float64 inputs). Over several ranks the mean of their values is the loss of the global
        batch.

    Raises:
        TypeError, ValueError: fewer than two views, or they are not matrices of the same shape, dtype and device.

    Source: Skean et al. 2024, "FroSSL: Frobenius Norm Minimization for Efficient Multiview Self-Supervised Learning";
    value and gradient (the trace is a constant in it) as lightly 1.6.0's ``FroSSLLoss``.

    Example:
        >>> round(sslfast.frossl([torch.eye(4), torch.eye(4)]).item(), 4)  # 2 views · 2 log(2/4)
        -2.7726
    """
    views = checked_views(z_views)
    scope = scope_of(gather_distributed)
    weight = invariance_weight * len(views) * scope.shard(views[0]).weight
    return torch.add(_log_norms(scope, views), _distance(scope, views), alpha=weight)


def _log_norms(scope: Scope, views: list[Tensor]) -> Tensor:
    """``Σ_v 2 log(‖M‖_F / tr M)`` of the second moments of each view, two of them in one pass."""
    pairs = [views[i : i + 2] for i in range(0, len(views), 2)]
    moments = [scope.second_moment(*pair, center=False, scale="norm", eps=EPS) for pair in pairs]
    off, diagonal = moments[0].off_diagonal, moments[0].diagonal  # [V] and [V, D]
    if len(moments) > 1:
        off, diagonal = (torch.cat([moment[part] for moment in moments]) for part in (0, 1))
    trace = diagonal.detach().sum(1)  # [V]: the number of columns that are not zero
    return ((off + diagonal.square().sum(1)) / trace.square()).log().sum()


def _distance(scope: Scope, views: list[Tensor]) -> Tensor:
    """``Σ_v ‖Ẑ_v − mean‖²``, this rank's rows."""
    z = torch.stack(views)  # [V, N, D]
    z = z.to(accumulator(z))
    norms = torch.linalg.vector_norm(z, dim=1)  # [V, D]
    if scope.shard(views[0]).world_size > 1:
        # A norm of norms: unlike the root of a sum of squares, its gradient at a zero column is zero.
        norms = torch.linalg.vector_norm(scope.gather(norms.unsqueeze(0)), dim=0)  # of [W, V, D]
    unit = z / norms.clamp_min(EPS).unsqueeze(1)
    return F.mse_loss(unit, unit.mean(0).expand_as(unit), reduction="sum")


class FroSSLLoss(nn.Module):
    """The module form of :func:`frossl`, with the constructor and ``forward`` of lightly 1.6.0's class.

    Args:
        invariance_weight: weight of the distance of the views from their mean (default 1).
        gather_distributed: as :func:`frossl` (default: this rank's rows alone, as lightly).

    Shapes:
        ``z_views``: a list of V ≥ 2 views [N, D]; output: [].

    Raises:
        As :func:`frossl`.

    Example:
        >>> criterion = sslfast.FroSSLLoss()
        >>> round(criterion([torch.eye(4), torch.eye(4)]).item(), 4)
        -2.7726
    """

    def __init__(self, invariance_weight: float = 1.0, *, gather_distributed: bool = False) -> None:
        super().__init__()
        check_gather(gather_distributed)
        self.invariance_weight = invariance_weight
        self.gather_distributed = gather_distributed

    def forward(self, z_views: list[Tensor]) -> Tensor:
        """The loss of V views, each [N, D]."""
        return frossl(z_views, self.invariance_weight, gather_distributed=self.gather_distributed)

    def extra_repr(self) -> str:
        return f"invariance_weight={self.invariance_weight}, gather_distributed={self.gather_distributed}"
