"""MMCR: nuclear norms of centroids and of each sample's views, from small Gram matrices instead of SVDs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ... import _library
from ..._checks import FLOATS, accumulator, check_same, is_real, plain, without_autocast
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from .._inputs import check_gather, in_one_dtype


class _NoThirdDerivative(torch.autograd.Function):
    """``x``, which depends on the others in ways that autograd cannot see: an error where it would matter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("mmcr has first and second derivatives; its third is not implemented")


class _InverseRoot(torch.autograd.Function):
    """``G^(−1/2)`` of symmetric positive semidefinite G [..., n, n] on its support, and 0 on its null space.

    An eigenvalue within rounding of zero belongs to the null space. With the eigenvalues' roots σ the derivative needs
    no difference of two of them, which ``eigh``'s own divides by:

        d(G^(−1/2)) = U (K ∘ Uᵀ dG U) Uᵀ,   K_ij = −1 / (σ_i σ_j (σ_i + σ_j))
    """

    @staticmethod
    def forward(ctx: Any, gram: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(gram)
        inverse = torch.where(values > _floor(values), values, torch.inf).rsqrt()  # [..., n]: 1/σ, 0 on the null space
        ctx.save_for_backward(gram, inverse, vectors)
        ctx.set_materialize_grads(False)
        return (vectors * inverse.unsqueeze(-2)) @ vectors.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        if grad is None:  # every first derivative
            return None
        gram, inverse, vectors = ctx.saved_tensors
        left, right = inverse.unsqueeze(-1), inverse.unsqueeze(-2)
        # 1/(σ_i σ_j (σ_i + σ_j)) by the inverses r: (r_i r_j)²/(r_i + r_j)
        k = (left * right).square() / (left + right).clamp_min(torch.finfo(left.dtype).tiny)
        derivative = -vectors @ (k * (vectors.mT @ grad @ vectors)) @ vectors.mT
        if torch.is_grad_enabled():
            refusing: Tensor = _NoThirdDerivative.apply(derivative, gram, grad)  # type: ignore[no-untyped-call]
            return refusing
        return derivative


class _RootTrace(torch.autograd.Function):
    """``tr G^(1/2)``, given ``P = G^(−1/2)``: it is ⟨G, P⟩, and its gradient P/2."""

    @staticmethod
    def forward(ctx: Any, gram: Tensor, inverse_root: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_root)
        return (gram * inverse_root).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (inverse_root,) = ctx.saved_tensors
        return grad / 2 * inverse_root, None


def _floor(values: Tensor) -> Tensor:
    """What ascending eigenvalues [..., n] must exceed to differ from zero by more than rounding, [..., 1]."""
    return values.shape[-1] * torch.finfo(values.dtype).eps * values[..., -1:].clamp_min(0)


def _root_trace(gram: Tensor) -> Tensor:
    """Sum of the roots of the eigenvalues of ``gram`` [..., n, n]: of the singular values of X, if that is X Xᵀ."""
    if _library.in_forward_mode():
        values = torch.linalg.eigvalsh(gram)
        support = values > _floor(values)
        return torch.where(support, torch.where(support, values, 1.0).sqrt(), 0.0).sum()
    inverse_root = _InverseRoot.apply(gram)  # type: ignore[no-untyped-call]
    trace: Tensor = _RootTrace.apply(gram, inverse_root)  # type: ignore[no-untyped-call]
    return trace


@over_ranks()
def mmcr(online: Tensor, momentum: Tensor, lmda: float = 5e-3, *, gather_distributed: bool = False) -> Tensor:
    """Spread of the samples' centroids, against the spread of each sample's views.

        loss = −‖C‖_* + (λ/B) Σ_b ‖Z_b‖_*

    ``Z_b`` [2k, D] are the views of sample b in both networks, ``C`` [B, D] their means; ‖·‖_*, the nuclear norm, is
    the sum of the singular values. They are the roots of the eigenvalues of a Gram matrix of the smaller side, in
    float64, where squaring loses nothing that float32 had. Where a matrix does not have full rank the gradient is the
    smallest of the subgradients: zero on the null space.

    Args:
        online, momentum: [B, k, D], k views of each sample; float32, float64, bfloat16 or float16.
        lmda: λ, not negative (default 5e-3).
        gather_distributed: centroids of all ranks; ``False``: this rank's alone.

    Returns:
        [] float32 (float64 for float64 inputs). Over several ranks the mean of their values is the loss of the global
        batch. Twice differentiable; a third derivative is an error.

    Raises:
        TypeError, ValueError: online and momentum are not floating-point tensors [B, k, D] of the same shape, dtype and
            device, or are empty; lmda is negative. LinAlgError: the inputs hold NaN or infinity.

    Source: Yerxa et al. 2023, "Learning Efficient Coding of Natural Images with Maximum Manifold Capacity
    Representations", section 2; value as lightly 1.6.0's ``MMCRLoss``.

    Example:
        >>> views = torch.eye(4).view(4, 1, 4)  # one view of each of four samples
        >>> round(sslfast.mmcr(views, views).item(), 4)
        -3.9929
    """
    _check_lmda(lmda)
    _check_views("online", online)
    _check_views("momentum", momentum)
    first, second = in_one_dtype(online, momentum)
    assert first is not None and second is not None
    check_same("online", first, "momentum", second)
    scope = scope_of(gather_distributed)
    shard = scope.shard(first.flatten(1))
    with without_autocast(first):
        z = torch.cat([first, second], dim=1).double()  # [B, 2k, D]
        views, d = z.shape[1:]
        spread_of_views = _root_trace(z @ z.mT if views <= d else z.mT @ z)
        c = z.mean(1)  # [B, D]
        if shard.total >= d:
            gram = scope.total(c.T @ c)  # [D, D]
        else:
            c = scope.gather(c)
            gram = c @ c.T
        return (plain(lmda) * shard.weight * spread_of_views - _root_trace(gram)).to(accumulator(first))


def _check_lmda(lmda: float) -> None:
    if not is_real(lmda) or not 0 <= lmda < math.inf:
        raise ValueError(f"lmda must be a finite number, zero or more, got {lmda!r}")


def _check_views(name: str, z: Tensor) -> None:
    if not isinstance(z, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(z).__name__}")
    if z.dim() != 3 or z.numel() == 0:
        raise ValueError(f"{name} must have shape [samples, views, features], none of them zero, got {tuple(z.shape)}")
    if z.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {z.dtype}")


class MMCRLoss(nn.Module):
    """The module form of :func:`mmcr`, with the constructor and ``forward`` of lightly 1.6.0's class.

    Args:
        lmda: λ, weight of the views' spread, not negative (default 5e-3).
        gather_distributed: as :func:`mmcr` (default: this rank's centroids alone, as lightly).

    Shapes:
        ``online``, ``momentum``: [B, k, D]; output: [].

    Raises:
        As :func:`mmcr`.

    Example:
        >>> criterion = sslfast.MMCRLoss(lmda=5e-3)
        >>> round(criterion(torch.eye(4).view(4, 1, 4), torch.eye(4).view(4, 1, 4)).item(), 4)
        -3.9929
    """

    def __init__(self, lmda: float = 5e-3, *, gather_distributed: bool = False) -> None:
        super().__init__()
        _check_lmda(lmda)
        check_gather(gather_distributed)
        self.lmda = lmda
        self.gather_distributed = gather_distributed

    def forward(self, online: Tensor, momentum: Tensor) -> Tensor:
        """The loss of k views in each of two networks, [B, k, D] each."""
        return mmcr(online, momentum, self.lmda, gather_distributed=self.gather_distributed)

    def extra_repr(self) -> str:
        return f"lmda={self.lmda}, gather_distributed={self.gather_distributed}"
