"""EMP-SSL: the coding rate of every view, from the smaller of its two Gram matrices, and every view close to the mean.

    det(I_D + c ZᵀZ) = det(I_N + c Z Zᵀ)

so that no matrix is larger than min(N, D) on a side. One Cholesky factor gives the value and the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import _library
from ..._checks import accumulator, is_real, plain, without_autocast
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...distributed.scope import Scope
from ...ops.negative_cosine import negative_cosine
from .._inputs import check_gather
from ._views import checked_views
from .vicreg import check_choice

# Of the coding rate in the loss.
CONVENTIONS = {"lightly": 1.0, "paper": -1.0}


class _Gram(torch.autograd.Function):
    """``X Xᵀ`` [..., n, n] in float64, where the products of float32 numbers are exact; one product backward.

    That one too: of ``(I + c Z Zᵀ)⁻¹ Z`` what lies along large directions cancels.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        wide = x.double()
        return wide @ wide.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor]:
        (x,) = ctx.saved_tensors
        with without_autocast(x):
            return (((grad + grad.mT) @ x.double()).to(x.dtype),)


class _LogDeterminant(torch.autograd.Function):
    """``log det(I + c G)`` [V] of symmetric positive semidefinite G [V, m, m]; its gradient is ``c (I + c G)⁻¹``.

    NaN where ``I + c G`` is not positive definite: where G is not finite, or c G so large that I is lost in rounding.
    """

    @staticmethod
    def forward(ctx: Any, gram: Tensor, c: float) -> Tensor:
        factor, info = torch.linalg.cholesky_ex(_with_identity(gram, c))
        factor = factor.masked_fill((info != 0)[:, None, None], math.nan)
        ctx.save_for_backward(gram, factor)
        ctx.c = c
        return 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        gram, factor = ctx.saved_tensors
        if torch.is_grad_enabled():
            inverse = torch.linalg.inv(_with_identity(gram, ctx.c))
        else:
            inverse = torch.cholesky_inverse(factor)
        return (ctx.c * grad)[:, None, None] * inverse, None


def _with_identity(gram: Tensor, c: float) -> Tensor:
    return c * gram + torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def _gram(x: Tensor) -> Tensor:
    if _library.in_forward_mode():
        return x.double() @ x.double().mT
    gram: Tensor = _Gram.apply(x)  # type: ignore[no-untyped-call]
    return gram


def _log_determinants(gram: Tensor, c: float) -> Tensor:
    if _library.in_forward_mode():
        return torch.logdet(_with_identity(gram, c))
    values: Tensor = _LogDeterminant.apply(gram, c)  # type: ignore[no-untyped-call]
    return values


@over_ranks()
def emp_ssl(
    z_views: Sequence[Tensor],
    tcr_eps: float = 0.2,
    inv_coef: float = 200.0,
    *,
    convention: str = "lightly",
    gather_distributed: bool = False,
) -> Tensor:
    """EMP-SSL: the total coding rate of each view's embeddings, and each view's similarity to the mean of all.

        rate = (1/2V) Σ_v log det(I + D/(N·ε) Z_vᵀ Z_v)
        loss = ± rate − (λ/(V·N)) Σ_vn cos(z_vn, (1/V) Σ_u z_un)

    The determinant is that of the smaller of Z_vᵀZ_v [D, D] and Z_v Z_vᵀ [N, N], by a Cholesky factor in float64.

    | convention | the rate |
    |---|---|
    | "lightly" (default) | added, as lightly 1.6.0 does: training lowers it, towards embeddings that are all the same |
    | "paper" | subtracted, as in the paper and the authors' code: training raises it |

    Args:
        z_views: V ≥ 2 views, each [N, D], row ``i`` of all from sample ``i``; float32, float64, bfloat16 or float16.
            As they are: the authors' projector normalises its rows.
        tcr_eps: ε, positive (default 0.2), the paper's ε².
        inv_coef: λ (default 200).
        convention: see above.
        gather_distributed: the rate is of the rows of all ranks; ``False``: of this rank's alone.

    Returns:
        [] float32 (float64 for float64 inputs); NaN where the norms of the rows are so large that the identity is lost
        beside them in float64. Over several ranks the mean of their values is the loss of the global batch.

    Raises:
        TypeError, ValueError: fewer than two views, or they are not matrices of the same shape, dtype and device;
            tcr_eps is not positive and finite; inv_coef is not finite; ``convention`` is neither of the two.

    Source: Tong et al. 2023, "EMP-SSL: Towards Self-Supervised Learning in One Training Epoch", section 3; value and
    gradient of lightly 1.6.0's ``EMPSSLLoss``, or of the authors' code.

    Example:
        >>> views = [torch.eye(4), torch.eye(4)]
        >>> round(sslfast.emp_ssl(views, tcr_eps=1.0, convention="paper").item(), 4)  # −½ · 4 log 2 − 200
        -201.3863
    """
    sign = _checked_sign(tcr_eps, inv_coef, convention)
    views = checked_views(z_views)
    scope = scope_of(gather_distributed)
    with without_autocast(views[0]):
        z = torch.stack(views, 1)  # [n, V, D]
        z = z.to(accumulator(z))
        shard = scope.shard(z)
        rate = 0.5 * sign * _log_determinants(*_smaller_gram(scope, z, shard.total, plain(tcr_eps))).mean()
        similarities = negative_cosine(z.flatten(0, 1), z.mean(1, keepdim=True).expand_as(z).flatten(0, 1))
        return torch.add(rate.to(z.dtype), similarities, alpha=plain(inv_coef) * shard.weight / len(views))


def _smaller_gram(scope: Scope, z: Tensor, rows: int, eps: float) -> tuple[Tensor, float]:
    """Z Zᵀ [V, N, N] or ZᵀZ [V, D, D] of the ``rows`` of the whole scope, and what it is multiplied by."""
    d = z.shape[2]
    c = d / (rows * eps)
    if rows <= d:
        return _gram(scope.gather(z).transpose(0, 1)), c
    return scope.total(_gram(z.permute(1, 2, 0))), c


def _checked_sign(tcr_eps: float, inv_coef: float, convention: str) -> float:
    """Of the rate in the loss."""
    if not is_real(tcr_eps) or not 0 < tcr_eps < math.inf:
        raise ValueError(f"tcr_eps must be a positive finite number, got {tcr_eps!r}")
    if not is_real(inv_coef) or not math.isfinite(inv_coef):
        raise ValueError(f"inv_coef must be a finite number, got {inv_coef!r}")
    check_choice("convention", convention, tuple(CONVENTIONS))
    return CONVENTIONS[convention]


class EMPSSLLoss(nn.Module):
    """The module form of :func:`emp_ssl`, with the constructor and ``forward`` of lightly 1.6.0's class.

    Args:
        tcr_eps, inv_coef, convention, gather_distributed: as :func:`emp_ssl`.

    Shapes:
        ``z_views``: a list of V ≥ 2 views [N, D]; output: [].

    Raises:
        As :func:`emp_ssl`.

    Example:
        >>> criterion = sslfast.EMPSSLLoss(tcr_eps=1.0, convention="paper")
        >>> round(criterion([torch.eye(4), torch.eye(4)]).item(), 4)
        -201.3863
    """

    def __init__(
        self,
        tcr_eps: float = 0.2,
        inv_coef: float = 200.0,
        *,
        convention: str = "lightly",
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        _checked_sign(tcr_eps, inv_coef, convention)
        check_gather(gather_distributed)
        self.tcr_eps = tcr_eps
        self.inv_coef = inv_coef
        self.convention = convention
        self.gather_distributed = gather_distributed

    def forward(self, z_views: list[Tensor]) -> Tensor:
        """The loss of V views, each [N, D]."""
        return emp_ssl(
            z_views,
            self.tcr_eps,
            self.inv_coef,
            convention=self.convention,
            gather_distributed=self.gather_distributed,
        )

    def extra_repr(self) -> str:
        return (
            f"tcr_eps={self.tcr_eps}, inv_coef={self.inv_coef}, convention={self.convention!r}, "
            f"gather_distributed={self.gather_distributed}"
        )
