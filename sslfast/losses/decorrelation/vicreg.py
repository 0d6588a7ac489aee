"""VICReg: variance, invariance and covariance of two views from one pass, without the D × D matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._checks import accumulator, check_matrix, check_same
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...distributed.scope import Scope
from ...ops.moment_losses import Loss
from ...ops.types import FORMS, STATISTICS, MomentOptions
from .._inputs import check_gather, in_one_dtype
from ._moment_loss import summed

VARIANCE_REDUCTIONS = ("mean", "sum")


def check_eps(eps: float) -> None:
    """``eps`` is positive: without it the square root of a constant column's variance has no gradient."""
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_two_rows(name: str, rows: int) -> None:
    """There is a variance: ``rows``, over all ranks, are two or more."""
    if rows < 2:
        raise ValueError(f"{name} must have at least two rows: one row has no variance")


def _checked(name: str, x: Tensor) -> Tensor:
    """``x`` is a floating-point tensor [N, ..., D] without an empty dimension."""
    if isinstance(x, Tensor) and x.dim() > 2:
        if x.numel() == 0:
            raise ValueError(f"{name} must have at least one row, place and feature, got shape {tuple(x.shape)}")
        check_matrix(name, x.flatten(1, -2)[:, 0])
    else:
        check_matrix(name, x)
    return x


def _checked_views(name_a: str, z_a: Tensor, name_b: str, z_b: Tensor) -> tuple[Tensor, Tensor]:
    """Both checked, of the same shape, device and dtype."""
    first, second = in_one_dtype(_checked(name_a, z_a), _checked(name_b, z_b))
    assert first is not None and second is not None
    check_same(name_a, first, name_b, second)
    return first, second


def _places(x: Tensor) -> tuple[Tensor, ...]:
    """The matrices [N, D] of ``x`` [N, ..., D], one for each place between rows and features."""
    return (x,) if x.dim() == 2 else x.flatten(1, -2).unbind(1)


def invariance_loss(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error, ``mean (x − y)²``.

    Args:
        x, y: [N, ..., D]; float32, float64, bfloat16 or float16, the same for both.

    Returns:
        [] float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: dtypes, shapes or devices differ; fewer than two dimensions, or one of them empty.

    Source: Bardes et al. 2022, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning",
    equation 5, divided by D as in its code; lightly 1.6.0's function of this name.

    Example:
        >>> sslfast.invariance_loss(torch.eye(4), torch.zeros(4, 4)).item()
        0.25
    """
    x, y = _checked_views("x", x, "y", y)
    kind = accumulator(x)
    return F.mse_loss(x.to(kind), y.to(kind))


def variance_term(scope: Scope, x: Tensor, rows: int, eps: float) -> Tensor:
    """Mean of ``max(0, 1 − sqrt(Var + eps))`` over the columns of ``x`` [n, ..., D], of ``rows`` over the scope."""
    mean = scope.total(x.sum(0)) / rows
    # Two passes of plain reductions: x.var(0) on a CPU takes three times as long, and over ranks there is none.
    variance = scope.total((x - mean).square().sum(0)) / (rows - 1)
    return F.relu(1 - (variance + eps).sqrt()).mean()


def variance_loss(x: Tensor, eps: float = 1e-4) -> Tensor:
    """Mean hinge of the columns' standard deviations at 1, ``mean_j max(0, 1 − sqrt(Var(x_j) + eps))``, Var unbiased.

    Args:
        x: [N, ..., D], N ≥ 2; float32, float64, bfloat16 or float16.
        eps: added to the variance, positive (default 1e-4).

    Returns:
        [] float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: x is not a floating-point tensor of two dimensions or more, has fewer than two rows or is
            empty; eps is not positive.

    Source: Bardes et al. 2022, equations 1 and 2; lightly 1.6.0's function of this name.

    Example:
        >>> round(sslfast.variance_loss(torch.eye(4)).item(), 4)
        0.4999
    """
    check_two_rows("x", len(_checked("x", x)))
    check_eps(eps)
    return variance_term(Scope(), x.to(accumulator(x)), len(x), eps)


def covariance_loss(x: Tensor, *, form: str = "auto") -> Tensor:
    """Sum of the squared off-diagonal covariances, ``(1/D) Σ_{i≠j} Cov_ij²``, averaged over positions.

    Args:
        x: [N, ..., D], N ≥ 2; float32, float64, bfloat16 or float16. Each position between N and D has its own matrix.
        form: "primal", O(N·D²), "dual", O(N²·D), or "auto" (default), the cheaper: see :func:`sslfast.second_moment`.

    Returns:
        [] float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: as :func:`variance_loss`; ``form`` is none of the above.

    Source: Bardes et al. 2022, equations 3 and 4; lightly 1.6.0's function of this name.

    Example:
        >>> round(sslfast.covariance_loss(torch.eye(4)).item(), 4)
        0.0208
    """
    check_two_rows("x", len(_checked("x", x)))
    loss = Loss(off=1.0 / ((len(x) - 1) ** 2 * x.shape[-1]))
    losses = [summed(Scope(), place, None, loss, MomentOptions(form=form), rows=len(x)) for place in _places(x)]
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


@over_ranks()
def vicreg(
    z_a: Tensor,
    z_b: Tensor,
    lambda_param: float = 25.0,
    mu_param: float = 25.0,
    nu_param: float = 1.0,
    *,
    eps: float = 1e-4,
    variance_reduction: str = "mean",
    gather_distributed: bool = False,
    invariance: str = "global",
    form: str = "auto",
) -> Tensor:
    """VICReg of two views, all terms from one pass over them.

        loss = λ · mean (z_a − z_b)²                                      invariance
             + μ · ½ Σ_views mean_j max(0, 1 − sqrt(Var_j + eps))         variance, unbiased
             + ν · Σ_views (1/D) Σ_{i≠j} Cov_ij²                          covariance, divided by N − 1

    Args:
        z_a, z_b: [N, D], N ≥ 2, row ``i`` of each a view of sample ``i``; float32, float64, bfloat16 or float16, the
            same for both (inside an autocast region the wider one is used). Or [N, ..., D], as lightly's: the mean over
            the places between N and D.
        lambda_param, mu_param, nu_param: λ, μ, ν, weights of invariance, variance and covariance.
        eps: added to the variance, positive (default 1e-4).
        variance_reduction: over the two views, "mean" (default: the official code, lightly,
            pytorch-metric-learning) or "sum" (the paper's equation 6, solo-learn).
        gather_distributed: variances and covariances of the rows of all ranks; ``False``: of this rank's.
        invariance: over ranks, the mean over all rows ("global", the default) or each rank's own ("local": lightly).
            For even batches the gradients are the same.
        form: "primal", O(N·D²), "dual", O(N²·D), or "auto" (default), the cheaper: see :func:`sslfast.second_moment`.

    Returns:
        [] float32 (float64 for float64 inputs). Over several ranks every rank returns the global value, but for the
        term of a local invariance.

    Raises:
        TypeError: dtypes are not floating point, or differ.
        ValueError: shapes or devices differ; fewer than two dimensions, or than two rows (of all ranks together); eps
            is not positive; ``variance_reduction``, ``invariance`` or ``form`` is none of the above.

    Source: Bardes et al. 2022, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning",
    equations 1 to 6, with the mean of squares over D in the invariance as in its code.

    Example:
        >>> round(sslfast.vicreg(torch.eye(4), torch.eye(4)).item(), 4)
        12.5392
    """
    z_a, z_b = _checked_views("z_a", z_a, "z_b", z_b)
    check_eps(eps)
    check_choice("variance_reduction", variance_reduction, VARIANCE_REDUCTIONS)
    check_choice("invariance", invariance, STATISTICS)
    check_choice("form", form, FORMS)
    scope = scope_of(gather_distributed)
    shard, d = scope.shard(z_a), z_a.shape[-1]
    rows = shard.total
    check_two_rows("z_a", rows)
    own_error = invariance == "local" and shard.world_size > 1
    loss = Loss(
        off=nu_param / ((rows - 1) ** 2 * d),
        distance=0.0 if own_error else lambda_param / (rows * d),
        columns=mu_param / (2 if variance_reduction == "mean" else 1) / d,
        penalty="hinge",
        floor=eps,
    )
    losses = []
    for a, b in zip(_places(z_a), _places(z_b), strict=True):
        losses.append(summed(scope, a, b, loss, MomentOptions(form=form), rows=rows))
        if own_error:
            losses[-1] = losses[-1] + lambda_param * invariance_loss(a, b)
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


class VICRegLoss(nn.Module):
    """The module form of :func:`vicreg`, with the constructor of lightly 1.6.0's class.

    Args:
        lambda_param, mu_param, nu_param: weights of invariance, variance and covariance (default 25, 25, 1).
        gather_distributed: over the rows of all ranks (default: this rank's alone).
        eps: added to the variance, positive (default 1e-4).
        variance_reduction: over the two views, ``"mean"`` (default) or, as solo-learn, ``"sum"``.
        invariance: over ranks, ``"global"`` (default) or, as lightly's class, ``"local"``.
        form: ``"auto"`` (default), ``"primal"`` or ``"dual"``.

    Shapes:
        ``z_a``, ``z_b``: [N, D] or [N, ..., D], N ≥ 2; output: [].

    Raises:
        ValueError: eps is not positive; ``variance_reduction``, ``invariance`` or ``form`` is none of the above; see
            also :func:`vicreg`.

    Example:
        >>> criterion = sslfast.VICRegLoss(lambda_param=25.0, mu_param=25.0, nu_param=1.0)
        >>> round(criterion(torch.eye(4), torch.eye(4)).item(), 4)
        12.5392
    """

    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        gather_distributed: bool = False,
        eps: float = 1e-4,
        *,
        variance_reduction: str = "mean",
        invariance: str = "global",
        form: str = "auto",
    ) -> None:
        super().__init__()
        check_gather(gather_distributed)
        check_eps(eps)
        check_choice("variance_reduction", variance_reduction, VARIANCE_REDUCTIONS)
        check_choice("invariance", invariance, STATISTICS)
        check_choice("form", form, FORMS)
        self.lambda_param = lambda_param
        self.mu_param = mu_param
        self.nu_param = nu_param
        self.gather_distributed = gather_distributed
        self.eps = eps
        self.variance_reduction = variance_reduction
        self.invariance = invariance
        self.form = form

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss of two views, each [N, D] or [N, ..., D]."""
        return vicreg(
            z_a,
            z_b,
            self.lambda_param,
            self.mu_param,
            self.nu_param,
            eps=self.eps,
            variance_reduction=self.variance_reduction,
            gather_distributed=self.gather_distributed,
            invariance=self.invariance,
            form=self.form,
        )

    def extra_repr(self) -> str:
        return (
            f"lambda_param={self.lambda_param}, mu_param={self.mu_param}, nu_param={self.nu_param}, "
            f"gather_distributed={self.gather_distributed}, eps={self.eps}, "
            f"variance_reduction={self.variance_reduction!r}, invariance={self.invariance!r}"
        )
