"""What the contrastive losses share: temperature, dot products by row, the frame of their modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._checks import accumulator, check_temperature, plain, scalar_tensor, without_autocast
from ...distributed.choose import scope_of
from ...distributed.scope import Scope
from .._inputs import check_gather


def inverse(temperature: float | Tensor, like: Tensor) -> Tensor:
    """``1/τ`` as a [] tensor beside ``like``, in its accumulator's dtype; the temperature's gradient flows through."""
    check_temperature(temperature, like.device)
    if isinstance(temperature, Tensor):
        return 1.0 / scalar_tensor("temperature", temperature, like)
    return scalar_tensor("scale", 1.0 / plain(temperature), like)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """``a_i·b_ip`` of ``a`` [M, D] and ``b`` [M, P, D], as [M, P] in the accumulator's dtype."""
    kind = accumulator(a)
    with without_autocast(a):
        return torch.bmm(b.to(kind), a.to(kind).unsqueeze(2)).squeeze(2)


def softplus(x: Tensor) -> Tensor:
    """``log(1 + e^x)``, linear only where that is exact in float64 too (from 20 on, torch's default, it is not)."""
    return F.softplus(x, threshold=40.0)


class ContrastiveLoss(nn.Module):
    """What the modules hold: the temperature (a parameter if it learns), and the options that all of them share."""

    temperature: float | Tensor

    def __init__(self, temperature: float | Tensor, gather_distributed: bool, strategy: str, diagnostics: bool) -> None:
        super().__init__()
        device = temperature.device if isinstance(temperature, Tensor) else torch.device("cpu")
        check_temperature(temperature, device)
        check_gather(gather_distributed, strategy)
        if isinstance(temperature, Tensor) and not isinstance(temperature, nn.Parameter):
            self.register_buffer("temperature", temperature, persistent=False)
        else:
            self.temperature = temperature
        self.gather_distributed = gather_distributed
        self.strategy = strategy
        self.diagnostics = diagnostics

    def scope(self) -> Scope:
        """Over which rows this call runs."""
        return scope_of(self.gather_distributed, self.strategy)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, gather_distributed={self.gather_distributed}"
