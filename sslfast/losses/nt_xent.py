"""``NTXentLoss``: the module form of :func:`sslfast.nt_xent`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._checks import check_temperature
from ..ops.nt_xent import nt_xent


class NTXentLoss(nn.Module):
    """Normalised temperature-scaled cross entropy over two views, with the constructor of lightly 1.6.0's class.

    Args:
        temperature: finite and not zero; negative is legal. A float (default 0.5), or a one-element tensor or
            ``nn.Parameter`` that learns (moves with the module; part of the ``state_dict`` if a parameter).
        memory_bank_size: only 0 (no bank) is served by this version.
        gather_distributed: only ``False`` is served by this version: negatives are the local batch's.

    Shapes:
        ``out0``, ``out1``: [N, D], row ``i`` of each a view of image ``i``; output: [] (mean over the 2N rows), float32
        (float64 for float64 inputs).

    Raises:
        ValueError: temperature is zero or not finite; see also :func:`sslfast.nt_xent`.
        NotImplementedError: a memory bank or distributed gathering is asked for.

    Source: Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations", equation 1.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        device = temperature.device if isinstance(temperature, Tensor) else torch.device("cpu")
        check_temperature(temperature, device)
        sizes = (memory_bank_size,) if isinstance(memory_bank_size, int) else tuple(memory_bank_size)
        if any(size != 0 for size in sizes):
            raise NotImplementedError(
                f"memory_bank_size={memory_bank_size!r}: this version of sslfast serves only 0 (no memory bank)"
            )
        if gather_distributed:
            raise NotImplementedError(
                "gather_distributed=True: this version of sslfast takes negatives from the local batch only"
            )
        if isinstance(temperature, Tensor) and not isinstance(temperature, nn.Parameter):
            self.register_buffer("temperature", temperature, persistent=False)
        else:
            self.temperature = temperature
        self.memory_bank_size = memory_bank_size
        self.gather_distributed = gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of two views, each [N, D]."""
        return nt_xent(out0, out1, self.temperature)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
