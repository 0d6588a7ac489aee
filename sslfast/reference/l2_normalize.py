"""Row-wise L2-normalisation in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def l2_normalize(x: Tensor, eps: float = 1e-12) -> Tensor:
    """``x / max(‖x‖₂, eps)`` for each row of ``x`` [M, D]; a row of zeros stays zero, as in ``F.normalize``."""
    return torch.nn.functional.normalize(x, dim=1, eps=eps)
