"""TiCo: invariance of pairs, and contrast with a moving average of second moments; one D × D product a row each way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ... import _library
from ..._checks import accumulator, check_matrix, without_autocast
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...ops.l2_normalize import l2_normalize
from .._inputs import check_gather, two_views


class _QuadraticForms(torch.autograd.Function):
    """``Σ_i x_i·C x_i`` for a symmetric C [D, D] without gradient: the product ``x C`` is also half of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor) -> Tensor:
        product = x @ c  # [N, D]
        ctx.save_for_backward(x, c, product)
        return torch.vdot(product.flatten(), x.flatten())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, c, product = ctx.saved_tensors
        if torch.is_grad_enabled() and x.requires_grad:  # create_graph=True: the product needs a graph of its own
            product = x @ c
        return 2 * grad * product, None


@over_ranks()
def tico(
    z_a: Tensor,
    z_b: Tensor,
    covariance: Tensor | None = None,
    beta: float = 0.9,
    rho: float = 8.0,
    *,
    gather_distributed: bool = False,
) -> tuple[Tensor, Tensor]:
    """The loss of two views given the second moments so far, and the second moments with this batch.

        C    = β·covariance + (1 − β)·(1/N) Σ_i a_i a_iᵀ        (no gradient)
        loss = 1 − (1/N) Σ_i a_i·b_i + (ρ/N) Σ_i a_i·C a_i

    ``a_i``, ``b_i`` are the rows of ``z_a`` and ``z_b`` divided by their norms.

    Args:
        z_a, z_b: [N, D], N ≥ 2, row ``i`` of each a view of sample ``i``; float32, float64, bfloat16 or float16.
        covariance: [D, D], symmetric; ``None``: zero.
        beta: β, how much of the moments so far is kept (default 0.9).
        rho: ρ, weight of the contrast (default 8).
        gather_distributed: moments of the rows of all ranks; ``False``: of this rank's alone.

    Returns:
        ``(loss, C)``: [] and [D, D], float32 (float64 for float64 inputs). Over several ranks the mean of the losses is
        the loss of the global batch, and C is the same on all.

    Raises:
        TypeError, ValueError: z_a and z_b are not matrices of the same shape, dtype and device; fewer than two rows (of
            all ranks together); covariance is not a [D, D] tensor of floating-point numbers on their device.

    Source: Zhu et al. 2022, "TiCo: Transformation Invariance and Covariance Contrast for Self-Supervised Visual
    Representation Learning", algorithm 1; value as lightly 1.6.0's ``TiCoLoss``.

    Example:
        >>> loss, covariance = sslfast.tico(torch.eye(4), torch.eye(4))
        >>> loss, covariance = sslfast.tico(torch.eye(4), torch.eye(4), covariance)  # the next batch
        >>> round(loss.item(), 4)
        0.38
    """
    z_a, z_b = two_views("z_a", z_a, "z_b", z_b, normalize=False)
    if covariance is not None:
        _check_covariance(covariance, z_a)
    scope = scope_of(gather_distributed)
    shard = scope.shard(z_a)
    if shard.total < 2:
        raise ValueError(f"tico needs at least two rows, got {shard.total}")
    kind = accumulator(z_a)
    with without_autocast(z_a):
        a, b = l2_normalize(z_a.to(kind)), l2_normalize(z_b.to(kind))
        rows = a.detach()
        moment = scope.total(rows.T @ rows)  # [D, D], of all rows
        if covariance is None:
            c = (1 - beta) / shard.total * moment
        else:
            c = torch.add(beta * covariance.detach().to(kind), moment, alpha=(1 - beta) / shard.total)
        if _library.in_forward_mode():
            contrast: Tensor = (a @ c * a).sum()
        else:
            contrast = _QuadraticForms.apply(a, c)  # type: ignore[no-untyped-call]
        dots = torch.vdot(a.flatten(), b.flatten())
        return 1.0 - shard.weight * torch.sub(dots, contrast, alpha=rho), c


def _check_covariance(covariance: Tensor, z_a: Tensor) -> None:
    check_matrix("covariance", covariance)
    d = z_a.shape[1]
    if covariance.shape != (d, d):
        raise ValueError(f"covariance must have shape ({d}, {d}) for z_a's {d} features, got {tuple(covariance.shape)}")
    if covariance.device != z_a.device:
        raise ValueError(f"covariance must be on z_a's device {z_a.device}, got {covariance.device}")


class TiCoLoss(nn.Module):
    """:func:`tico` with its moving average ``C``, and the constructor and ``forward`` of lightly 1.6.0's class.

    ``C`` [D, D] is a buffer: unlike lightly's plain attribute it is part of the ``state_dict`` and moves with the
    module. Before the first batch that updates it, it is empty ([0, 0]) and counts as zero.

    Args:
        beta: how much of the moments so far is kept (default 0.9).
        rho: weight of the contrast (default 8).
        gather_distributed: as :func:`tico`.

    Shapes:
        ``z_a``, ``z_b``: [N, D], normalised inside; output: [].

    Raises:
        As :func:`tico`.

    Example:
        >>> criterion = sslfast.TiCoLoss(beta=0.9, rho=8.0)
        >>> round(criterion(torch.eye(4), torch.eye(4)).item(), 4)
        0.2
    """

    C: Tensor

    def __init__(self, beta: float = 0.9, rho: float = 8.0, gather_distributed: bool = False) -> None:
        super().__init__()
        check_gather(gather_distributed)
        self.beta = beta
        self.rho = rho
        self.gather_distributed = gather_distributed
        self.register_buffer("C", torch.zeros(0, 0))

    def forward(self, z_a: Tensor, z_b: Tensor, update_covariance_matrix: bool = True) -> Tensor:
        """The loss of two views, each [N, D]; the moving average takes in ``z_a`` unless told not to."""
        so_far = self.C if self.C.numel() else None
        loss, c = tico(z_a, z_b, so_far, self.beta, self.rho, gather_distributed=self.gather_distributed)
        if update_covariance_matrix:
            # A tensor made in inference mode takes no update outside it; the tracer cannot ask, and never sees one.
            stale = so_far is not None and not torch.compiler.is_compiling() and so_far.is_inference()
            if so_far is None or stale:
                self.C = c.clone()
            else:
                so_far.copy_(c)
        return loss

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        stored = state_dict.get(prefix + "C")
        if isinstance(stored, Tensor) and stored.shape != self.C.shape:
            self.C = self.C.new_zeros(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, rho={self.rho}, gather_distributed={self.gather_distributed}"
