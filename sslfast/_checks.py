"""Argument checks shared by the public functions, and what may be asked of a tensor: one place, one wording."""

from __future__ import annotations

import contextlib
import math
import operator
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ._warn import warn_user

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_warned: set[str] = set()


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype that sums over ``x`` are kept in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def readable(x: Tensor) -> bool:
    """Looking at values waits for no device, does not end a graph, and finds some.

    A fake tensor has none, and PyTorch does not let one look into those of ``torch.func`` and of a tracer (``make_fx``,
    ``torch.func.linearize``).
    """
    if not x.is_cpu or torch.compiler.is_compiling() or isinstance(x, FakeTensor) or _is_traced():
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _is_traced() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


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


def warn_once(message: str) -> None:
    """Warn of the caller's line, once for each message and process; of a data loader's workers only the first warns."""
    worker = torch.utils.data.get_worker_info()
    if message in _warned or (worker is not None and worker.id > 0):
        return
    _warned.add(message)
    warn_user(message)


def is_real(value: object) -> TypeGuard[float]:
    """``value`` is a number: Python's or NumPy's, whole or not, but no truth value."""
    return isinstance(value, (int, float, np.integer, np.floating, torch.SymInt, torch.SymFloat)) and not isinstance(
        value, bool
    )


def plain(number: float) -> float:
    """A NumPy number as Python's, so that arithmetic with it is Python's too."""
    return number.item() if isinstance(number, np.generic) else number


def is_whole(value: object) -> TypeGuard[int]:
    """``value`` is a whole number by its type: Python's or NumPy's, but no truth value."""
    return isinstance(value, (int, np.integer, torch.SymInt)) and not isinstance(value, bool)


def real_number(name: str, value: Any) -> float:
    """A number, or a tensor or array of one element, as a float."""
    if is_real(value):
        return float(value)
    if isinstance(value, (Tensor, np.ndarray)) and math.prod(value.shape) == 1:
        return float(value.item())
    raise TypeError(f"{name} must be a number, got {value!r}")


def whole_number(name: str, value: Any, least: int, most: int | None = None, unit: str = "") -> int:
    """A whole number, Python's, NumPy's or a tensor of one, as an int from ``least`` on, up to ``most``.

    Raises:
        ValueError: it is something else. ``unit`` says what there are ``most`` of.
    """
    number = value
    if not isinstance(value, (int, torch.SymInt)):
        try:
            number = operator.index(value)
        except TypeError:
            number = None
    if number is None or isinstance(value, bool) or number < least or (most is not None and number > most):
        last = f"the {most} {unit}" if unit else most
        allowed = f"of at least {least}" if most is None else f"from {least} to {last}"
        raise ValueError(f"{name} must be a whole number {allowed}, got {value!r}")
    return number


def whole_numbers(name: str, values: Any, wanted: str) -> tuple[int, ...]:
    """One whole number or several, as ints; ``wanted`` tells what is allowed.

    Raises:
        ValueError: they are something else.
    """
    given = [values] if is_whole(values) else values
    if not isinstance(given, (Sequence, np.ndarray, Tensor)) or isinstance(given, str):
        raise ValueError(f"{name} must be {wanted}, got {values!r}")
    try:
        numbers: tuple[Any, ...] = tuple(v if isinstance(v, (int, torch.SymInt)) else operator.index(v) for v in given)
    except TypeError:
        raise ValueError(f"{name} must be {wanted}, in whole numbers, got {values!r}") from None
    if any(isinstance(v, bool) for v in numbers):
        raise ValueError(f"{name} must be {wanted}, in whole numbers, got {values!r}")
    return numbers


def whole_each(name: str, values: Any, count: int, wanted: str) -> tuple[int, ...]:
    """``count`` whole numbers, or one in place of all; ``wanted`` tells what is allowed."""
    numbers = whole_numbers(name, values, wanted)
    if is_whole(values):
        numbers *= count
    if len(numbers) != count:
        raise ValueError(f"{name} must be {wanted}, got {values!r}")
    return numbers


def real_numbers(name: str, values: Any) -> tuple[float, ...]:
    """One number or several, of any kind, as floats."""
    if is_real(values):
        return (float(values),)
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name} must be a number or a sequence of numbers, got {values!r}")
    if isinstance(values, (Tensor, np.ndarray)):
        values = values.tolist() if values.ndim else [values.item()]
    return tuple(real_number(name, value) for value in values)


def check_share(name: str, value: Any) -> float:
    """A number between 0 and 1."""
    number = real_number(name, value)
    if not 0 <= number <= 1:  # false for NaN too
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
    return number


def warn_of_bytes(images: Tensor) -> None:
    """Warn if floating-point images, which are on the scale 0 … 1, seem to be on that of bytes.

    Only some pixels of the first one are looked at, and only where that waits for no device. Overshoot and brightness
    above 1 are legal, and stay far below 8; of a photograph's bytes hardly any are below it.
    """
    if not images.dtype.is_floating_point or not readable(images) or images.numel() == 0:
        return
    first = images[0] if images.dim() > 3 else images
    some = first[..., :: max(1, first.shape[-2] // 16), :: max(1, first.shape[-1] // 16)]
    if float(some.detach().max()) > 8:
        warn_once(
            "images seem to be on the scale 0 … 255: floating-point ones must be on 0 … 1, or views are white. "
            "Divide them by 255, or pass uint8"
        )


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
    elif is_real(temperature):
        value = float(temperature)
    else:
        raise TypeError(f"temperature must be a float or a tensor, got {type(temperature).__name__}")
    if not 1e-8 <= abs(value) <= 1e8:  # false for NaN too
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
    if is_real(value):
        return torch.full((), plain(value), dtype=kind, device=like.device)
    raise TypeError(f"{name} must be a float or a tensor, got {type(value).__name__}")


def check_tokens(name: str, x: Tensor) -> None:
    """``x`` is a batch of token rows [B, L, D] of a floating-point type with at least one feature."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.dim() != 3 or x.shape[2] == 0:
        raise ValueError(f"{name} must have shape [images, tokens, features], got {tuple(x.shape)}")
