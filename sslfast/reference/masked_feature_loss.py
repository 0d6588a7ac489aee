"""The loss of predicted features in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def masked_feature_loss(
    pred: Tensor, teacher: Tensor, ids: Tensor, loss: str = "smooth_l1", beta: float = 1.0, eps: float | None = 1e-5
) -> Tensor:
    """Mean loss of ``pred`` [S·B, K, D] against the rows ``ids`` [S·B, K] of ``teacher`` [B, L, D].

    ``eps`` is that of the layer normalisation of each of the teacher's rows, or ``None`` for none.
    """
    if eps is not None:
        teacher = F.layer_norm(teacher, teacher.shape[-1:], eps=eps)
    images = torch.arange(len(ids), device=ids.device) % max(len(teacher), 1)
    target = teacher[images[:, None], ids]  # [S·B, K, D]
    return F.mse_loss(pred, target) if loss == "mse" else F.smooth_l1_loss(pred, target, beta=beta)
