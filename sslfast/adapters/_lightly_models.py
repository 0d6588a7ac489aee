"""The fast forms of what lightly's models call beside their losses: moving averages, and the nearest keys of a bank."""

from __future__ import annotations

from typing import Any

import torch
from lightly.models.modules.memory_bank import MemoryBankModule
from torch import Tensor, nn

from ..nn.ema import ema_update_
from ..ops.nearest_neighbours import nearest_neighbours
from ._serve import DEVICES, PLAIN, Unserved, unserved_matrices


def fast_update_momentum(model: nn.Module, model_ema: nn.Module, m: float) -> None | Unserved:
    if torch.compiler.is_compiling():
        return Unserved("a compiled update")
    if isinstance(m, bool) or not isinstance(m, (float, int)):
        return Unserved("a momentum that is no number")
    averages, students = list(model_ema.parameters()), list(model.parameters())
    if not averages:
        return Unserved("a model without parameters")
    for x in (*averages, *students):
        if type(x) not in PLAIN or x.device.type not in DEVICES or x.layout != torch.strided:
            return Unserved("parameters of a kind of their own, or on another device than CPU and CUDA")
    for average in averages:
        if average.dtype not in (torch.float32, torch.float64):  # in 16 bits lightly rounds the product and the sum
            return Unserved(f"averages of {average.dtype}")
    try:
        return ema_update_(averages, students, m)
    except (TypeError, ValueError) as error:  # before anything has moved
        return Unserved(str(error))


def fast_nearest(self: Any, output: Tensor, update: bool = False) -> Tensor | Unserved:
    """The bank's own code updates it; what is looked up is the bank before that."""
    unserved = unserved_matrices(output)
    if unserved:
        return unserved
    bank = self.bank
    if bank.dim() != 2 or not self.size[0] or bank.shape[1] != output.shape[1] or not self.feature_dim_first:
        return Unserved("a memory bank whose keys are not [K, D]")
    if bank.dtype != output.dtype or bank.device != output.device:
        return Unserved(f"a memory bank of {bank.dtype} on {bank.device}")
    output, keys = MemoryBankModule.forward(self, output, update=update)
    keys = keys.t()  # [K, D]
    return keys[nearest_neighbours(output.detach(), keys, normalize=True).index[:, 0]]
