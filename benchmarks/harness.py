"""What every benchmark shares: cases, equality, interleaved timing, memory in a fresh process."""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sslfast

from . import Unavailable
from . import machine as machine_module
from .machine import MIB, ROOT, Clock, Machine, Peaks
from .peers import label
from .rows import Row

MODES = ("forward", "backward", "both")
CALL = "call"  # the mode of an operation without a gradient
WHOLE = ("both", CALL)  # what memory is measured of, and what tables show
BASELINES = ("eager", "compile")

MIN_ROUNDS, MAX_ROUNDS = 5, 200
SECONDS_PER_CASE = {False: 15.0, True: 3.0}  # by --quick
MEMORY_SECONDS = 240

# Largest error against float64 by the largest entry and by the norm, relative to those of the truth, at which two
# implementations still compute the same function. bfloat16 rounds every similarity to 8 bits before the softmax.
AGREEMENT = {"float64": 1e-9, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}

# Why a measurement may be missing without anything being wrong.
ABSENT = (Unavailable, torch.OutOfMemoryError, MemoryError)


class Failed(RuntimeError):
    """A measuring process failed, for the reason in the message."""


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
    disagreement allowed, where ``AGREEMENT`` of the case's dtype does not fit.
    """

    prepare: Callable[[], Any]
    run: Callable[[Any], tuple[Tensor, ...]]
    proof: Callable[[], tuple[Tensor, ...]] | None = None
    tolerance: float | None = None

    def __call__(self) -> tuple[Tensor, ...]:
        return self.run(self.prepare())


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

    if mode == "forward":
        return Work(lambda: None, lambda _: (function(*inputs).detach(),))
    if mode == "backward":
        return Work(lambda: function(*inputs), gradients)
    return Work(lambda: None, both)


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


# ------------------------------------------------------------------------------------------------------------ equality


def disagreement(got: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest relative error of ``got`` against ``truth`` (float64), by the largest entry and by the norm.

    A NaN, or a result of the wrong number or shape, is infinitely wrong.
    """
    if len(got) != len(truth):
        return float("inf")
    worst = 0.0
    for result, exact in zip(got, truth, strict=True):
        if result.shape != exact.shape:
            return float("inf")
        error = result.detach().double() - exact
        for size in (lambda t: t.abs().max(), torch.linalg.vector_norm):
            relative = (size(error) / size(exact).clamp_min(1e-300)).item()
            worst = max(worst, relative) if relative == relative else float("inf")
    return worst


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


# -------------------------------------------------------------------------------------------------------------- memory


def peak_mib(case: Case, provider: str) -> float:
    """Extra peak memory of one measured call in a fresh process, in MiB (what counts: ``peak_extra_bytes``).

    Raises:
        Unavailable: the provider cannot run, runs out of memory, or the system cannot say.
        Failed: the provider failed otherwise.
    """
    request = json.dumps({"case": asdict(case), "provider": provider})
    environment = {**os.environ, **machine_module.ALLOCATOR_ENVIRONMENT, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, "-c", f"from {__name__} import memory_worker; memory_worker()", request]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=MEMORY_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"took more than {MEMORY_SECONDS} s") from error
    if done.returncode == -9:
        raise Unavailable("killed by the system, out of memory")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Failed(f"the measuring process ended with status {done.returncode}: {last}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise Failed(answer["error"])
    if "unavailable" in answer:
        raise Unavailable(answer["unavailable"])
    return answer["bytes"] / MIB


def memory_worker() -> None:
    """The fresh process of ``peak_mib``: reads the request from its first argument, prints the answer as JSON.

    The warm-up on a tiny problem loads code and thread pools but nothing of the problem's size, so that whatever a
    package keeps for later counts. A compiled function is warmed up on the problem itself: its code exists only then.
    """
    request = json.loads(sys.argv[1])
    case, provider = Case(**request["case"]), request["provider"]
    bench = discover()[case.op]
    try:
        measured = bench.setup(case, provider)
        tiny = replace(case, shape={**case.shape, **bench.TINY})
        warm_up = measured if provider == "compile" else bench.setup(tiny, provider)
        warm_up()
        del warm_up
        gc.collect()
        answer: dict[str, Any] = {"bytes": machine_module.peak_extra_bytes(case.device, measured)}
    except (*ABSENT, OSError) as error:
        answer = {"unavailable": _reason(error)}
    except Exception as error:
        answer = {"error": _reason(error)}
    print(json.dumps(answer))


def _reason(error: BaseException) -> str:
    """One line that names the error: the first of its message, without what makes it longer than a line."""
    first = textwrap.shorten((str(error).strip().splitlines() or [""])[0], 160, placeholder=" …")
    return first if isinstance(error, Failed | Unavailable) else f"{type(error).__name__}: {first}"


# ---------------------------------------------------------------------------------------------------------- running it


@dataclass
class Report:
    """What a run produced: rows of the CSV, skips as (case, provider, metric, reason), errors as lines."""

    rows: list[Row] = field(default_factory=list)
    skips: list[tuple[Case, str, str, str]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def named_skips(self) -> list[str]:
        """A line for each (operation, provider, reason), with how often and where."""
        places: dict[tuple[str, str, str], list[str]] = {}
        for case, provider, metric, reason in self.skips:
            places.setdefault((case.op, provider, reason), []).append(f"{case.sizes} {metric}")
        return [f"{op}, {provider}: {why} ({len(at)}: {', '.join(at)})" for (op, provider, why), at in places.items()]


class Runner:
    """Runs cases on one machine; ``report`` grows case by case."""

    def __init__(
        self, machine: Machine, peaks: Peaks, quick: bool, progress: Callable[[str], None] = lambda _: None
    ) -> None:
        self.machine = machine
        self.peaks = peaks
        self.seconds = SECONDS_PER_CASE[quick]
        self.progress = progress
        self.report = Report(rows=[self._peak_row(p) for p in peaks.all])

    def run_case(self, bench: ModuleType, case: Case) -> None:
        """Equality, then time, then memory of every provider of ``case``."""
        torch.compiler.reset()  # shapes of earlier cases must not count towards the limit on recompilations
        self._time(bench, case)
        self._release(case)
        if case.mode in WHOLE:
            for provider in bench.PROVIDERS:
                self._memory(bench, case, provider)

    def _time(self, bench: ModuleType, case: Case) -> None:
        self.progress(f"{case}: equality")
        truth: tuple[Tensor, ...] | None = None
        works: dict[str, Work] = {}
        for provider in bench.PROVIDERS:
            if self._skipped(bench, case, provider, "time_ms"):
                continue
            truth = bench.truth(case) if truth is None else truth
            candidate = self._checked(bench, case, provider, truth)
            if candidate is not None:
                works[provider] = candidate
            self._release(case)  # what a provider that ran out of memory held
        del truth
        self.progress(f"{case}: time")
        clock = Clock(case.device)
        for candidate in works.values():
            clock(candidate.run, candidate.prepare())  # the second warm-up; the equality check was the first
        samples = time_interleaved(works, clock, self.seconds)
        flops, bytes_moved = bench.cost(case)
        ratios = speedups(samples, getattr(bench, "BASELINES", BASELINES))
        bound = self.peaks.bound_ms(flops, bytes_moved, case.dtype)
        for provider, times in samples.items():
            share = bound / float(np.median(times)) if bound else None  # no bound on what costs nothing
            self.report.rows.append(self._row(case, provider, "time_ms", times, share, ratios.get(provider)))

    def _checked(self, bench: ModuleType, case: Case, provider: str, truth: tuple[Tensor, ...]) -> Work | None:
        """The provider's closure, once it has returned the right values; ``None`` after a recorded skip or error."""
        try:
            candidate = bench.setup(case, provider)
            wrong = disagreement((candidate.proof or candidate)(), truth)
        except Exception as error:  # a peer may fail in any way; that must not end the run
            self._failed(case, provider, "time_ms", error)
            return None
        allowed = AGREEMENT[case.dtype] if candidate.tolerance is None else candidate.tolerance
        if wrong > allowed:
            self.report.errors.append(
                f"{case}, {provider}: not timed, its results differ from the float64 truth by {wrong:.1e},"
                f" allowed {allowed:.0e}"
            )
            return None
        return candidate

    def _memory(self, bench: ModuleType, case: Case, provider: str) -> None:
        if self._skipped(bench, case, provider, "peak_mib"):
            return
        self.progress(f"{case}: memory of {provider}")
        try:
            peak = peak_mib(case, provider)
        except (Failed, Unavailable) as error:
            self._failed(case, provider, "peak_mib", error)
            return
        self.report.rows.append(self._row(case, provider, "peak_mib", [peak], None, None))

    def _skipped(self, bench: ModuleType, case: Case, provider: str, metric: str) -> bool:
        reason = bench.why_skip(case, provider, metric)
        if reason is not None:
            self.report.skips.append((case, provider, metric, reason))
        return reason is not None

    def _failed(self, case: Case, provider: str, metric: str, error: Exception) -> None:
        """sslfast failing is an error; what is absent, out of memory, or a failing competitor is a named skip."""
        if provider == "sslfast" and not isinstance(error, ABSENT):
            self.report.errors.append(f"{case}, {provider}, {metric}: {_reason(error)}")
        else:
            self.report.skips.append((case, provider, metric, _reason(error)))

    def _release(self, case: Case) -> None:
        gc.collect()
        if case.device == "cuda":
            torch.cuda.empty_cache()

    def _row(
        self, case: Case, provider: str, metric: str, samples: list[float], share: float | None, speedup: float | None
    ) -> Row:
        low, middle, high = (_number(float(p)) for p in np.percentile(samples, (20, 50, 80)))
        measured = {"metric": metric, "p20": low, "p50": middle, "p80": high, "rounds": len(samples)}
        ratios = {"share_of_bound": _number(share), "speedup_over_best_of_eager_compile": _number(speedup)}
        subject = {"op": case.op, "provider": label(provider), "mode": case.mode, "dtype": case.dtype}
        return {**subject, "shape": json.dumps(case.shape), **measured, **ratios, **asdict(self.machine)}

    def _peak_row(self, peak: machine_module.Peak) -> Row:
        value = _number(peak.value)
        subject = {"op": "machine", "provider": peak.source, "mode": "", "dtype": peak.dtype}
        measured = {"metric": peak.kind, "p20": "", "p50": value, "p80": "", "rounds": machine_module.PEAK_TRIALS}
        ratios = {"share_of_bound": "", "speedup_over_best_of_eager_compile": ""}
        return {**subject, "shape": json.dumps(peak.shape), **measured, **ratios, **asdict(self.machine)}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"
