"""Argument checks shared by the public functions, and what may be asked of a tensor: one place, one wording."""

from __future__ import annotations

import contextlib
import math
import os
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype that sums over ``x`` are kept in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def readable(x: Tensor) -> bool:
    """Looking at values waits for no device, does not end a graph, and finds some: a fake tensor has none."""
    return x.is_cpu and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)


def ids_checked(ids: Tensor) -> bool:
    """The values of ids are looked at: where they are readable, and with ``SSLFAST_CHECK_IDS=1`` on a GPU too."""
    if ids.is_cuda and os.environ.get("SSLFAST_CHECK_IDS", "0") not in ("", "0"):
        return not torch.compiler.is_compiling() and not isinstance(ids, FakeTensor)
    return readable(ids)


def autocasts(x: Tensor) -> bool:
    """An autocast region of ``x``'s device is on; the meta device, which PyTorch does not let one ask, has none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A region in which ``x``'s device does not autocast."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


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
        if not readable(temperature):
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


def check_keys(q: Tensor, k: Tensor) -> None:
    """``q`` [M, D] and ``k`` [N, D] are matrices of the same width, device and dtype."""
    check_matrix("q", q)
    check_matrix("k", k)
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"q and k must have the same width, got {q.shape[1]} and {k.shape[1]} features")
    if q.device != k.device:
        raise ValueError(f"q and k must be on the same device, got {q.device} and {k.device}")
    if q.dtype != k.dtype:
        raise TypeError(f"q and k must have the same dtype, got {q.dtype} and {k.dtype}")


def check_integers(name: str, x: Tensor, length: int, device: torch.device) -> None:
    """``x`` is a vector of ``length`` integers on ``device``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {x.dtype}")
    if x.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on the inputs' device {device}, got {x.device}")


def scalar_tensor(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """``value`` as a [] tensor on ``like``'s device in its accumulator's dtype; its gradient flows through.

    Raises:
        TypeError: it is neither a number nor a floating-point tensor. ValueError: not one element, or elsewhere.
    """
    kind = accumulator(like)
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype not in FLOATS:
            raise ValueError(
                f"{name} must be a float or a one-element floating-point tensor, "
                f"got shape {tuple(value.shape)}, dtype {value.dtype}"
            )
        if value.device != like.device:
            raise ValueError(f"{name} must be on the inputs' device {like.device}, got {value.device}")
        return value.reshape(()).to(kind)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.full((), value, dtype=kind, device=like.device)
    raise TypeError(f"{name} must be a float or a tensor, got {type(value).__name__}")


def check_tokens(name: str, x: Tensor) -> None:
    """``x`` is a batch of token rows [B, L, D] of a floating-point type with at least one feature."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.dim() != 3 or x.shape[2] == 0:
        raise ValueError(f"{name} must have shape [images, tokens, features], got {tuple(x.shape)}")
