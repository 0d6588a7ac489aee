"""The fast forms of what lightly's models call beside their losses: moving averages, and the nearest keys of a bank."""

from __future__ import annotations

from typing import Any

import torch
from lightly.models.modules.memory_bank import MemoryBankModule
from torch import Tensor, nn

from .._checks import FLOATS
from ..nn.ema import ema_update_
from ..ops.nearest_neighbours import nearest_neighbours
from ._serve import DEVICES, PLAIN, Unserved, unserved_matrices


def _unserved_pair(average: Tensor, student: Tensor) -> Unserved | None:
    """Why this is not a pair that one pass moves as two of PyTorch's kernels do."""
    if type(average) not in PLAIN or type(student) not in PLAIN:
        return Unserved("parameters of a kind of their own")
    if average.shape != student.shape or average.device != student.device:
        return Unserved("parameters of several shapes, or on several devices")
    if average.dtype not in (torch.float32, torch.float64) or student.dtype not in FLOATS:
        return Unserved(f"averages of {average.dtype}")  # in 16 bits lightly rounds between the product and the sum
    if average.device.type not in DEVICES or average.layout != torch.strided or student.layout != torch.strided:
        return Unserved("parameters on another device than CPU and CUDA, or sparse ones")
    if average.data_ptr() == student.data_ptr() and average.numel():
        return Unserved("a model that is its own average")
    return None


def fast_update_momentum(model: nn.Module, model_ema: nn.Module, m: float) -> None | Unserved:
    if torch.compiler.is_compiling():
        return Unserved("a compiled update")
    if isinstance(m, bool) or not isinstance(m, (float, int)) or not 0 <= m <= 1:
        return Unserved("a momentum that is no number from 0 to 1")
    averages, students = list(model_ema.parameters()), list(model.parameters())
    if not averages or len(averages) != len(students):
        return Unserved("models of different numbers of parameters, or of none")
    for average, student in zip(averages, students, strict=True):
        unserved = _unserved_pair(average, student)
        if unserved:
            return unserved
    return ema_update_(averages, students, m)


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
