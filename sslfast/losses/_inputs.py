"""What the contrastive losses share: temperature, checked rows, dot products by row, the module's frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import (
    accumulator,
    autocasts,
    check_matrix,
    check_same,
    check_temperature,
    scalar_tensor,
    without_autocast,
)
from ..distributed.scope import check_strategy
from ..ops.l2_normalize import l2_normalize


def inverse(temperature: float | Tensor, like: Tensor) -> Tensor:
    """``1/τ`` as a [] tensor beside ``like``, in its accumulator's dtype; the temperature's gradient flows through."""
    check_temperature(temperature, like.device)
    if isinstance(temperature, Tensor):
        return 1.0 / scalar_tensor("temperature", temperature, like)
    return scalar_tensor("scale", 1.0 / temperature, like)


def check_fits(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """``x`` has ``like``'s width, device and dtype."""
    if x.shape[-1] != like.shape[-1]:
        raise ValueError(
            f"{name} and {like_name} must have the same width, got {x.shape[-1]} and {like.shape[-1]} features"
        )
    if x.device != like.device:
        raise ValueError(f"{name} and {like_name} must be on the same device, got {x.device} and {like.device}")
    if x.dtype != like.dtype:
        raise TypeError(f"{name} and {like_name} must have the same dtype, got {x.dtype} and {like.dtype}")


def in_one_dtype(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as they are; inside an autocast region, which mixes them, in the widest of their dtypes."""
    present = [t for t in tensors if isinstance(t, Tensor)]
    if not present or not autocasts(present[0]):
        return tensors
    widest = present[0].dtype
    for t in present:
        widest = torch.promote_types(widest, t.dtype)
    return tuple(t.to(widest) if isinstance(t, Tensor) else t for t in tensors)


def two_views(name0: str, z0: Tensor, name1: str, z1: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Two checked matrices [N, D] of the same shape, device and dtype, their rows normalised if asked."""
    check_matrix(name0, z0)
    check_matrix(name1, z1)
    first, second = in_one_dtype(z0, z1)
    assert first is not None and second is not None
    check_same(name0, first, name1, second)
    return (l2_normalize(first), l2_normalize(second)) if normalize else (first, second)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """``a_i·b_ip`` of ``a`` [M, D] and ``b`` [M, P, D], as [M, P] in the accumulator's dtype."""
    kind = accumulator(a)
    with without_autocast(a):
        return torch.bmm(b.to(kind), a.to(kind).unsqueeze(2)).squeeze(2)


def softplus(x: Tensor) -> Tensor:
    """``log(1 + e^x)``, linear only where that is exact in float64 too (from 20 on, torch's default, it is not)."""
    return F.softplus(x, threshold=40.0)


def check_gather(gather_distributed: bool, strategy: str = "gather") -> None:
    """``strategy`` exists, and ``gather_distributed=True`` needs a torch that was built with ``torch.distributed``."""
    check_strategy(strategy)
    if gather_distributed and not torch.distributed.is_available():
        raise ValueError(
            "gather_distributed=True, but torch.distributed is not available: "
            "set gather_distributed=False or install a torch with distributed support"
        )


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

    def shared(self) -> dict[str, Any]:
        """The options as the functions take them."""
        return {
            "gather_distributed": self.gather_distributed,
            "strategy": self.strategy,
            "diagnostics": self.diagnostics,
        }

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, gather_distributed={self.gather_distributed}"
