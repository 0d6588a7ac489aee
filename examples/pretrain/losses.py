"""The losses in plain PyTorch, as users write them: with the D × D matrix in memory; and any loss over ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.common.measure import Loss
from sslfast.distributed import scope_of


def barlow_twins(z0: Tensor, z1: Tensor, lambda_param: float) -> Tensor:
    """Barlow Twins (Zbontar et al. 2021, equation 1) of two views [N, D]."""
    a, b = (F.batch_norm(z, None, None, training=True) for z in (z0, z1))
    correlation = a.T @ b / len(a)  # [D, D]
    on_diagonal = (correlation.diagonal() - 1).square().sum()
    return on_diagonal + lambda_param * _off_diagonal(correlation).square().sum()


def vicreg(z0: Tensor, z1: Tensor) -> Tensor:
    """VICReg (Bardes et al. 2022) of two views [N, D] as its authors' code has it: weights 25, 25 and 1."""
    variance = sum(F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean() / 2 for z in (z0, z1))
    # The covariance is that of the columns: [D, D].
    covariance = sum(_off_diagonal(torch.cov(z.T)).square().sum() / z.shape[1] for z in (z0, z1))
    return 25 * F.mse_loss(z0, z1) + 25 * variance + covariance


def _off_diagonal(matrix: Tensor) -> Tensor:
    """The elements off the diagonal, [D − 1, D]: behind each element of the diagonal come D of them."""
    d = len(matrix)
    return matrix.flatten()[1:].view(d - 1, d + 1)[:, :-1]


@dataclass(frozen=True)
class OverRanks:
    """``loss`` of the views of all ranks: each makes the whole matrix, and the whole loss; takes [n, D] each."""

    loss: Loss

    def __call__(self, z0: Tensor, z1: Tensor) -> Tensor:
        scope = scope_of(gather_distributed=True)
        return self.loss(scope.gather(z0), scope.gather(z1))
