"""Negative cosine similarity, and the two losses that are made of it: BYOL and SimSiam."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._checks import accumulator, is_real
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...distributed.scope import Scope
from ...ops import negative_cosine as rows
from .._inputs import check_gather, two_views

# Offset, and factor of the mean cosine.
CONVENTIONS = {"cosine": (0.0, -1.0), "distance": (2.0, -2.0)}


class CosineDiagnostics(NamedTuple):
    """Of this rank's rows, without gradient, each [] float32 (float64 for float64 inputs).

    ``similarity``: the mean cosine. ``channel_std``: the standard deviation of each channel of the normalised targets,
    mean over the channels, times √D: 1 where they spread evenly over the sphere, **0 where they have collapsed** to one
    direction, which the loss (it is then as small as can be) does not show.

    Source: Chen & He 2021, "Exploring Simple Siamese Representation Learning", section 4.1 (figure 2, middle).

    Example:
        >>> p = torch.randn(64, 8)
        >>> loss, found = sslfast.NegativeCosineLoss(diagnostics=True)(p, torch.ones(64, 8))
        >>> round(found.channel_std.item(), 4)
        0.0
    """

    similarity: Tensor
    channel_std: Tensor


Diagnosed = tuple[Tensor, CosineDiagnostics | None]


def negative_cosine(
    p: Tensor,
    z: Tensor,
    *,
    convention: str = "cosine",
    eps: float = rows.EPS,
    gather_distributed: bool = False,
) -> Tensor:
    """Negative cosine similarity of matching rows, mean over the rows, one pass over memory each way.

        "cosine":    −(1/N) Σ_i p̂_i·ẑ_i                    in [−1, 1]
        "distance":  (1/N) Σ_i ‖p̂_i − ẑ_i‖² = 2 − 2 · mean    in [0, 4]          x̂ = x / max(‖x‖₂, eps)

    Args:
        p, z: [N, D], row ``i`` of each a view of sample ``i``; float32, float64, bfloat16 or float16. **Both** receive
            their gradients, as in ``F.cosine_similarity``; :func:`byol` and :func:`sim_siam` detach the targets.
        convention: ``"cosine"`` (default), or ``"distance"``, as in BYOL's and solo-learn's code.
        eps: lower bound of each norm (default 1e-8, PyTorch's), in float32 for 16-bit rows, where it is not 0.
        gather_distributed: weight the rank's sum so that the mean over ranks is the mean over all rows, for uneven
            batches too; ``False``: the mean over this rank's rows.

    Returns:
        [] float32 (float64 for float64 inputs).

    A row shorter than ``eps`` has a constant divisor, so that its gradient is ẑ/eps, without the projection.

    Raises:
        TypeError, ValueError: p and z are not matrices of the same shape, dtype and device; the convention is neither;
            eps is not positive.

    Source: Chen & He 2021, "Exploring Simple Siamese Representation Learning", equation 1; Grill et al. 2020,
    "Bootstrap Your Own Latent", equation 2.

    Example:
        >>> p, z = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
        >>> round(sslfast.negative_cosine(p, z).item(), 4)
        -0.7071
        >>> round(sslfast.negative_cosine(p, z, convention="distance").item(), 4)
        0.5858
    """
    return _negative_cosine(p, z, convention, eps, scope_of(gather_distributed))


@over_ranks()
def _negative_cosine(p: Tensor, z: Tensor, convention: str, eps: float, scope: Scope) -> Tensor:
    _check_options(convention, eps)
    p, z = two_views("p", p, "z", z, normalize=False)
    offset, factor = CONVENTIONS[convention]
    return rows.negative_cosine(p, z, eps, factor * scope.shard(p).weight, offset)


def byol(
    p_a: Tensor,
    p_b: Tensor,
    z_a: Tensor,
    z_b: Tensor,
    *,
    eps: float = rows.EPS,
    gather_distributed: bool = False,
) -> Tensor:
    """BYOL's loss: the squared distances of both directions, **summed**, so that it starts near 4.

        loss = mean_i ‖p̂a_i − sg(ẑb_i)‖² + mean_i ‖p̂b_i − sg(ẑa_i)‖²

    Args:
        p_a, p_b: [N, D], the online network's predictions of the two views.
        z_a, z_b: [N, D], the target network's projections of the two views; detached here.
        eps, gather_distributed: as :func:`negative_cosine`.

    Returns:
        [] float32 (float64 for float64 inputs).

    Raises:
        As :func:`negative_cosine`.

    Source: Grill et al. 2020, "Bootstrap Your Own Latent", equation 2, symmetrised; value as the authors' code.

    Example:
        >>> sslfast.byol(torch.eye(4), torch.eye(4), torch.eye(4), torch.eye(4).flip(0)).item()
        2.0
    """
    return _both(p_a, p_b, z_a, z_b, "distance", 1.0, eps, scope_of(gather_distributed))


def sim_siam(
    p_a: Tensor,
    p_b: Tensor,
    z_a: Tensor,
    z_b: Tensor,
    *,
    eps: float = rows.EPS,
    gather_distributed: bool = False,
) -> Tensor:
    """SimSiam's loss: the negative cosines of both directions, **halved**, so that its least value is −1.

        loss = −½ mean_i p̂a_i·sg(ẑb_i) − ½ mean_i p̂b_i·sg(ẑa_i)

    Args:
        p_a, p_b: [N, D], the predictions of the two views.
        z_a, z_b: [N, D], the projections of the two views; detached here.
        eps, gather_distributed: as :func:`negative_cosine`.

    Returns:
        [] float32 (float64 for float64 inputs).

    Raises:
        As :func:`negative_cosine`.

    Source: Chen & He 2021, "Exploring Simple Siamese Representation Learning", equation 4; value as the authors' code.

    Example:
        >>> sslfast.sim_siam(torch.eye(4), torch.eye(4), torch.eye(4), torch.eye(4).flip(0)).item()
        -0.5
    """
    return _both(p_a, p_b, z_a, z_b, "cosine", 0.5, eps, scope_of(gather_distributed))


@over_ranks()
def _both(
    p_a: Tensor,
    p_b: Tensor,
    z_a: Tensor,
    z_b: Tensor,
    convention: str,
    share: float,
    eps: float,
    scope: Scope,
) -> Tensor:
    """The two directions, each against the other view's target without gradient, times ``share``."""
    _check_options(convention, eps)
    p_a, z_b = two_views("p_a", p_a, "z_b", z_b, normalize=False)
    p_b, z_a = two_views("p_b", p_b, "z_a", z_a, normalize=False)
    if p_a.shape != p_b.shape:
        raise ValueError(f"p_a and p_b must have the same shape, got {tuple(p_a.shape)} and {tuple(p_b.shape)}")
    offset, factor = (share * part for part in CONVENTIONS[convention])
    factor *= scope.shard(p_a).weight
    first = rows.negative_cosine(p_a, z_b.detach(), eps, factor, offset)
    return first + rows.negative_cosine(p_b, z_a.detach(), eps, factor, offset)


def _check_options(convention: str, eps: float) -> None:
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    if not is_real(eps) or not eps > 0:
        raise ValueError(f"eps must be a positive number, got {eps!r}")


@torch.no_grad()
def _diagnostics(predictions: tuple[Tensor, ...], targets: tuple[Tensor, ...], eps: float) -> CosineDiagnostics:
    """Means over pairs of a prediction and its target."""
    similar, spread = [], []
    for p, z in zip(predictions, targets, strict=True):
        kind, share, (n, d) = accumulator(z), 1 / len(targets), z.shape
        p_hat, z_hat = (F.normalize(t.detach().to(kind), dim=1, eps=eps) for t in (p, z))
        similar.append((p_hat * z_hat).sum() * (share / n))
        centred = z_hat - z_hat.sum(0) * (1 / n)
        spread.append((centred.square().sum(0) * (1 / n)).sqrt().sum() * (share / d**0.5))
    return CosineDiagnostics(torch.stack(similar).sum(), torch.stack(spread).sum())


class _CosineLoss(nn.Module):
    def __init__(self, eps: float, gather_distributed: bool, diagnostics: bool) -> None:
        super().__init__()
        check_gather(gather_distributed)
        self.eps = eps
        self.gather_distributed = gather_distributed
        self.diagnostics = diagnostics

    def diagnosed(
        self, loss: Tensor, predictions: tuple[Tensor, ...], targets: tuple[Tensor, ...]
    ) -> Tensor | tuple[Tensor, CosineDiagnostics]:
        """The loss, and the diagnostics where they are asked for."""
        return (loss, _diagnostics(predictions, targets, self.eps)) if self.diagnostics else loss

    def extra_repr(self) -> str:
        return f"eps={self.eps}, gather_distributed={self.gather_distributed}, diagnostics={self.diagnostics}"


class NegativeCosineLoss(_CosineLoss):
    """The module form of :func:`negative_cosine`.

    Args:
        convention, eps, gather_distributed: as :func:`negative_cosine`.
        diagnostics: return ``(loss, CosineDiagnostics)``.

    Shapes:
        ``p``, ``z``: [N, D]; output: [], or ``(loss, diagnostics)``.

    Raises:
        As :func:`negative_cosine`.

    Example:
        >>> criterion = sslfast.NegativeCosineLoss()
        >>> criterion(torch.eye(4), torch.eye(4)).item()
        -1.0
    """

    def __init__(
        self,
        convention: str = "cosine",
        eps: float = rows.EPS,
        gather_distributed: bool = False,
        *,
        diagnostics: bool = False,
    ) -> None:
        super().__init__(eps, gather_distributed, diagnostics)
        _check_options(convention, eps)
        self.convention = convention

    def forward(self, p: Tensor, z: Tensor) -> Tensor | tuple[Tensor, CosineDiagnostics]:
        """The loss of predictions and targets, each [N, D]; both are differentiated."""
        loss = _negative_cosine(p, z, self.convention, self.eps, scope_of(self.gather_distributed))
        return self.diagnosed(loss, (p,), (z,))

    def extra_repr(self) -> str:
        return f"convention={self.convention!r}, {super().extra_repr()}"


class _SymmetricLoss(_CosineLoss):
    """Of predictions and targets of both views."""

    def __init__(self, eps: float = rows.EPS, gather_distributed: bool = False, *, diagnostics: bool = False) -> None:
        super().__init__(eps, gather_distributed, diagnostics)
        _check_options("cosine", eps)


class BYOLLoss(_SymmetricLoss):
    """The module form of :func:`byol`.

    Args:
        eps, gather_distributed: as :func:`byol`.
        diagnostics: return ``(loss, CosineDiagnostics)``, means over both directions.

    Shapes:
        ``p_a``, ``p_b``, ``z_a``, ``z_b``: [N, D]; output: [], or ``(loss, diagnostics)``.

    Raises:
        As :func:`byol`.

    Example:
        >>> p, z = torch.randn(8, 4), torch.randn(8, 4)
        >>> sslfast.BYOLLoss()(p, p, z, z).shape
        torch.Size([])
    """

    def forward(self, p_a: Tensor, p_b: Tensor, z_a: Tensor, z_b: Tensor) -> Tensor | tuple[Tensor, CosineDiagnostics]:
        """The loss of the online network's predictions and the target network's projections of both views."""
        loss = byol(p_a, p_b, z_a, z_b, eps=self.eps, gather_distributed=self.gather_distributed)
        return self.diagnosed(loss, (p_a, p_b), (z_b, z_a))


class SimSiamLoss(_SymmetricLoss):
    """The module form of :func:`sim_siam`.

    Args:
        eps, gather_distributed: as :func:`sim_siam`.
        diagnostics: return ``(loss, CosineDiagnostics)``, means over both directions: a ``channel_std`` that goes to 0
            is a collapse.

    Shapes:
        ``p_a``, ``p_b``, ``z_a``, ``z_b``: [N, D]; output: [], or ``(loss, diagnostics)``.

    Raises:
        As :func:`sim_siam`.

    Example:
        >>> p, z = torch.randn(8, 4), torch.randn(8, 4)
        >>> sslfast.SimSiamLoss()(p, p, z, z).shape
        torch.Size([])
    """

    def forward(self, p_a: Tensor, p_b: Tensor, z_a: Tensor, z_b: Tensor) -> Tensor | tuple[Tensor, CosineDiagnostics]:
        """The loss of predictions and projections of both views."""
        loss = sim_siam(p_a, p_b, z_a, z_b, eps=self.eps, gather_distributed=self.gather_distributed)
        return self.diagnosed(loss, (p_a, p_b), (z_b, z_a))
