"""Sinkhorn–Knopp assignments in the log domain: a bias f for each prototype, so that ``softmax_k(x/τ + f)`` are they.

    f ← −log Σ_b exp(x_bk/τ)                     the first iteration
    f ← f − log Σ_b softmax_k(x_b/τ + f)_k       the others; row_start=True: all, from f = 0

Each is one visit of the logits, and so is writing the assignments.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import _backends, _library, reference
from .._checks import FLOATS, accumulator, check_temperature, is_real, whole_number, without_autocast
from . import _devices

__all__ = ["assigned", "bias_of", "column_sums"]

BACKENDS = ("cpu", "cuda", "reference")
why_not = functools.partial(_devices.why_not, "sinkhorn", "logits")


def _columns(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[1:], dtype=accumulator(logits))


_ROWS = "float temperature, Tensor? rows"
_library.define(
    "sinkhorn_bias(Tensor logits, float temperature, int iterations, bool row_start, Tensor? rows) -> Tensor",
    lambda logits, *_: _columns(logits),
)
_library.define(
    f"sinkhorn_sums(Tensor logits, Tensor? bias, {_ROWS}) -> (Tensor largest, Tensor sums)",
    lambda logits, *_: (_columns(logits), _columns(logits)),
)
_library.define(
    f"sinkhorn_assign(Tensor logits, Tensor bias, {_ROWS}) -> Tensor",
    lambda logits, *_: logits.new_empty(logits.shape, dtype=accumulator(logits)),
)


def check_logits(logits: Tensor, temperature: float, rows: Tensor | None, name: str = "logits") -> Tensor:
    """``logits`` as [B, S, K], detached: B rows of each of S positions.

    Raises:
        TypeError, ValueError: an argument does not fit; it is named.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(logits).__name__}")
    if logits.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {logits.dtype}")
    if logits.dim() not in (2, 3) or 0 in logits.shape[1:]:
        raise ValueError(f"{name} must be [B, K] or [B, S, K] with K at least 1, got shape {tuple(logits.shape)}")
    check_number("temperature", temperature, logits)
    if rows is not None:
        check_count(rows, logits)
    return (logits.unsqueeze(1) if logits.dim() == 2 else logits).detach()


def check_number(name: str, temperature: float, x: Tensor) -> None:
    """``temperature`` is a number that can be divided by."""
    if not is_real(temperature):
        raise TypeError(f"{name} must be a number, got {type(temperature).__name__}")
    try:
        check_temperature(temperature, x.device)
    except ValueError as error:
        raise ValueError(str(error).replace("temperature", name, 1)) from None


def check_count(rows: Tensor, x: Tensor) -> None:
    """``rows`` is one int64 on ``x``'s device."""
    if not isinstance(rows, Tensor) or rows.is_floating_point() or rows.numel() != 1:
        raise ValueError(f"rows must be a tensor of one whole number, got {rows!r}")
    if rows.device != x.device:
        raise ValueError(f"rows must be on the inputs' device {x.device}, got {rows.device}")


def as_count(rows: Tensor | None) -> Tensor | None:
    """``rows`` as the operators take it."""
    return None if rows is None else rows.detach().reshape(()).long()


def column_sums(
    logits: Tensor, bias: Tensor | None, temperature: float, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Column statistics [S, K] of checked logits [B, S, K] over the temperature: ``(max, Σ exp(x − max))``; with a bias
    the second are ``Σ softmax_k(x + f)``, and nothing can be said of the first."""
    if _backends.serve("sinkhorn", logits, "cuda", why_not) == "reference":
        with without_autocast(logits):
            return reference.sinkhorn_sums(logits.to(accumulator(logits)), bias, temperature, rows)
    found: tuple[Tensor, Tensor] = _library.call("sinkhorn_sums", logits, bias, temperature, rows)
    return found


def bias_of(logits: Tensor, temperature: float, iterations: int, row_start: bool, rows: Tensor | None = None) -> Tensor:
    """The bias f [S, K] of checked logits [B, S, K]."""
    if _backends.serve("sinkhorn", logits, "cuda", why_not) == "reference":
        with without_autocast(logits):
            return reference.sinkhorn_bias(logits.to(accumulator(logits)), temperature, iterations, row_start, rows)
    found: Tensor = _library.call("sinkhorn_bias", logits, temperature, iterations, row_start, rows)
    return found


def assigned(logits: Tensor, bias: Tensor, temperature: float, rows: Tensor | None = None) -> Tensor:
    """``softmax_k(logits/temperature + bias)`` of checked logits [B, S, K], float32 (float64 for float64)."""
    if _backends.serve("sinkhorn", logits, "cuda", why_not) == "reference":
        with without_autocast(logits):
            return reference.sinkhorn_assign(logits.to(accumulator(logits)), bias, temperature, rows)
    found: Tensor = _library.call("sinkhorn_assign", logits, bias, temperature, rows)
    return found


def updated(bias: Tensor | None, largest: Tensor, sums: Tensor) -> Tensor:
    """``f ← f − log Σ`` from the column sums; a prototype that no row reaches keeps its bias."""
    before = torch.zeros_like(sums) if bias is None else bias
    return torch.where(sums == 0, before, before - (largest + sums.log()))


def check_iterations(iterations: int) -> int:
    return whole_number("iterations", iterations, 1)
