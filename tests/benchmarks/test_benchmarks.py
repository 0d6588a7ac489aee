"""The benchmarks' cases on tiny problems: every provider computes the formula; no timing is asserted."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sslfast
from bench_common import tiny
from benchmarks import (
    Unavailable,
    bench_clip,
    bench_l2_normalize,
    bench_nt_xent,
    chunked,
    contrastive,
    equality,
    harness,
    peers,
)
from helpers import within_budget
from sslfast import reference


def test_every_bench_file_is_found_and_complete() -> None:
    benches = harness.discover()
    files = Path(harness.__file__).parent.glob("bench_*.py")
    assert sorted(benches) == sorted(file.stem.removeprefix("bench_") for file in files)
    for op, bench in benches.items():
        for name in ("PROVIDERS", "TINY", "cases", "setup", "truth", "cost", "why_skip"):
            assert hasattr(bench, name), f"{op}: {name} is missing"
        for device in ("cpu", "cuda"):
            full, quick = bench.cases(device, False), bench.cases(device, True)
            assert quick and all(case.op == op and case.device == device for case in full + quick)
            names = [str(case) for case in full]
            assert len(names) == len(set(names)), f"{op}: a case is declared twice"
            assert set(bench.TINY) == {name for name, size in full[0].shape.items() if isinstance(size, int)}


@pytest.mark.parametrize("op", [
    *("clip", "co2", "dcl", "det_con", "koleo", "moco", "msn", "nearest_neighbours", "sig_lip", "sup_con"),
    *("emp_ssl", "patch_kernel_alignment"),
])  # fmt: skip
def test_the_fused_loss_and_its_peers_compute_the_formula(op: str) -> None:
    bench = harness.discover()[op]
    case = harness.Case(op, bench.TINY)
    truth = bench.truth(case)
    for provider in bench.PROVIDERS:
        if provider == "compile":
            continue
        try:
            got = bench.setup(case, provider)()
        except Unavailable:
            assert provider != "sslfast"
            continue
        # Twice what a timing asks: the tiny problem's scalar gradients are small sums of both signs.
        assert equality.disagreement(got, truth) < 2 * equality.AGREEMENT["float32"], provider


@pytest.mark.parametrize("op", ["nt_xent", "l2_normalize"])
@pytest.mark.parametrize("mode", harness.MODES)
def test_the_reference_agrees_with_the_truth_in_every_mode(op: str, mode: str) -> None:
    bench = harness.discover()[op]
    case = harness.Case(op, bench.TINY, mode=mode)
    truth = bench.truth(case)
    got = bench.setup(case, "eager")()
    assert len(got) == {"forward": 1, "backward": len(truth), "both": len(truth)}[mode]
    assert all(t.dtype == torch.float64 for t in truth)
    assert equality.disagreement(got, truth) < equality.AGREEMENT["float32"]


def test_backward_mode_leaves_the_forward_outside_of_the_timed_part() -> None:
    calls = []
    x = torch.ones(3, requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x.square().sum()

    work = harness.work(function, (x,), "backward")
    state = work.prepare()
    assert len(calls) == 1
    (grad,) = work.run(state)
    assert len(calls) == 1
    torch.testing.assert_close(grad, 2 * x.detach())


def test_a_mode_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="mode='sideways'.*forward, backward, both"):
        tiny("sideways")


@pytest.mark.parametrize(("n", "d"), [(2, 8), (7, 5), (33, 16)])
@pytest.mark.parametrize("temperature", [0.5, 0.1])
def test_the_chunked_baseline_is_nt_xent(n: int, d: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "BAND_NUMBERS", 5 * 2 * n)
    views = torch.randn(2, n, d, generator=torch.Generator().manual_seed(n))

    def results(function: object, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        inputs = [view.to(dtype).requires_grad_() for view in views]
        return harness.work(lambda a, b: function(a, b, temperature), inputs, "both")()

    exact, plain = results(reference.nt_xent, torch.float64), results(reference.nt_xent, torch.float32)
    banded = results(chunked.nt_xent, torch.float32)
    for name, got, expected, truth in zip(("value", "z0.grad", "z1.grad"), banded, plain, exact, strict=True):
        within_budget(name, got, expected, truth, torch.float32)


CHUNKED = ("clip", "dcl", "moco", "sig_lip", "sup_con")


@pytest.mark.parametrize("op", CHUNKED)
@pytest.mark.parametrize("sizes", [{"N": 7, "D": 5}, {"N": 33, "D": 16}], ids=str)
def test_the_chunked_baselines_are_the_formulas(op: str, sizes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = harness.discover()[op]
    case = harness.Case(op, {**bench.TINY, **sizes})
    monkeypatch.setattr(chunked, "BAND_NUMBERS", 5 * sizes["N"])  # several bands, the last one ragged
    truth, plain, banded = bench.truth(case), bench.setup(case, "eager")(), bench.setup(case, "chunked")()
    for i, (got, expected, exact) in enumerate(zip(banded, plain, truth, strict=True)):
        within_budget(f"result {i}", got, expected, exact, torch.float32)


@pytest.mark.parametrize("op", (*CHUNKED, "nt_xent"))
def test_large_truths_do_not_store_the_matrix_and_agree(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = harness.discover()[op]
    case = harness.Case(op, bench.TINY)
    stored = bench.truth(case)
    monkeypatch.setattr(bench_nt_xent, "MATRIX_BYTES_TIMED", 0)
    monkeypatch.setattr(contrastive, "MATRIX_BYTES_TIMED", 0)
    monkeypatch.setattr(chunked, "BAND_NUMBERS", 300)
    monkeypatch.setattr(reference, "nt_xent", lambda *_: pytest.fail("the matrix was stored"))
    rows = 2 * case.shape["N"] if op in ("dcl", "nt_xent") else case.shape["N"]
    with NoLargerThan(rows * case.shape.get("K", rows)):
        assert equality.disagreement(bench.truth(case), stored) < 1e-12


class NoLargerThan(TorchDispatchMode):
    """No tensor of so many numbers is made."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers = numbers

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        assert not isinstance(made, torch.Tensor) or made.numel() < self.numbers, f"{function}: {tuple(made.shape)}"
        return made


def test_a_package_without_a_gradient_of_the_scale_is_held_to_the_other_results() -> None:
    bench = harness.discover()["clip"]
    case, fixed = harness.Case("clip", bench.TINY), torch.tensor(bench_clip.SCALE)
    theirs = replace(
        bench.BENCHMARK, peers={"memeff": lambda case: lambda image, text: chunked.clip(image, text, fixed)}
    )
    for mode, count in (("both", 3), ("forward", 1), ("backward", 2)):
        work = theirs.setup(replace(case, mode=mode), "memeff")
        got = work()
        assert work.results == len(got) == count
        truth = bench.truth(replace(case, mode=mode))[:count]
        assert equality.disagreement(got, truth) < 1e-5


def test_a_form_of_the_gradient_is_in_force_in_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = harness.discover()["clip"]
    case = harness.Case("clip", bench.TINY)
    with pytest.raises(Unavailable, match="one form"):
        monkeypatch.delattr(sslfast, "use_gradient_form", raising=False)
        bench.setup(case, "sslfast-banded")
    stack: list[str] = []

    @contextlib.contextmanager
    def use(form: str) -> Iterator[None]:
        stack.append(form)
        yield
        stack.pop()

    monkeypatch.setattr(sslfast, "use_gradient_form", use, raising=False)
    seen: list[list[str]] = []

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            seen.append([*stack])
            return x.sum()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            seen.append([*stack])
            return grad.expand(2)

    x = torch.ones(2, requires_grad=True)
    found = contrastive.in_form(harness.work(Loss.apply, (x,), "both"), "banded")
    for mode in ("both", "backward"):
        work = found.apart(mode)
        work.run(work.prepare())
    assert seen == [["banded"]] * 4 and not stack


@pytest.mark.parametrize("provider", ["lightly", "pytorch-metric-learning"])
def test_a_peer_computes_the_same_function(provider: str) -> None:
    try:
        work = bench_nt_xent.setup(tiny(), provider)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert equality.disagreement(work(), bench_nt_xent.truth(tiny())) < equality.AGREEMENT["float32"]
    assert re.fullmatch(rf"{provider}-\d+\.\d+.*", peers.label(provider))


def test_the_work_counted_for_nt_xent() -> None:
    u = 2.0 * 48**2 * 16
    flops = {mode: bench_nt_xent.cost(tiny(mode))[0] / u for mode in harness.MODES}
    assert flops == {"forward": 0.5, "backward": 1.5, "both": 2.0}
    for op, bench in harness.discover().items():
        units = getattr(getattr(bench, "BENCHMARK", None), "units", None)
        if units:
            forward, backward, both = (units(harness.Case(op, bench.TINY, mode=m)) for m in harness.MODES)
            assert 0 < forward <= both and math.isclose(forward + backward, both), op
    assert bench_nt_xent.cost(tiny())[1] == 4 * 24 * 16 * 4  # two views in, two gradients out
    assert bench_l2_normalize.cost(harness.Case("l2_normalize", {"M": 3, "D": 5}))[1] == 5 * 15 * 4


@pytest.mark.parametrize(
    ("provider", "n", "metric", "reason"),
    [
        ("eager", 4096, "time_ms", None),
        ("eager", 8192, "time_ms", "matrices"),
        ("compile", 8192, "time_ms", "matrices"),
        ("sslfast", 8192, "time_ms", None),
        ("lightly", 4096, "time_ms", None),
        ("lightly", 2048, "time_ms", "N = 512, 4096"),
        ("pytorch-metric-learning", 128, "time_ms", None),
        ("pytorch-metric-learning", 512, "peak_mib", "N³"),
        ("chunked", 512, "time_ms", "GPU"),
    ],
)
def test_what_is_skipped_on_a_cpu(provider: str, n: int, metric: str, reason: str | None) -> None:
    why = bench_nt_xent.why_skip(tiny(N=n, D=128), provider, metric)
    assert why is None if reason is None else reason in why
