"""Model-aware contrastive loss: NT-Xent whose temperature follows the alignment, and whose hard rows weigh more."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._checks import check_share
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...distributed.scope import Scope
from ...ops.types import Pairs, Want
from .._inputs import two_views
from ._inputs import ContrastiveLoss, inverse, row_dots
from .diagnostics import Diagnosed, Diagnostics, diagnostics_of, with_diagnostics

EPS = 1e-8  # in the weights' denominator, as lightly's


class Alignment(NamedTuple):
    """How the temperature follows the mean similarity A of the positives: ``τ = τ₀·(1 + α(A − A₀))``."""

    alpha: float
    threshold: float  # A₀

    def check(self) -> None:
        check_share("alpha", self.alpha)
        check_share("A_0", self.threshold)


def macl(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    alpha: float = 0.5,
    A_0: float = 0.0,
    normalize: bool = True,
    gather_distributed: bool = False,
    strategy: str = "gather",
) -> Tensor:
    """Model-aware contrastive loss (MACL) of two views, mean over the 2N rows.

        A = mean_i z_i·z_p,   τ = τ₀·(1 + α(A − A₀))
        P_i = exp(s_ip) / Σ_{j≠i} exp(s_ij),        s_ij = z_i·z_j / τ,   z = [z0; z1]
        ℓ_i = −log P_i / (1 − P_i + 1e-8)

    ``p`` is the other view of row ``i``. ``A`` and the weight ``1/(1 − P_i + 1e-8)`` are constants of the step: no
    gradient flows through them. The rows against themselves use the symmetry, and no matrix is stored.

    Args:
        z0, z1: [N, D] each, row ``i`` of both a view of image ``i``; float32, float64, bfloat16 or float16. With one
            image there is nothing to contrast, and the loss is 0.
        temperature: τ₀, finite and not zero (default 0.1); or a one-element tensor, which receives its gradient.
        alpha: α, how much the temperature follows, 0 (not at all) to 1 (default 0.5).
        A_0: A₀, the alignment at which the temperature is τ₀, 0 (default) to 1. With α = 1 a τ of 0 is possible, at
            A = A₀ − 1; the loss is not finite there.
        normalize: divide each row by its norm first (default).
        gather_distributed: negatives of all ranks, and A over all of them; ``False``: this rank's.
        strategy: how, ``"gather"`` or ``"ring"``.

    Returns:
        [] float32 (float64 for float64 inputs). Over several ranks the mean of their values
        is the loss of the global batch.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices differ, the temperature is zero or not finite, alpha or A_0 is
            not between 0 and 1.

    Source: Huang et al. 2023, "Model-Aware Contrastive Learning: Towards Escaping the Dilemmas"; value as lightly
    1.6.0's ``MACLLoss``, which takes no negatives of other ranks.

    Example:
        >>> loss = sslfast.macl(torch.eye(4), torch.eye(4), temperature=0.5)
        >>> round(loss.item(), 4)
        1.5481
    """
    follows = Alignment(alpha, A_0)
    return _macl(z0, z1, temperature, follows, normalize, scope_of(gather_distributed, strategy))[0]


@over_ranks("temperature")
def _macl(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor,
    follows: Alignment,
    normalize: bool,
    scope: Scope,
    diagnostics: bool = False,
) -> Diagnosed:
    follows.check()
    z0, z1 = two_views("z0", z0, "z1", z1, normalize)
    initial = inverse(temperature, z0)
    z = torch.cat([z0, z1])  # [2n, D]
    shard = scope.shard(z)
    alignment = scope.total(2 * row_dots(z0.detach(), z1.detach().unsqueeze(1)).sum()) / shard.total
    scale = initial / (1 + follows.alpha * (alignment - follows.threshold))
    ids = shard.ids(z.device)
    pairs = Pairs(z, None, scale, row_ids=ids, positives=ids.roll(z0.shape[0]))
    terms = scope.terms(pairs, Want(hardest=diagnostics))
    assert terms.positive is not None
    surprise = terms.row_lse - terms.positive  # −log P
    weights = 1 / (EPS - torch.expm1(-surprise.detach()))
    loss = shard.weight * (weights * surprise).sum()
    return loss, diagnostics_of(terms, scale, shard.local * (shard.total - 1)) if diagnostics else None


class MACLLoss(ContrastiveLoss):
    """The module form of :func:`macl`, with the constructor of lightly 1.6.0's class.

    Args:
        temperature, alpha, A_0, gather_distributed, strategy, diagnostics: as :func:`macl`; a temperature that is a
            tensor or ``nn.Parameter`` moves with the module.

    Shapes:
        ``z0``, ``z1``: [N, D], normalised here; output: [], or ``(loss, diagnostics)``.

    Raises:
        As :func:`macl`.

    Example:
        >>> criterion = sslfast.MACLLoss(temperature=0.5)
        >>> round(criterion(torch.eye(4), torch.eye(4)).item(), 4)
        1.5481
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        alpha: float = 0.5,
        A_0: float = 0.0,
        *,
        gather_distributed: bool = False,
        strategy: str = "gather",
        diagnostics: bool = False,
    ) -> None:
        super().__init__(temperature, gather_distributed, strategy, diagnostics)
        Alignment(alpha, A_0).check()
        self.alpha = alpha
        self.A_0 = A_0

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor | tuple[Tensor, Diagnostics]:
        """The loss of two views, each [N, D]."""
        follows = Alignment(self.alpha, self.A_0)
        return with_diagnostics(_macl(z0, z1, self.temperature, follows, True, self.scope(), self.diagnostics))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha}, A_0={self.A_0}"
