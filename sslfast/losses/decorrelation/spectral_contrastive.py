"""The spectral contrastive loss: squared similarities, so that D × D moments stand in for the N × N matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..._checks import accumulator, is_real, plain
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...ops.moment_losses import Loss
from ...ops.second_moment import moment_of
from ...ops.types import MomentOptions
from .._inputs import check_gather, two_views
from ._moment_loss import fused


@over_ranks()
def spectral_contrastive(
    z_a: Tensor, z_b: Tensor, mu: float | None = 1.0, *, gather_distributed: bool = False
) -> Tensor:
    """Minus twice the mean similarity of the positives, plus the mean squared similarity of all other pairs.

        loss = (1/μ) ( −(2/N) Σ_i a_i·b_i + 1/(N(N−1)) Σ_{i≠j} (a_i·b_j)² )

    ``a_i``, ``b_i`` are the rows of ``z_a`` and ``z_b``, those longer than √μ shortened to √μ. Where D is
    clearly less than N no N × N matrix is computed.

    Args:
        z_a, z_b: [N, D], N ≥ 2, row ``i`` of each a view of sample ``i``; float32, float64, bfloat16 or float16. Of
            16-bit rows the shortened ones are rounded again.
        mu: μ, square of the largest norm, positive (default 1); ``None``: rows of any norm, as they are, and no
            division: the paper's equation.
        gather_distributed: contrast the rows of all ranks; ``False``: this rank's alone.

    Returns:
        [] float32 (float64 for float64 inputs). Over several ranks every rank returns the global value.

    Raises:
        TypeError, ValueError: z_a and z_b are not matrices of the same shape, dtype and device; fewer than two rows (of
            all ranks together); mu is not positive and finite.

    Source: HaoChen et al. 2021, "Provable Guarantees for Self-Supervised Deep Learning with Spectral Contrastive Loss",
    equation 6 and section 5; with ``mu``, value and gradient of the authors' code.

    Example:
        >>> round(sslfast.spectral_contrastive(torch.eye(4), torch.eye(4)).item(), 4)
        -2.0
    """
    _check_mu(mu)
    mu = None if mu is None else plain(mu)
    z_a, z_b = two_views("z_a", z_a, "z_b", z_b, normalize=False)
    scope = scope_of(gather_distributed)
    n = scope.shard(z_a).total
    if n < 2:
        raise ValueError(f"spectral_contrastive needs at least two rows, got {n}")
    # The rows as columns: M_ij = a_i·b_j. Divided by max(‖x‖, √μ) they are shortened, and all of them 1/√μ of it.
    whole = Loss(off=(1.0 if mu is None else mu) / (n * (n - 1)), columns=-2.0 / n, penalty="trace")
    options = MomentOptions(cross=True, center=False)
    shortened = options if mu is None else options._replace(scale="norm", eps=math.sqrt(mu))
    found = fused(scope, z_a.T, z_b.T, whole, shortened)
    if found is not None:
        return found
    if mu is not None:
        z_a, z_b = _shortened(z_a, mu), _shortened(z_b, mu)
    # Every rank has all rows, hence the moments of this process alone.
    moment = moment_of(scope.gather(z_a).T, scope.gather(z_b).T, options)
    loss = moment.off_diagonal.sum() / (n * (n - 1)) - 2 * moment.diagonal.sum() / n
    return loss if mu is None else loss / mu


def _check_mu(mu: float | None) -> None:
    if mu is None:
        return
    if not is_real(mu) or not 0 < mu < math.inf:
        raise ValueError(f"mu must be a positive finite number or None, got {mu!r}")


def _shortened(z: Tensor, mu: float) -> Tensor:
    """The rows that are longer than √μ, shortened to it."""
    wide = z.to(accumulator(z))
    radius = math.sqrt(mu)
    norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)  # [N, 1]
    return (wide * (radius / norm.clamp_min(radius))).to(z.dtype)  # by 1 where it is short enough


class SpectralContrastiveLoss(nn.Module):
    """The module form of :func:`spectral_contrastive`.

    Args:
        mu, gather_distributed: as :func:`spectral_contrastive`.

    Shapes:
        ``z_a``, ``z_b``: [N, D]; output: [].

    Raises:
        As :func:`spectral_contrastive`.

    Example:
        >>> criterion = sslfast.SpectralContrastiveLoss(mu=1.0)
        >>> round(criterion(torch.eye(4), torch.eye(4)).item(), 4)
        -2.0
    """

    def __init__(self, mu: float | None = 1.0, *, gather_distributed: bool = False) -> None:
        super().__init__()
        _check_mu(mu)
        check_gather(gather_distributed)
        self.mu = mu
        self.gather_distributed = gather_distributed

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss of two views, each [N, D]."""
        return spectral_contrastive(z_a, z_b, self.mu, gather_distributed=self.gather_distributed)

    def extra_repr(self) -> str:
        return f"mu={self.mu}, gather_distributed={self.gather_distributed}"
