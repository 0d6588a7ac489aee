"""What the tests of the benchmarks share: a machine, its peaks, tiny cases, and a benchmark made up."""

from __future__ import annotations

import types

import torch

from benchmarks import harness, machine, runner

MACHINE = machine.Machine("AMD EPYC", 2, "", "2.13.0", "3.7.0", "0.1.0", "abc", "python -m benchmarks")
PEAKS = machine.Peaks(
    (
        machine.Peak("tile_peak", "gflops", "float32", {"m": 8}, 500.0),
        machine.Peak("copy", "gb_per_s", "uint8", {"MiB": 1}, 50.0),
    )
)
NO_TIME = runner.Options(seconds=0.0)  # the fewest rounds there are


def tiny(mode: str = "both", device: str = "cpu", **sizes: int) -> harness.Case:
    return harness.Case("nt_xent", {"N": 24, "D": 16, **sizes}, mode=mode, device=device)


def square(x: torch.Tensor) -> torch.Tensor:
    return x.square().sum()


def fake_bench(providers: dict[str, object], skip: str | None = None) -> types.SimpleNamespace:
    """A benchmark of x ↦ Σ x², whose providers are the functions given or exceptions to raise."""
    x = torch.arange(6.0).requires_grad_()

    def setup(case: harness.Case, provider: str) -> harness.Work:
        function = providers[provider]
        if isinstance(function, Exception):
            raise function
        return harness.work(function, (x,), case.mode)

    exact = (x.detach().double().square().sum(), 2 * x.detach().double())
    return types.SimpleNamespace(
        PROVIDERS=tuple(providers),
        setup=setup,
        truth=lambda case: exact,
        cost=lambda case: (12.0, 48.0),
        why_skip=lambda case, provider, metric: skip if provider == "eager" or metric == "peak_mib" else None,
    )


def run_fake(
    providers: dict[str, object], skip: str | None = "no memory here", options: runner.Options = NO_TIME
) -> runner.Report:
    made = runner.Runner(MACHINE, PEAKS, options)
    made.run_case(fake_bench(providers, skip), tiny())
    return made.report
