"""Decoupled contrastive learning: NT-Xent whose denominator leaves out the positive as well."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...distributed.scope import Scope, Shard
from ...ops.types import Pairs, Want
from .._inputs import two_views
from ._inputs import ContrastiveLoss, inverse, row_dots
from .diagnostics import Diagnosed, Diagnostics, diagnostics_of, with_diagnostics

WeightFn = Callable[[Tensor, Tensor], Tensor]


def dcl(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    weight_fn: WeightFn | None = None,
    normalize: bool = True,
    gather_distributed: bool = False,
    strategy: str = "gather",
) -> Tensor:
    """Decoupled contrastive loss (DCL) of two views, mean over the 2N rows.

        ℓ_i = −w_i s_ip + log Σ_{j ∉ {i, p}} exp(s_ij),        s_ij = z_i·z_j / τ,   z = [z0; z1]

    ``p`` is the other view of row ``i``; the rows against themselves use the symmetry, and no matrix is stored.

    Args:
        z0, z1: [N, D] each, row ``i`` of both a view of image ``i``; float32, float64, bfloat16 or float16. With one
            image nothing is left in the denominator: the loss is −inf, as lightly's, its gradient that of −w_i s_ip.
        temperature: τ, finite and not zero (default 0.1); or a one-element tensor, which receives its gradient.
        weight_fn: ``w`` [N] of ``(z0, z1)``, both as used (normalised), and for the other direction of ``(z1, z0)``;
            differentiated through (default: w = 1). Of this rank's rows.
        normalize: divide each row by its norm first (default).
        gather_distributed: negatives of all ranks; ``False``: this rank's.
        strategy: how, ``"gather"`` or ``"ring"``.

    Returns:
        [] float32 (float64 for float64 inputs). Over several ranks the mean of their values
        is the loss of the global batch.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices differ, the temperature is zero or not finite, or the
            weights are not [N].

    Source: Yeh et al. 2022, "Decoupled Contrastive Learning", equation 6, as a mean; value as lightly 1.6.0's
    ``DCLLoss``.

    Example:
        >>> round(sslfast.dcl(torch.eye(4), torch.eye(4), temperature=0.5).item(), 4)
        -0.2082
    """
    return _dcl(z0, z1, temperature, weight_fn, normalize, scope_of(gather_distributed, strategy))[0]


@over_ranks("temperature")
def _dcl(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor,
    weight_fn: WeightFn | None,
    normalize: bool,
    scope: Scope,
    diagnostics: bool = False,
) -> Diagnosed:
    z0, z1 = two_views("z0", z0, "z1", z1, normalize)
    scale, weights = inverse(temperature, z0), None
    if weight_fn is not None:
        parts = weight_fn(z0, z1), weight_fn(z1, z0)
        for part in parts:
            if part.shape != z0.shape[:1]:
                raise ValueError(f"weight_fn must return shape ({len(z0)},), got {tuple(part.shape)}")
        weights = torch.cat(parts)
    return _decoupled(z0, z1, scale, weights, scope, scope.shard(z0), diagnostics)


def dclw(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    sigma: float = 0.5,
    normalize: bool = True,
    gather_distributed: bool = False,
    strategy: str = "gather",
) -> Tensor:
    """DCL with negative von Mises–Fisher weights, ``w_i = 2 − N·softmax_i(z0_i·z1_i / σ)``, without gradient.

    Args:
        sigma: σ, positive (default 0.5).
        The others, the result and the errors are those of :func:`dcl`.

    Over several ranks the softmax is that of the global batch, as in one process on it; lightly takes each rank's.

    Source: Yeh et al. 2022, "Decoupled Contrastive Learning", section 3.3; value as lightly 1.6.0's ``DCLWLoss``.

    Example:
        >>> round(sslfast.dclw(torch.eye(4), torch.eye(4), temperature=0.5).item(), 4)
        -0.2082
    """
    return _dclw(z0, z1, temperature, sigma, normalize, scope_of(gather_distributed, strategy))[0]


@over_ranks("temperature")
def _dclw(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor,
    sigma: float,
    normalize: bool,
    scope: Scope,
    diagnostics: bool = False,
) -> Diagnosed:
    _check_sigma(sigma)
    z0, z1 = two_views("z0", z0, "z1", z1, normalize)
    scale = inverse(temperature, z0)
    shard = scope.shard(z0)
    with torch.no_grad():
        similarity = row_dots(z0, z1.unsqueeze(1)).squeeze(1) / sigma  # [N]
        softmax = (similarity - scope.gather(similarity).logsumexp(0)).exp()
        weights = (2 - shard.total * softmax).repeat(2)
    return _decoupled(z0, z1, scale, weights, scope, shard, diagnostics)


def _check_sigma(sigma: float) -> None:
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")


def _decoupled(
    z0: Tensor,
    z1: Tensor,
    scale: Tensor,
    weights: Tensor | None,  # [2n]
    scope: Scope,
    shard: Shard,  # of the samples
    diagnostics: bool,
) -> Diagnosed:
    n, device = shard.local, z0.device
    z = torch.cat([z0, z1])  # [2n, D]
    ids = shard.ids(device).repeat(2)  # sample numbers: a row leaves out itself and its positive
    other_view = (torch.arange(2 * n, device=device) + n) % (2 * n)
    pairs = Pairs(z, None, scale, row_ids=ids, positives=2 * shard.offset + other_view)
    terms = scope.terms(pairs, Want(hardest=diagnostics))
    assert terms.positive is not None
    attraction = terms.positive if weights is None else weights * terms.positive
    loss = shard.weight / 2 * (terms.row_lse - attraction).sum()
    return loss, diagnostics_of(terms, scale, 2 * n * (2 * shard.total - 2)) if diagnostics else None


class DCLLoss(ContrastiveLoss):
    """The module form of :func:`dcl`, with the constructor of lightly 1.6.0's class.

    Args:
        temperature, weight_fn, gather_distributed, strategy, diagnostics: as :func:`dcl`; a temperature that is a
            tensor or ``nn.Parameter`` moves with the module.

    Shapes:
        ``out0``, ``out1``: [N, D], normalised here; output: [], or ``(loss, diagnostics)``.

    Raises:
        As :func:`dcl`.

    Example:
        >>> criterion = sslfast.DCLLoss(temperature=0.5)
        >>> round(criterion(torch.eye(4), torch.eye(4)).item(), 4)
        -0.2082
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        weight_fn: WeightFn | None = None,
        gather_distributed: bool = False,
        *,
        strategy: str = "gather",
        diagnostics: bool = False,
    ) -> None:
        super().__init__(temperature, gather_distributed, strategy, diagnostics)
        self.weight_fn = weight_fn

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor | tuple[Tensor, Diagnostics]:
        """The loss of two views, each [N, D]."""
        return with_diagnostics(
            _dcl(out0, out1, self.temperature, self.weight_fn, True, self.scope(), self.diagnostics)
        )


class DCLWLoss(ContrastiveLoss):
    """The module form of :func:`dclw`, with the constructor of lightly 1.6.0's class.

    Args:
        temperature, sigma, gather_distributed, strategy, diagnostics: as :func:`dclw`; a temperature that is a tensor
            or ``nn.Parameter`` moves with the module.

    Shapes:
        ``out0``, ``out1``: [N, D], normalised here; output: [], or ``(loss, diagnostics)``.

    Raises:
        As :func:`dclw`.

    Example:
        >>> criterion = sslfast.DCLWLoss(temperature=0.5, sigma=0.5)
        >>> round(criterion(torch.eye(4), torch.eye(4)).item(), 4)
        -0.2082
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        sigma: float = 0.5,
        gather_distributed: bool = False,
        *,
        strategy: str = "gather",
        diagnostics: bool = False,
    ) -> None:
        super().__init__(temperature, gather_distributed, strategy, diagnostics)
        _check_sigma(sigma)
        self.sigma = sigma

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor | tuple[Tensor, Diagnostics]:
        """The loss of two views, each [N, D]."""
        return with_diagnostics(_dclw(out0, out1, self.temperature, self.sigma, True, self.scope(), self.diagnostics))
