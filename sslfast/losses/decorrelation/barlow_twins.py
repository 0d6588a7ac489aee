"""Barlow Twins: the cross-correlation of two views drawn to the identity, without the D × D matrix."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...distributed.scope import Scope
from ...ops.moment_losses import Loss
from ...ops.types import FORMS, STATISTICS, MomentOptions
from .._inputs import check_gather, two_views
from ._moment_loss import summed
from .vicreg import check_choice, check_eps, check_two_rows


class CrossCorrelation(NamedTuple):
    """How far the cross-correlation C of two views is from the identity.

    Attributes:
        on_diagonal: [], Σ_i (C_ii − 1)².
        off_diagonal: [], Σ_{i≠j} C_ij².

    Example:
        >>> terms = sslfast.cross_correlation_loss(torch.eye(4), torch.eye(4).roll(1, 0))
        >>> round(terms.on_diagonal.item(), 3)
        7.111
    """

    on_diagonal: Tensor
    off_diagonal: Tensor


@over_ranks()
def cross_correlation_loss(
    z_a: Tensor,
    z_b: Tensor,
    *,
    eps: float = 1e-5,
    form: str = "auto",
    gather_distributed: bool = False,
    statistics: str = "global",
) -> CrossCorrelation:
    """The two terms of Barlow Twins, from ``C = (1/N) ẐaᵀẐb`` [D, D].

        on_diagonal = Σ_i (C_ii − 1)²        off_diagonal = Σ_{i≠j} C_ij²

    ``Ẑ`` is ``z`` as batch normalisation without weights gives it: columns centred, then divided by
    ``sqrt(variance + eps)`` with the biased variance.

    Args:
        z_a, z_b: [N, D], N ≥ 2, row ``i`` of each a view of sample ``i``; float32, float64, bfloat16 or float16, the
            same for both (inside an autocast region the wider one is used).
        eps: added to the variance, positive (default 1e-5).
        form: "primal", O(N·D²), "dual", O(N²·D), or "auto" (default), the cheaper: see :func:`sslfast.second_moment`.
        gather_distributed: the rows of all ranks; ``False``: this rank's alone.
        statistics: over ranks, columns are centred and scaled by the mean and variance of all rows ("global", the
            default: the loss of one process on the global batch; the paper's code, by SyncBatchNorm) or of each rank's
            own ("local": lightly, solo-learn). C is the mean over all rows either way.

    Returns:
        ``CrossCorrelation(on_diagonal [], off_diagonal [])``, both differentiable, in float32 (float64 for float64
        inputs). Over several ranks every rank returns the global value.

    Raises:
        TypeError: dtypes are not floating point, or differ.
        ValueError: not two matrices of one shape on one device with at least two rows (of all ranks together); eps is
            not positive; ``form`` or ``statistics`` is none of the above.

    Source: Zbontar et al. 2021, "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", equations 1 and 2.

    Example:
        >>> on_diagonal, off_diagonal = sslfast.cross_correlation_loss(torch.eye(4), torch.eye(4))
        >>> round(off_diagonal.item(), 4)  # 12 · (1/3)²
        1.3332
    """
    z_a, z_b, scope, rows = _checked(z_a, z_b, eps, form, gather_distributed, statistics)
    moment = scope.second_moment(z_a, z_b, cross=True, scale="variance", eps=eps, statistics=statistics, form=form)
    on_diagonal = (moment.diagonal / rows - 1).square().sum()
    return CrossCorrelation(on_diagonal, moment.off_diagonal.squeeze(0) / rows**2)


def _checked(
    z_a: Tensor, z_b: Tensor, eps: float, form: str, gather_distributed: bool, statistics: str
) -> tuple[Tensor, Tensor, Scope, int]:
    """The views, the scope, and its rows."""
    z_a, z_b = two_views("z_a", z_a, "z_b", z_b, normalize=False)
    check_eps(eps)
    check_choice("form", form, FORMS)
    check_choice("statistics", statistics, STATISTICS)
    scope = scope_of(gather_distributed)
    rows = scope.shard(z_a).total
    check_two_rows("z_a", rows)
    return z_a, z_b, scope, rows


@over_ranks()
def barlow_twins(
    z_a: Tensor,
    z_b: Tensor,
    lambda_param: float = 0.005,
    *,
    scale_loss: float = 1.0,
    eps: float = 1e-5,
    gather_distributed: bool = False,
    statistics: str = "global",
    form: str = "auto",
) -> Tensor:
    """Barlow Twins loss of two views, ``scale_loss · (Σ_i (C_ii − 1)² + λ Σ_{i≠j} C_ij²)``.

    | as | lambda_param | scale_loss | statistics (over ranks) |
    |---|---|---|---|
    | lightly | 0.005 (default) | 1 (default) | "local" |
    | the paper's code | 0.0051 | 1 | "global" (default) |
    | solo-learn | 0.005 | 0.025 | "local" |

    Over W ranks under DDP the gradient is that of the global batch, as lightly's; the other two sum C outside autograd,
    which leaves 1/W of it.

    Args:
        z_a, z_b: [N, D], N ≥ 2, row ``i`` of each a view of sample ``i``; float32, float64, bfloat16 or float16. As the
            projector gives them: they are standardised here.
        lambda_param: λ, weight of the redundancy reduction.
        scale_loss: multiplies the whole loss.
        eps, gather_distributed, statistics, form: as :func:`cross_correlation_loss`.

    Returns:
        [] float32 (float64 for float64 inputs). Over several ranks every rank returns the global value.

    Raises:
        TypeError, ValueError: as :func:`cross_correlation_loss`.

    Source: Zbontar et al. 2021, equation 1 and algorithm 1.

    Example:
        >>> round(sslfast.barlow_twins(torch.eye(4), torch.eye(4), lambda_param=0.5).item(), 4)
        0.6666
    """
    z_a, z_b, scope, rows = _checked(z_a, z_b, eps, form, gather_distributed, statistics)
    loss = Loss(off=scale_loss * lambda_param / rows**2, columns=scale_loss, penalty="identity")
    options = MomentOptions(cross=True, scale="variance", eps=eps, form=form, statistics=statistics)
    return summed(scope, z_a, z_b, loss, options, rows=rows)


class BarlowTwinsLoss(nn.Module):
    """The module form of :func:`barlow_twins`, with the constructor of lightly 1.6.0's class.

    Args:
        lambda_param: λ, weight of the redundancy reduction (default 0.005).
        gather_distributed: over the rows of all ranks (default: this rank's alone).
        scale_loss: multiplies the whole loss (default 1).
        eps: added to the variance, positive (default 1e-5).
        statistics: over ranks, ``"global"`` (default) or, as lightly's class, ``"local"``.
        form: ``"auto"`` (default), ``"primal"`` or ``"dual"``.

    Shapes:
        ``z_a``, ``z_b``: [N, D], N ≥ 2; output: [].

    Raises:
        ValueError: eps is not positive; ``statistics`` or ``form`` is none of the above; see also :func:`barlow_twins`.

    Example:
        >>> criterion = sslfast.BarlowTwinsLoss(lambda_param=0.5)
        >>> round(criterion(torch.eye(4), torch.eye(4)).item(), 4)
        0.6666
    """

    def __init__(
        self,
        lambda_param: float = 0.005,
        gather_distributed: bool = False,
        *,
        scale_loss: float = 1.0,
        eps: float = 1e-5,
        statistics: str = "global",
        form: str = "auto",
    ) -> None:
        super().__init__()
        check_gather(gather_distributed)
        check_eps(eps)
        check_choice("statistics", statistics, STATISTICS)
        check_choice("form", form, FORMS)
        self.lambda_param = lambda_param
        self.gather_distributed = gather_distributed
        self.scale_loss = scale_loss
        self.eps = eps
        self.statistics = statistics
        self.form = form

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss of two views, each [N, D]."""
        return barlow_twins(
            z_a,
            z_b,
            self.lambda_param,
            scale_loss=self.scale_loss,
            eps=self.eps,
            gather_distributed=self.gather_distributed,
            statistics=self.statistics,
            form=self.form,
        )

    def extra_repr(self) -> str:
        return (
            f"lambda_param={self.lambda_param}, gather_distributed={self.gather_distributed}, "
            f"scale_loss={self.scale_loss}, statistics={self.statistics!r}"
        )
