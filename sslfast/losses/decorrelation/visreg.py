"""VISReg: centre, scale and shape of the embeddings, the shape by sorted projections on random directions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import _library
from ..._checks import accumulator, without_autocast
from ..._random.key import seed_of
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...distributed.scope import Scope
from ...ops.unit_slices import MOST_FEATURES
from .._inputs import check_gather
from .le_jepa import all_views, check_weight, view_invariance
from .sigreg import check_count, check_slices, slices_of
from .vicreg import check_eps, check_two_rows


class VISRegComponents(NamedTuple):
    """The terms of :func:`visreg`, [] each.

    Attributes:
        total: the loss.
        pred: the invariance.
        scale: mean of (1 − σ)² over features and views.
        shape: mean squared distance of sorted projections from the quantiles of a normal distribution.
        center: mean of μ².

    Example:
        >>> components = sslfast.VISRegLoss(num_slices=64).forward_components(global_proj=torch.randn(2, 64, 8))
        >>> components._fields
        ('total', 'pred', 'scale', 'shape', 'center')
    """

    total: Tensor
    pred: Tensor
    scale: Tensor
    shape: Tensor
    center: Tensor


@_library.kept_on_device
def _quantiles(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Φ⁻¹(i/(N + 1)), i = 1 … N, as a column."""
    positions = torch.arange(1, rows + 1, dtype=torch.float64) / (rows + 1)
    return torch.special.ndtri(positions).unsqueeze(1).to(device, dtype)


def _check(num_slices: int, weights: dict[str, float], lambda_param: float, eps: float) -> None:
    check_weight("lambda_param", lambda_param)
    for name, value in weights.items():
        check_weight(name, value, None)
    check_count(num_slices, "num_slices")
    check_eps(eps)


@over_ranks()
def visreg(
    global_proj: Tensor,
    local_proj: Tensor | None = None,
    lambda_param: float = 0.9,
    *,
    lambda_scale: float = 1.0,
    lambda_shape: float = 1.0,
    lambda_center: float = 1.0,
    num_slices: int = 4096,
    slices: Tensor | None = None,
    step: int | Tensor = 0,
    seed: int = 0,
    gather_distributed: bool = False,
    eps: float = 1e-4,
) -> Tensor:
    """Invariance of views, and three terms that make each view's columns centred, of deviation 1 and jointly normal.

        μ, σ of every view's columns (σ biased);   ẑ = (z − μ)/(sg(σ) + ε);   a unit directions
        center = mean μ²,   scale = mean (1 − σ)²,   shape = mean (sort(ẑ·a) − Φ⁻¹(i/(N + 1)))²
        loss   = (1 − λ)·invariance + λ·(λ_scale·scale + λ_shape·shape + λ_center·center)

    with the invariance of :func:`sslfast.le_jepa`. Time and memory are those of PyTorch's sort of [V, N, S].

    Args:
        global_proj, local_proj: [V, N, D] and [V′, N, D] or ``None``, N ≥ 2, as :func:`sslfast.le_jepa`.
        lambda_param: λ (default 0.9), from 0 to 1.
        lambda_scale, lambda_shape, lambda_center: weights of the terms (default 1).
        num_slices: S, how many random directions (default 4096).
        slices, step, seed: as :func:`sslfast.sigreg`. Without ``gather_distributed`` a seed of each rank gives every
            rank directions of its own, as in the paper.
        gather_distributed: the three terms are of the rows of all ranks; ``False``: of this rank's alone.
        eps: ε, added to the deviations (default 1e-4); positive.

    Returns:
        [] float32 (float64 for float64 inputs). Over several ranks the mean of the losses is that of the global batch.

    Raises:
        TypeError: the views are not floating point, or differ in dtype.
        ValueError: shapes or devices do not fit; fewer than two rows; a number is out of its range; slices require a
            gradient.

    Source: Wu et al. 2026, "VISReg" (arXiv 2606.02572), algorithm 1; value as lightly 1.6.0's ``VISRegLoss``.

    Example:
        >>> z = torch.randn(2, 256, 16, generator=torch.Generator().manual_seed(0))
        >>> sslfast.visreg(z, num_slices=256).item() < sslfast.visreg(0.1 * z, num_slices=256).item()
        True
    """
    weights = {"lambda_scale": lambda_scale, "lambda_shape": lambda_shape, "lambda_center": lambda_center}
    _check(num_slices, weights, lambda_param, eps)
    proj, global_views = all_views(global_proj, local_proj)
    given = _Slices(slices, step, seed_of(seed), num_slices)
    given.check(proj)
    return _components(scope_of(gather_distributed), proj, global_views, lambda_param, weights, given, eps).total


class _Slices(NamedTuple):
    """Directions that are given, or what they are drawn by."""

    slices: Tensor | None
    step: int | Tensor
    seed: int
    num_slices: int

    def check(self, proj: Tensor) -> None:
        if self.slices is not None:
            check_slices(self.slices, proj, "global_proj")
        elif proj.shape[2] > MOST_FEATURES:
            raise ValueError(f"global_proj may have up to 2^18 features unless slices are given, got {proj.shape[2]}")


def _components(
    scope: Scope,
    proj: Tensor,
    global_views: int,
    lambda_param: float,
    weights: dict[str, float],
    given: _Slices,
    eps: float,
) -> VISRegComponents:
    traits = {
        "whether slices are given": given.slices is not None,
        "how many slices": given.num_slices if given.slices is None else given.slices.shape[1],
        "the seed": given.seed,
    }
    shard = scope.shard(proj.transpose(0, 1), traits)
    check_two_rows("global_proj", shard.total)
    slices = slices_of(proj, given.slices, given.step, given.seed, given.num_slices, scope)
    pred = shard.weight / (proj.shape[0] * proj.shape[2]) * view_invariance(proj, global_views)
    with without_autocast(proj):
        z = scope.gather(proj.transpose(0, 1)).transpose(0, 1).to(accumulator(proj))  # [V, N, D] of all ranks
        mean = z.mean(1, keepdim=True)
        centred = z - mean
        std = z.std(1, correction=0, keepdim=True)
        projected = (centred / (std.detach() + eps)) @ slices  # [V, N, S]
        shape = (projected.sort(1).values - _quantiles(z.shape[1], z.dtype, z.device)).square().mean()
        scale, center = (1 - std).square().mean(), mean.square().mean()
        regularizer = (
            weights["lambda_scale"] * scale + weights["lambda_shape"] * shape + weights["lambda_center"] * center
        )
        total = (1 - lambda_param) * pred + lambda_param * regularizer
    return VISRegComponents(total, pred, scale, shape, center)


class VISRegLoss(nn.Module):
    """:func:`visreg` with a counter of its steps, and the constructor and methods of lightly 1.6.0's class.

    The counter ``global_step`` [] is a buffer and part of the ``state_dict``: :class:`sslfast.SIGReg`.

    Args:
        lambda_param, num_slices, lambda_scale, lambda_shape, lambda_center, gather_distributed, eps, seed: as
            :func:`visreg`.

    Shapes:
        ``local_proj``: [V′, N, D] or ``None``; ``global_proj``: [V, N, D]; output: [].

    Raises:
        As :func:`visreg`.

    Example:
        >>> criterion = sslfast.VISRegLoss(num_slices=64)
        >>> criterion(local_proj=torch.randn(6, 8, 16), global_proj=torch.randn(2, 8, 16)).shape
        torch.Size([])
    """

    global_step: Tensor

    def __init__(
        self,
        lambda_param: float = 0.9,
        num_slices: int = 4096,
        lambda_scale: float = 1.0,
        lambda_shape: float = 1.0,
        lambda_center: float = 1.0,
        gather_distributed: bool = False,
        eps: float = 1e-4,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_gather(gather_distributed)
        self.lambda_param = lambda_param
        self.num_slices = num_slices
        self.lambda_scale = lambda_scale
        self.lambda_shape = lambda_shape
        self.lambda_center = lambda_center
        self.gather_distributed = gather_distributed
        self.eps = eps
        self.seed = seed_of(seed)
        _check(num_slices, self._weights(), lambda_param, eps)
        self.register_buffer("global_step", torch.zeros((), dtype=torch.int64))

    def _weights(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("lambda_scale", "lambda_shape", "lambda_center")}

    def forward(self, *, local_proj: Tensor | None = None, global_proj: Tensor) -> Tensor:
        """The loss of local and global views, [V, N, D] each."""
        return self.forward_components(local_proj=local_proj, global_proj=global_proj).total

    @over_ranks()
    def forward_components(self, *, local_proj: Tensor | None = None, global_proj: Tensor) -> VISRegComponents:
        """The loss and its terms."""
        proj, global_views = all_views(global_proj, local_proj)
        given = _Slices(None, self.global_step, self.seed, self.num_slices)
        given.check(proj)
        scope = scope_of(self.gather_distributed)
        found = _components(scope, proj, global_views, self.lambda_param, self._weights(), given, self.eps)
        with torch.no_grad():
            self.global_step.add_(1)
        return found

    def extra_repr(self) -> str:
        return (
            f"lambda_param={self.lambda_param}, num_slices={self.num_slices}, lambda_scale={self.lambda_scale}, "
            f"lambda_shape={self.lambda_shape}, lambda_center={self.lambda_center}, "
            f"gather_distributed={self.gather_distributed}, eps={self.eps}, seed={self.seed}"
        )
