"""Tensors of one kind on one device, real, fake or meta, for a call of something public."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

N, D = 24, 16  # samples and features
B, L = 2, 16  # images and patches: 16 pixels a side in patches of 4
SIDE, PATCH = 16, 4


@dataclass
class Inputs:
    """Tensors of one kind on one device. With ``learn`` the floating-point ones ask for a gradient."""

    device: torch.device
    dtype: torch.dtype
    learn: bool

    def z(self, *shape: int) -> Tensor:
        shape = shape or (N, D)
        return torch.randn(shape, device=self.device, dtype=self.dtype).requires_grad_(self.learn)

    def fixed(self, *shape: int) -> Tensor:
        return torch.randn(shape or (N, D), device=self.device, dtype=self.dtype)

    def number(self, value: float) -> Tensor:
        return torch.full((), value, device=self.device).requires_grad_(self.learn)

    def labels(self, count: int = N) -> Tensor:
        return torch.arange(count, device=self.device) % 7

    def ids(self, *shape: int) -> Tensor:
        """0, 1, … along the last dimension."""
        return torch.arange(shape[-1], device=self.device).expand(shape).contiguous()

    def images(self, *, side: int = SIDE, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randint(256, (B, 3, side, side), device=self.device, dtype=torch.uint8).to(dtype or torch.uint8)

    def pixels(self, side: int = SIDE) -> Tensor:
        return torch.rand(B, 3, side, side, device=self.device, dtype=self.dtype)

    def mask(self) -> Tensor:
        """[B, L] bool, a quarter of them True."""
        return (self.ids(B, L) % 4) == 0

    def made(self, module: Callable[[], nn.Module]) -> Any:
        """The module, made with the inputs' device as the default one."""
        with torch.device(self.device):
            return module().train()

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """An autocast region to bfloat16, if that is the dtype; ``torch.autocast`` itself wants a GPU to be there."""
        kind = self.device.type
        if self.dtype != torch.bfloat16:
            yield
            return
        before = torch.is_autocast_enabled(kind)
        torch.set_autocast_enabled(kind, True)
        torch.set_autocast_dtype(kind, torch.bfloat16)
        try:
            yield
        finally:
            torch.set_autocast_enabled(kind, before)
            torch.clear_autocast_cache()


Case = Callable[[Inputs], Any]
