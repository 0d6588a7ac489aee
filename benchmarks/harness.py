"""What every benchmark shares: cases, what is measured of them, interleaved timing."""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sslfast

from . import Unavailable

MODES = ("forward", "backward", "both")
CALL = "call"  # the mode of an operation without a gradient
WHOLE = ("both", CALL)  # what memory is measured of, and what tables show
BASELINES = ("eager", "compile")

MIN_ROUNDS, MAX_ROUNDS = 5, 200


# ------------------------------------------------------------------------------------------- what a benchmark declares


@dataclass(frozen=True)
class Case:
    """One problem: ``shape`` names its sizes (``{"N": 4096, "D": 128}``), ``mode`` is one of ``MODES``, or ``CALL``.

    Names of what is measured stand in ``shape`` too, where that is not one thing.

    Raises:
        ValueError: ``mode`` is none of these.
    """

    op: str
    shape: dict[str, Any]
    dtype: str = "float32"
    mode: str = "both"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.mode not in (*MODES, CALL):
            raise ValueError(f"mode={self.mode!r} is not measured; allowed: {', '.join((*MODES, CALL))}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def sizes(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self.shape.items())

    def __str__(self) -> str:
        return f"{self.op} {self.sizes} {self.dtype} {self.mode}"


@dataclass(frozen=True)
class Work:
    """``run(prepare())`` is one measured call, of which only ``run`` is timed; it returns value, gradients, or both.

    ``proof`` returns what must equal the truth instead, where a run draws random numbers; ``tolerance`` is the
    disagreement allowed, where ``AGREEMENT`` of the case's dtype does not fit; ``results`` counts the results there
    are, where the last ones are missing (a package without a gradient of the scale). ``in_mode`` makes the closure of
    another mode on the same inputs.
    """

    prepare: Callable[[], Any]
    run: Callable[[Any], tuple[Tensor, ...]]
    proof: Callable[[], tuple[Tensor, ...]] | None = None
    tolerance: float | None = None
    results: int | None = None
    in_mode: Callable[[str], Work] | None = None

    def __call__(self) -> tuple[Tensor, ...]:
        return self.run(self.prepare())

    def apart(self, mode: str) -> Work | None:
        """The closure of ``mode``, if there is one."""
        return self.in_mode(mode) if self.in_mode else None


def work(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], mode: str, grad_output: Tensor | None = None
) -> Work:
    """The closure of one mode: ``function(*inputs)``, its gradients, or both.

    Args:
        function: differentiable; returns one tensor, a scalar where ``grad_output`` is ``None``.
        inputs: leaves that require gradients.
        mode: ``"forward"`` returns (value,), ``"backward"`` the gradients (the forward is run anew before each timed
            sample, untimed), ``"both"`` (value, *gradients).
        grad_output: the incoming gradient, of the value's shape.
    """

    def gradients(value: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, inputs, grad_output)

    def both(_: Any) -> tuple[Tensor, ...]:
        value = function(*inputs)
        return (value.detach(), *gradients(value))

    def in_mode(mode: str) -> Work:
        return work(function, inputs, mode, grad_output)

    if mode == "forward":
        return Work(lambda: None, lambda _: (function(*inputs).detach(),), in_mode=in_mode)
    if mode == "backward":
        return Work(lambda: function(*inputs), gradients, in_mode=in_mode)
    return Work(lambda: None, both, in_mode=in_mode)


def require_backend(call: Callable[[], Any], name: str) -> None:
    """Make sure that sslfast serves ``call`` with backend ``name``: its fallback must never be timed under its name.

    Raises:
        Unavailable: that backend cannot serve the call.
    """
    try:
        with sslfast.use_backend(name):
            call()
    except RuntimeError as error:
        if "cannot serve" not in str(error):
            raise
        raise Unavailable(str(error)) from error


def discover() -> dict[str, ModuleType]:
    """Every ``bench_<op>.py`` beside this file, by ``op``, in alphabetical order."""
    names = sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.name.startswith("bench_"))
    return {name.removeprefix("bench_"): importlib.import_module(f".{name}", __package__) for name in names}


# -------------------------------------------------------------------------------------------------------------- timing


def time_interleaved(
    works: dict[str, Work], clock: Callable[[Callable[[Any], Any], Any], float], seconds: float
) -> dict[str, list[float]]:
    """Samples in milliseconds of every work, taken round by round so that a slow minute of the machine hits them all.

    Each round starts with another provider, so nobody always runs behind the same neighbour. At least ``MIN_ROUNDS``
    rounds, then as many as fit into ``seconds``, at most ``MAX_ROUNDS``.
    """
    names = list(works)
    samples: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for index in range(MAX_ROUNDS if names else 0):
        if index >= MIN_ROUNDS and time.perf_counter() - begin > seconds:
            break
        first = index % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(clock(works[name].run, works[name].prepare()))
    return samples


def speedups(samples: dict[str, list[float]], baselines: Sequence[str] = BASELINES) -> dict[str, float]:
    """Per provider the median over rounds of (best baseline's time / its time in the same round).

    The best baseline is the one of ``baselines`` with the smallest median; without any the result is empty.
    """
    medians = {name: float(np.median(samples[name])) for name in baselines if name in samples}
    if not medians:
        return {}
    best = np.asarray(samples[min(medians, key=lambda name: medians[name])])
    return {name: float(np.median(best / np.asarray(times))) for name, times in samples.items()}
