"""Argument checks shared by the public functions: one place, one wording."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype that sums over ``x`` are kept in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_matrix(name: str, x: Tensor) -> None:
    """``x`` is a two-dimensional floating-point tensor with at least one row and one column."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 2:
        raise ValueError(f"{name} must be two-dimensional [rows, features], got shape {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"{name} must have at least one row and one feature, got shape {tuple(x.shape)}")


def check_same(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """``a`` and ``b`` agree in shape, device and dtype."""
    if a.shape != b.shape:
        raise ValueError(f"{name_a} and {name_b} must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.device != b.device:
        raise ValueError(f"{name_a} and {name_b} must be on the same device, got {a.device} and {b.device}")
    if a.dtype != b.dtype:
        raise TypeError(f"{name_a} and {name_b} must have the same dtype, got {a.dtype} and {b.dtype}")


def check_temperature(temperature: float | Tensor, device: torch.device) -> None:
    """A number τ with 1e-8 ≤ |τ| ≤ 1e8 (negative is legal), or a one-element floating-point tensor on ``device``.

    A tensor's value is read only where that costs nothing: on the CPU, outside ``torch.compile``. On a GPU it would
    wait for the device, so there a zero flows through as PyTorch's division would let it.
    """
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1 or temperature.dtype not in FLOATS:
            raise ValueError(
                "temperature must be a float or a one-element floating-point tensor, "
                f"got shape {tuple(temperature.shape)}, dtype {temperature.dtype}"
            )
        if temperature.device != device:
            raise ValueError(f"temperature must be on the inputs' device {device}, got {temperature.device}")
        if device.type != "cpu" or torch.compiler.is_compiling():
            return
        value = float(temperature.detach())
    elif isinstance(temperature, (int, float)) and not isinstance(temperature, bool):
        value = float(temperature)
    else:
        raise TypeError(f"temperature must be a float or a tensor, got {type(temperature).__name__}")
    if not math.isfinite(value) or not 1e-8 <= abs(value) <= 1e8:
        raise ValueError(
            f"temperature must be finite and not zero, 1e-8 to 1e8 in size (negative is legal), got {value}"
        )
