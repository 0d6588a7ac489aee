"""Alignment and uniformity on the hypersphere; uniformity as a log-sum-exp of row LSEs, without the N × N distances."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..._checks import accumulator, check_matrix, is_real, plain, readable, scalar_tensor
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...distributed.scope import Scope
from ...ops.l2_normalize import l2_normalize
from ...ops.types import Pairs
from .._inputs import check_gather, expect_unit_rows, two_views


def _positive(name: str, value: float) -> float:
    if not is_real(value) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return plain(value)


@over_ranks()
def alignment(
    x: Tensor,
    y: Tensor,
    alpha: float = 2.0,
    *,
    normalize: bool = False,
    gather_distributed: bool = False,
) -> Tensor:
    """Mean distance of the positive pairs, ``(1/N) Σ_i ‖x_i − y_i‖₂^α``.

    Args:
        x, y: [N, D], row ``i`` of each a view of sample ``i``; float32, float64, bfloat16 or float16.
        alpha: α, positive. Below 1 the gradient is NaN where two rows are equal, as PyTorch's.
        normalize: divide each row by its norm first (16-bit rows are rounded again).
        gather_distributed: weight the rank's sum so that the mean over ranks is the mean over all rows, for uneven
            batches too; ``False``: the mean over this rank's rows.

    Returns:
        [] float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: x and y are not matrices of the same shape, dtype and device; α is not positive.

    Source: Wang & Isola 2020, "Understanding Contrastive Representation Learning through Alignment and Uniformity on
    the Hypersphere", equation 8.

    Example:
        >>> sslfast.alignment(torch.eye(4), torch.zeros(4, 4)).item()
        1.0
    """
    x, y = two_views("x", x, "y", y, normalize)
    alpha = _positive("alpha", alpha)
    if not normalize:
        expect_unit_rows("alignment", "normalize=True", x=x, y=y)
    return _alignment(scope_of(gather_distributed), x, y, alpha)


def _alignment(scope: Scope, x: Tensor, y: Tensor, alpha: float) -> Tensor:
    kind = accumulator(x)
    distance = torch.linalg.vector_norm(x.to(kind) - y.to(kind), dim=1)  # [N]
    return scope.shard(x).weight * distance.pow(alpha).sum()


@over_ranks()
def uniformity(
    x: Tensor,
    t: float = 2.0,
    *,
    normalize: bool = False,
    gather_distributed: bool = False,
    strategy: str = "gather",
) -> Tensor:
    """Logarithm of the mean Gaussian potential of all pairs, ``log mean_{i<j} exp(−t‖x_i − x_j‖²)``.

    Args:
        x: [N, D], N ≥ 2; float32, float64, bfloat16 or float16.
        t: positive.
        normalize: divide each row by its norm first (16-bit rows are rounded again); a row of zeros stays one.
            On a CPU unit rows need half of the work.
            ``False``: rows of any norm, as they are; what rounding does to ``‖x_i‖² + ‖x_j‖² − 2 x_i·x_j`` grows with
            the norms.
        gather_distributed: the pairs among the rows of all ranks; ``False``: this rank's alone.
        strategy: how, ``"gather"`` or ``"ring"``.

    Returns:
        [] float32 (float64 for float64 inputs). Over several ranks every rank returns the global value.

    Raises:
        TypeError, ValueError: x is not a floating-point matrix, has fewer than two rows (of all ranks together); t is
            not positive.

    Source: Wang & Isola 2020, equation 9.

    Example:
        >>> round(sslfast.uniformity(torch.eye(4), t=2.0).item(), 4)  # all pairs at distance √2
        -4.0
    """
    check_matrix("x", x)
    t = _positive("t", t)
    if not normalize:
        expect_unit_rows("uniformity", "normalize=True", x=x)
    return _uniformity(
        scope_of(gather_distributed, strategy), l2_normalize(x) if normalize else x, t, normalized=normalize
    )


def _are_unit(scope: Scope, squares: Tensor) -> bool:
    """Normalised rows of these squared norms hold no row of zeros; ``False``, too, where looking would cost something.

    That is on a GPU, which would be waited for, in a graph, and over ranks, where all would have to choose alike.
    """
    looks = type(scope) is Scope and readable(squares)
    return looks and bool((squares.detach() > 0.99).all())  # 16-bit rows are of norm 1 within 2⁻⁸


def _uniformity(scope: Scope, x: Tensor, t: float, *, normalized: bool) -> Tensor:
    shard = scope.shard(x)
    if shard.total < 2:
        raise ValueError(f"uniformity needs at least two rows, got {shard.total}")
    pairs = Pairs(x, None, scalar_tensor("t", 2 * t, x), row_ids=shard.ids(x.device))
    # −t‖x_i − x_j‖² = 2t x_i·x_j − t‖x_i‖² − t‖x_j‖². Normalised rows have norms too: one of zeros keeps its zero.
    squares = x.to(accumulator(x)).square().sum(1)  # [N]
    if normalized and _are_unit(scope, squares):  # without a bias the tiles are symmetric: half of the work
        row = scope.terms(pairs).row_lse - 2 * t
    else:
        size = -t * squares
        row = scope.terms(pairs._replace(bias=size)).row_lse + size
    # The log of a sum over ranks, relative to the largest row of all: every rank has the global value, and the gradient
    # that total() sums over W ranks is what DDP's mean divides by W.
    largest = scope.gather(row.detach().amax(0, keepdim=True)).amax()
    total = scope.total((row - largest).exp().sum())
    return largest + total.log() - math.log(shard.total * (shard.total - 1))


@over_ranks()
def hypersphere(
    z_a: Tensor,
    z_b: Tensor,
    t: float = 1.0,
    lam: float = 1.0,
    alpha: float = 2.0,
    *,
    gather_distributed: bool = False,
    strategy: str = "gather",
) -> Tensor:
    """Alignment plus uniformity of two views, rows normalised: ``align(a, b) + λ·(uniform(a) + uniform(b))/2``.

    Args:
        z_a, z_b: [N, D], N ≥ 2, row ``i`` of each a view of sample ``i``; float32, float64, bfloat16 or float16.
        t: of the Gaussian potential, positive.
        lam: λ, weight of the uniformity.
        alpha: power of the distance in the alignment, positive.
        gather_distributed: over the rows of all ranks; ``False``: this rank's alone.
        strategy: how, ``"gather"`` or ``"ring"``.

    Returns:
        [] float32 (float64 for float64 inputs). Over several ranks the mean of their values is the loss of the global
        batch.

    Raises:
        TypeError, ValueError: as :func:`alignment` and :func:`uniformity`.

    Source: Wang & Isola 2020, equations 8 and 9, combined as in figure 6.

    Example:
        >>> round(sslfast.hypersphere(torch.eye(4), torch.eye(4)).item(), 4)
        -2.0
    """
    t = _positive("t", t)
    alpha = _positive("alpha", alpha)
    x, y = two_views("z_a", z_a, "z_b", z_b, normalize=True)
    scope = scope_of(gather_distributed, strategy)
    spread = _uniformity(scope, x, t, normalized=True) + _uniformity(scope, y, t, normalized=True)
    return _alignment(scope, x, y, alpha) + lam / 2 * spread


class HypersphereLoss(nn.Module):
    """The module form of :func:`hypersphere`, with the constructor of lightly 1.6.0's class.

    Args:
        t: of the Gaussian potential, positive (default 1).
        lam: weight of the uniformity (default 1).
        alpha: power of the distance in the alignment, positive (default 2).
        gather_distributed: over the rows of all ranks (default: this rank's alone).
        strategy: ``"gather"`` (default) or ``"ring"``.

    Shapes:
        ``z_a``, ``z_b``: [N, D], normalised inside; output: [].

    Raises:
        ValueError: t or alpha is not positive; see also :func:`hypersphere`.

    Example:
        >>> criterion = sslfast.HypersphereLoss()
        >>> round(criterion(torch.eye(4), torch.eye(4)).item(), 4)
        -2.0
    """

    def __init__(
        self,
        t: float = 1.0,
        lam: float = 1.0,
        alpha: float = 2.0,
        gather_distributed: bool = False,
        *,
        strategy: str = "gather",
    ) -> None:
        super().__init__()
        check_gather(gather_distributed, strategy)
        t = _positive("t", t)
        alpha = _positive("alpha", alpha)
        self.t = t
        self.lam = lam
        self.alpha = alpha
        self.gather_distributed = gather_distributed
        self.strategy = strategy

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss of two views, each [N, D]."""
        return hypersphere(
            z_a,
            z_b,
            self.t,
            self.lam,
            self.alpha,
            gather_distributed=self.gather_distributed,
            strategy=self.strategy,
        )

    def extra_repr(self) -> str:
        return (
            f"t={self.t}, lam={self.lam}, alpha={self.alpha}, "
            f"gather_distributed={self.gather_distributed}, strategy={self.strategy!r}"
        )
