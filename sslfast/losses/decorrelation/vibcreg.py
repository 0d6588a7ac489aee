"""VIbCReg: VICReg with correlations in the place of covariances."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ..._checks import accumulator
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...ops.moment_losses import Loss
from ...ops.types import FORMS, MomentOptions
from .._inputs import check_gather, two_views
from ._moment_loss import fused
from .vicreg import check_choice, check_eps, check_two_rows, variance_term

# F.normalize's. A column that is exactly constant stays zero; of one that is constant up to rounding, the rounding is
# normalised, as there.
NORM_EPS = 1e-12


@over_ranks()
def vibcreg(
    z_a: Tensor,
    z_b: Tensor,
    sim_loss_weight: float = 25.0,
    var_loss_weight: float = 25.0,
    cov_loss_weight: float = 200.0,
    *,
    eps: float = 1e-4,
    gather_distributed: bool = False,
    form: str = "auto",
) -> Tensor:
    """VIbCReg of two views: VICReg with a covariance term that does not depend on the columns' scale.

        loss = sim · mean (z_a − z_b)²
             + var · Σ_views mean_j max(0, 1 − sqrt(Var_j + eps))         unbiased; the sum of both views
             + cov · Σ_views (1/D²) Σ_{i≠j} R_ij²                         R: correlations, ẐᵀẐ of centred unit columns

    Args:
        z_a, z_b: [N, D], N ≥ 2, row ``i`` of each a view of sample ``i``; float32, float64, bfloat16 or float16, the
            same for both (inside an autocast region the wider one is used).
        sim_loss_weight, var_loss_weight, cov_loss_weight: weights of the terms (default 25, 25, 200).
        eps: added to the variance, positive (default 1e-4).
        gather_distributed: variances and correlations of the rows of all ranks; ``False``: of this rank's.
        form: "primal", O(N·D²), "dual", O(N²·D), or "auto" (default), the cheaper: see :func:`sslfast.second_moment`.

    Returns:
        [] float32 (float64 for float64 inputs). Over several ranks the mean of their values is the loss of the global
        batch.

    Raises:
        TypeError: dtypes are not floating point, or differ.
        ValueError: not two matrices of one shape on one device with at least two rows (of all ranks together); eps is
            not positive; ``form`` is none of the above.

    Source: Lee & Aptoula 2021, "VIbCReg: Variance-Invariance-better-Covariance Regularization for Self-Supervised
    Learning on Time Series"; weights and reductions as solo-learn's ``vibcreg_loss_func``.

    Example:
        >>> round(sslfast.vibcreg(torch.eye(4), torch.eye(4)).item(), 3)
        58.328
    """
    z_a, z_b = two_views("z_a", z_a, "z_b", z_b, normalize=False)
    check_eps(eps)
    check_choice("form", form, FORMS)
    scope = scope_of(gather_distributed)
    shard = scope.shard(z_a)
    check_two_rows("z_a", shard.total)
    d, kind = z_a.shape[1], accumulator(z_a)
    loss = Loss(
        off=cov_loss_weight / d**2,
        distance=sim_loss_weight / (shard.total * d),
        columns=var_loss_weight / d,
        penalty="hinge",
        floor=eps,
    )
    options = MomentOptions(scale="norm", eps=NORM_EPS, form=form)
    found = fused(scope, z_a, z_b, loss, options)
    if found is not None:
        return found
    wide_a, wide_b = z_a.to(kind), z_b.to(kind)
    similarity = shard.weight / d * F.mse_loss(wide_a, wide_b, reduction="sum")
    variance = variance_term(scope, wide_a, shard.total, eps) + variance_term(scope, wide_b, shard.total, eps)
    moment = scope.moment(z_a, z_b, options)
    correlation = moment.off_diagonal.sum() / d**2
    return sim_loss_weight * similarity + var_loss_weight * variance + cov_loss_weight * correlation


class VIbCRegLoss(nn.Module):
    """The module form of :func:`vibcreg`.

    Args:
        sim_loss_weight, var_loss_weight, cov_loss_weight: weights of the terms (default 25, 25, 200).
        gather_distributed: over the rows of all ranks (default: this rank's alone).
        eps: added to the variance, positive (default 1e-4).
        form: ``"auto"`` (default), ``"primal"`` or ``"dual"``.

    Shapes:
        ``z_a``, ``z_b``: [N, D], N ≥ 2; output: [].

    Raises:
        ValueError: eps is not positive; ``form`` is none of the above; see also :func:`vibcreg`.

    Example:
        >>> criterion = sslfast.VIbCRegLoss()
        >>> round(criterion(torch.eye(4), torch.eye(4)).item(), 3)
        58.328
    """

    def __init__(
        self,
        sim_loss_weight: float = 25.0,
        var_loss_weight: float = 25.0,
        cov_loss_weight: float = 200.0,
        gather_distributed: bool = False,
        eps: float = 1e-4,
        *,
        form: str = "auto",
    ) -> None:
        super().__init__()
        check_gather(gather_distributed)
        check_eps(eps)
        check_choice("form", form, FORMS)
        self.sim_loss_weight = sim_loss_weight
        self.var_loss_weight = var_loss_weight
        self.cov_loss_weight = cov_loss_weight
        self.gather_distributed = gather_distributed
        self.eps = eps
        self.form = form

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss of two views, each [N, D]."""
        return vibcreg(
            z_a,
            z_b,
            self.sim_loss_weight,
            self.var_loss_weight,
            self.cov_loss_weight,
            eps=self.eps,
            gather_distributed=self.gather_distributed,
            form=self.form,
        )

    def extra_repr(self) -> str:
        return (
            f"sim_loss_weight={self.sim_loss_weight}, var_loss_weight={self.var_loss_weight}, "
            f"cov_loss_weight={self.cov_loss_weight}, gather_distributed={self.gather_distributed}"
        )
