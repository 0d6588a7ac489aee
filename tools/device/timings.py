"""Stage B: peaks, then times beside every opponent, forward and backward apart, with rates and memory; then the sweep.

Steps stand in the order of their worth: when the time is up, what is missing is what one could best do without. Each
case is checked against float64 before it is timed. ``torch.compile`` comes late: it compiles for seconds a case.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sslfast
from benchmarks import harness, machine, runner
from benchmarks.harness import Case

from . import watch
from .steps import Context, NotRun, Step
from .sweep import SWEEP, run_sweep

SECONDS = 0.4  # of timing, a case and mode
MODES = ("forward", "backward", "both")
FORMS = ("sslfast-streamed", "sslfast-banded")
WITH_FORMS = ("nt_xent", "clip", "sig_lip", "moco", "prototype_cross_entropy")


@dataclass(frozen=True)
class Headline:
    """A benchmark's case, timed by a graph's replay too where the host takes a share of the time (``graph``)."""

    op: str
    shape: dict[str, int]
    dtype: str = "bfloat16"
    graph: bool = False

    def case(self, context: Context) -> Case:
        bench = harness.discover()[self.op]
        some = bench.cases(context.device, True)[0]
        shape = {**some.shape, **self.shape}
        if context.rehearse:
            shape = {**shape, **bench.TINY}
        dtype = "float32" if context.rehearse else self.dtype
        return replace(some, shape=shape, dtype=dtype, device=context.device)

    def __str__(self) -> str:
        return f"{self.op} {' '.join(f'{k}={v}' for k, v in self.shape.items())} {self.dtype}"


HEADLINES: Sequence[Headline] = (
    Headline("nt_xent", {"N": 8192, "D": 128}, graph=True),
    Headline("nt_xent", {"N": 32768, "D": 128}),
    Headline("nt_xent", {"N": 4096, "D": 512}),
    Headline("clip", {"N": 32768, "D": 512}),
    Headline("clip", {"N": 65536, "D": 512}),
    Headline("clip", {"N": 65536, "D": 768}),
    Headline("sig_lip", {"N": 32768, "D": 512}),
    Headline("sig_lip", {"N": 65536, "D": 512}),
    Headline("sig_lip", {"N": 65536, "D": 768}),
    Headline("moco", {"N": 4096, "K": 65536, "D": 128}),
    Headline("prototype_cross_entropy", {"V": 10, "B": 64, "K": 65536, "D": 256, "S": 0}),
    Headline("prototype_cross_entropy", {"V": 1, "B": 1024, "K": 65536, "D": 384, "S": 0}),
    Headline("koleo", {"N": 4096, "D": 384}, graph=True),
    Headline("barlow_twins", {"N": 256, "D": 8192}, graph=True),
    Headline("barlow_twins", {"N": 1024, "D": 8192}, graph=True),
    Headline("augment_views", {"images": 256, "batch": 256, "views": 2}),
    Headline("gather_tokens", {"B": 256, "learned": 0}, graph=True),
    Headline("masked_patch_loss", {"B": 256}, graph=True),
    Headline("nt_xent", {"N": 8192, "D": 128}, "float32"),
    Headline("nt_xent", {"N": 4096, "D": 512}, "float32"),
    Headline("clip", {"N": 32768, "D": 512}, "float32"),
    Headline("barlow_twins", {"N": 256, "D": 8192}, "float32"),
)


def steps(context: Context) -> list[Step]:
    """Peaks, bfloat16, graphs, the sweep, float32, then ``torch.compile``."""
    if context.rehearse:
        harness.MIN_ROUNDS = 1
    bench = Timings(context)
    chosen = list({h.op: h for h in HEADLINES if h.dtype != "float32"}.values()) if context.rehearse else HEADLINES
    early = [h for h in chosen if h.dtype != "float32"]
    late = [h for h in chosen if h.dtype == "float32"]
    return [
        Step("peaks", bench.peaks, 60.0),
        *(Step(f"time {h}", functools.partial(bench.time, h), 60.0) for h in early),
        *(Step(f"graph {h}", functools.partial(bench.graph, h), 30.0) for h in early if h.graph),
        *(Step(f"sweep {s.name}", functools.partial(run_sweep, context, s), 90.0) for s in SWEEP),
        *(Step(f"time {h}", functools.partial(bench.time, h), 60.0) for h in late),
        *(Step(f"compile {h}", functools.partial(bench.compiled, h), 90.0) for h in early),
    ]


class Timings:
    """The benchmarks' runner, whose rows, errors and skips become those of the steps."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.runner: runner.Runner | None = None

    @functools.cached_property
    def machine(self) -> machine.Machine:
        return machine.describe(self.context.device, "python -m tools.device")

    def peaks(self) -> str:
        """Measured first: everything else is a share of them."""
        if self.context.rehearse:
            found = machine.Peaks((machine.Peak("copy", "gb_per_s", "uint8", {"MiB": 1}, 10.0),))
        else:
            found = machine.measure_peaks("cuda")
        self.runner = self._runner(found)
        self._flush(self.runner)
        return ", ".join(f"{p.dtype} {p.value:.4g} {p.kind}" for p in found.all)

    def _runner(self, peaks: machine.Peaks, **options: Any) -> runner.Runner:
        seconds = 0.0 if self.context.rehearse else SECONDS
        how = runner.Options(seconds, memory=not self.context.rehearse, **options)
        return runner.Runner(self.machine, peaks, how, lambda line: print(line, flush=True))

    def _with(self, **options: Any) -> runner.Runner:
        """A runner for one case; without peaks, should they have failed, times stand alone."""
        found = self._runner(self.runner.peaks if self.runner else machine.Peaks(()), **options)
        found.report.rows.clear()  # the peaks' rows are written once
        return found

    def time(self, headline: Headline) -> str:
        """Every provider but ``torch.compile``; beside the router's choice both forms of the gradient."""
        case = headline.case(self.context)
        bench = harness.discover()[headline.op]
        forms = FORMS if headline.op in WITH_FORMS and hasattr(sslfast, "use_gradient_form") else ()
        providers = tuple(name for name in (*bench.PROVIDERS, *forms) if name != "compile")
        modes = MODES if case.mode == "both" else (case.mode,)
        found = self._with(providers=providers)
        found.run_case(bench, case, modes, forms)
        return self._flush(found)

    def compiled(self, headline: Headline) -> str:
        """``torch.compile`` of the plain formula, alone: its row stands beside those of the earlier step."""
        bench = harness.discover()[headline.op]
        if "compile" not in bench.PROVIDERS:
            raise NotRun("it has no plain formula to compile")
        case = headline.case(self.context)
        found = self._with(providers=("compile",))
        if self.context.rehearse:
            return "not compiled in a rehearsal"
        found.run_case(bench, case, MODES if case.mode == "both" else (case.mode,))
        return self._flush(found)

    def graph(self, headline: Headline) -> str:
        """The same call, and plain PyTorch's, by a graph's replay: the GPU's time without the host's."""
        case, bench = headline.case(self.context), harness.discover()[headline.op]
        found = self._with()
        clock = machine.Clock(case.device, flush=not self.context.rehearse)
        notes = []
        plain = next(name for name in bench.PROVIDERS if name in ("eager", "mae"))
        for provider in ("sslfast", plain):
            work = bench.setup(case, provider)
            _, replay = watch.capture(self.context, work)
            again = harness.Work(lambda: None, lambda _, replay=replay: replay() or ())
            samples = harness.time_interleaved({provider: again}, clock, 0.0 if self.context.rehearse else 0.2)
            row = found._row(case, provider, "time_ms", samples[provider], None, None)
            row["provider"] += "-graph"
            found.report.rows.append(row)
            notes.append(f"{row['provider']} {row['p50']} ms")
        self._flush(found)
        return ", ".join(notes)

    def _flush(self, found: runner.Runner) -> str:
        """Hand over what a runner reported; its errors are the step's."""
        for row in found.report.rows:
            self.context.row(row)
        for line in found.report.named_skips():
            print(f"not measured: {line}", file=sys.stderr, flush=True)
        if found.report.errors:
            raise AssertionError("; ".join(found.report.errors))
        absent = sorted({provider for _, provider, _, _ in found.report.skips})
        return f"without {', '.join(absent)}" if absent else ""
