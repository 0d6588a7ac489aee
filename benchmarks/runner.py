"""Running cases: equality first, then interleaved times, then memory; what was left out and what failed, by name."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from . import machine as machine_module, memory as memory_module
from .equality import AGREEMENT, TRUSTED, allowance, errors, excess
from .harness import BASELINES, WHOLE, Case, Work, speedups, time_interleaved
from .machine import MIB, Clock, Machine, Peaks
from .memory import ABSENT, OUT_OF_MEMORY, reason
from .peers import label
from .rows import Row

SECONDS = {False: 15.0, True: 3.0}  # of a case, by --quick
# Plain PyTorch, whose rounding is the measure of everybody's: checked first.
REFERENCES = ("eager", "chunked")


@dataclass(frozen=True)
class Options:
    """``seconds``: of timing, a case and mode; ``memory``: whether its peak is measured; ``providers``: only these."""

    seconds: float = SECONDS[False]
    memory: bool = True
    providers: tuple[str, ...] = ()


@dataclass
class Report:
    """What a run produced: rows of the CSV, skips as (case, provider, metric, reason), errors as lines."""

    rows: list[Row] = field(default_factory=list)
    skips: list[tuple[Case, str, str, str]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def named_skips(self) -> list[str]:
        """A line for each (operation, provider, reason), with how often and where."""
        places: dict[tuple[str, str, str], list[str]] = {}
        for case, provider, metric, why in self.skips:
            places.setdefault((case.op, provider, why), []).append(f"{case.sizes} {metric}")
        return [f"{op}, {provider}: {why} ({len(at)}: {', '.join(at)})" for (op, provider, why), at in places.items()]


class Runner:
    """Runs cases on one machine; ``report`` grows case by case."""

    def __init__(
        self, machine: Machine, peaks: Peaks, options: Options, progress: Callable[[str], None] = lambda _: None
    ) -> None:
        self.machine = machine
        self.peaks = peaks
        self.options = options
        self.progress = progress
        self.report = Report(rows=[self._peak_row(p) for p in peaks.all])

    def run_case(self, bench: ModuleType, case: Case, modes: Sequence[str] = (), extra: Sequence[str] = ()) -> None:
        """Equality, then time, then memory of every provider of ``case``.

        Args:
            modes: what is timed, where not only the case's own; equality is that of the case's mode.
            extra: providers beside those of the benchmark.
        """
        torch.compiler.reset()  # shapes of earlier cases must not count towards the limit on recompilations
        providers = [*bench.PROVIDERS, *extra]
        if self.options.providers:
            providers = [name for name in providers if name in self.options.providers]
        works = self._equal(bench, case, providers)
        for mode in modes or (case.mode,):
            chosen = {name: work if mode == case.mode else work.apart(mode) for name, work in works.items()}
            self._time(bench, replace(case, mode=mode), {name: work for name, work in chosen.items() if work})
        measure = case.mode in WHOLE and self.options.memory
        if measure and case.device == "cuda":  # one allocator, whose counters can be reset
            for provider, work in works.items():
                self._memory(bench, case, provider, lambda work=work: _peak_here(case, work))
        works.clear()
        self._release(case)
        if measure and case.device != "cuda":
            for provider in providers:
                self._memory(bench, case, provider, lambda name=provider: memory_module.peak_mib(case, name))

    def _equal(self, bench: ModuleType, case: Case, providers: Sequence[str]) -> dict[str, Work]:
        """The closures that return the right values, in the benchmark's order."""
        self.progress(f"{case}: equality")
        wanted = [name for name in providers if not self._skipped(bench, case, name, "time_ms")]
        if not wanted:
            return {}
        try:
            truth = bench.truth(case)
        except Exception as error:
            self.report.errors.append(f"{case}: not timed, there is no truth to compare with: {reason(error)}")
            self._release(case)
            return {}
        found: dict[str, Work] = {}
        reference: list[float] = []
        for provider in sorted(wanted, key=lambda name: name not in REFERENCES):
            work = self._checked(bench, case, provider, truth, reference)
            if work is not None:
                found[provider] = work
            self._release(case)  # what a provider that ran out of memory held
        return {name: found[name] for name in wanted if name in found}

    def _checked(
        self, bench: ModuleType, case: Case, provider: str, truth: tuple[Tensor, ...], reference: list[float]
    ) -> Work | None:
        """The provider's closure, once it has returned the right values; ``None`` after a recorded skip or error.

        ``reference`` takes the errors of the first of REFERENCES that is right.
        """
        try:
            work = bench.setup(case, provider)
            got = (work.proof or work)()
            compared = truth if work.results is None else truth[: work.results]
            wrong = errors(got, compared)
        except Exception as error:  # a peer may fail in any way; that must not end the run
            self._failed(case, provider, "time_ms", error)
            return None
        allowed = allowance(case.dtype, reference, len(wrong))
        if provider in REFERENCES:
            allowed = [TRUSTED * AGREEMENT[case.dtype]] * len(wrong)
        if work.tolerance is not None:
            allowed = [work.tolerance] * len(wrong)
        over = excess(wrong, allowed)
        if over is not None:
            self.report.errors.append(
                f"{case}, {provider}: not timed, its results differ from the float64 truth by {over[0]:.1e},"
                f" allowed {over[1]:.0e}"
            )
            return None
        if provider in REFERENCES and not reference:
            reference.extend(wrong)
        return work

    def _time(self, bench: ModuleType, case: Case, works: dict[str, Work]) -> None:
        self.progress(f"{case}: time")
        clock = Clock(case.device)
        for provider, work in list(works.items()):
            try:
                clock(work.run, work.prepare())  # the second warm-up; the equality check was the first
            except Exception as error:  # in a mode of its own, or beside what the others hold
                self._failed(case, provider, "time_ms", error)
                del works[provider]
                self._release(case)
        samples = time_interleaved(works, clock, self.options.seconds)
        others = [name for name in samples if not name.startswith("sslfast")] if case.device == "cuda" else BASELINES
        ratios = speedups(samples, getattr(bench, "BASELINES", others))
        flops, bytes_moved = bench.cost(case)
        bound = self.peaks.bound_ms(flops, bytes_moved, case.dtype)
        for provider, times in samples.items():
            median = float(np.median(times))
            row = self._row(case, provider, "time_ms", times, bound / median if bound else None, ratios.get(provider))
            peak = self.peaks.gflops(case.dtype)
            if flops:
                row["tflops"] = _number(flops / median / 1e9)
                row["share_of_peak"] = _number(flops / median / 1e6 / peak) if peak else ""
            self.report.rows.append(row)

    def _memory(self, bench: ModuleType, case: Case, provider: str, measure: Callable[[], float]) -> None:
        if self._skipped(bench, case, provider, "peak_mib"):
            return
        self.progress(f"{case}: memory of {provider}")
        try:
            peak = measure()
        except Exception as error:
            self._failed(case, provider, "peak_mib", error)
            return
        self.report.rows.append(self._row(case, provider, "peak_mib", [peak], None, None))

    def _skipped(self, bench: ModuleType, case: Case, provider: str, metric: str) -> bool:
        why = bench.why_skip(case, provider, metric)
        if why is not None:
            self.report.skips.append((case, provider, metric, why))
        return why is not None

    def _failed(self, case: Case, provider: str, metric: str, error: Exception) -> None:
        """sslfast failing is an error; what is absent, out of memory, or a failing competitor is a named skip.

        Running out of memory is a result too: a row.
        """
        if isinstance(error, OUT_OF_MEMORY):
            self.report.rows.append(self._row(case, provider, "out_of_memory", [], None, None))
        line = reason(error)
        if provider.startswith("sslfast") and not isinstance(error, ABSENT):
            self.report.errors.append(f"{case}, {provider}, {metric}: {line}")
        else:
            self.report.skips.append((case, provider, metric, line))

    def _release(self, case: Case) -> None:
        gc.collect()
        if case.device == "cuda":
            torch.cuda.empty_cache()

    def _row(
        self, case: Case, provider: str, metric: str, samples: list[float], share: float | None, speedup: float | None
    ) -> Row:
        percentiles = np.percentile(samples, (20, 50, 80)) if samples else (None, None, None)
        low, middle, high = (_number(None if p is None else float(p)) for p in percentiles)
        measured = {"metric": metric, "p20": low, "p50": middle, "p80": high, "rounds": len(samples)}
        ratios = {"share_of_bound": _number(share), "speedup_over_best_of_eager_compile": _number(speedup)}
        subject = {"op": case.op, "provider": label(provider), "mode": case.mode, "dtype": case.dtype}
        of_peak = {"tflops": "", "share_of_peak": ""}
        return {**subject, "shape": json.dumps(case.shape), **measured, **ratios, **of_peak, **asdict(self.machine)}

    def _peak_row(self, peak: machine_module.Peak) -> Row:
        value = _number(peak.value)
        subject = {"op": "machine", "provider": peak.source, "mode": "", "dtype": peak.dtype}
        measured = {"metric": peak.kind, "p20": "", "p50": value, "p80": "", "rounds": machine_module.PEAK_TRIALS}
        blank = dict.fromkeys(("share_of_bound", "speedup_over_best_of_eager_compile", "tflops", "share_of_peak"), "")
        return {**subject, "shape": json.dumps(peak.shape), **measured, **blank, **asdict(self.machine)}


def _peak_here(case: Case, work: Work) -> float:
    gc.collect()
    return machine_module.peak_extra_bytes(case.device, work) / MIB


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"
