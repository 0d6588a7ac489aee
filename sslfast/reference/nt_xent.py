"""NT-Xent in plain PyTorch, with the whole similarity matrix in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def nt_xent(z0: Tensor, z1: Tensor, temperature: float | Tensor = 0.5, *, normalize: bool = True) -> Tensor:
    """Normalised temperature-scaled cross entropy (Chen et al. 2020, "SimCLR", equation 1), mean over the 2N rows.

    ``ℓ_i = −log( exp(s_ip / τ) / Σ_{j ≠ i} exp(s_ij / τ) )`` with ``p`` the other view of ``i``'s image.
    """
    z = torch.cat([z0, z1])  # [2N, D]
    if normalize:
        z = F.normalize(z, dim=1)
    s = z @ z.T / temperature  # [2N, 2N]
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    other_view = torch.arange(len(z), device=z.device).roll(len(z0))  # [2N]
    return F.cross_entropy(s.masked_fill(itself, float("-inf")), other_view)
