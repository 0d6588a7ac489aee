"""The benchmarks' logic on tiny problems; no timing is asserted."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path

import pytest
import torch

import benchmarks.__main__ as program
import sslfast
from benchmarks import Unavailable, bench_l2_normalize, bench_nt_xent, harness, machine, peers, plot, rows
from helpers import within_budget
from sslfast import reference

MACHINE = machine.Machine("AMD EPYC", 2, "", "2.13.0", "3.7.0", "0.1.0", "abc", "python -m benchmarks")
PEAKS = machine.Peaks(
    (
        machine.Peak("tile_peak", "gflops", "float32", {"m": 8}, 500.0),
        machine.Peak("copy", "gb_per_s", "uint8", {"MiB": 1}, 50.0),
    )
)


def tiny(mode: str = "both", **sizes: int) -> harness.Case:
    return harness.Case("nt_xent", {"N": 24, "D": 16, **sizes}, mode=mode)


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


def run_fake(providers: dict[str, object], skip: str | None = "no memory here") -> harness.Report:
    runner = harness.Runner(MACHINE, PEAKS, quick=True)
    runner.seconds = 0.0
    runner.run_case(fake_bench(providers, skip), tiny())
    return runner.report


def square(x: torch.Tensor) -> torch.Tensor:
    return x.square().sum()


# --------------------------------------------------------------------------------------------------- cases and closures


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


@pytest.mark.parametrize("op", ["clip", "dcl", "moco", "sig_lip", "sup_con"])
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
        assert harness.disagreement(got, truth) < 2 * harness.AGREEMENT["float32"], provider


@pytest.mark.parametrize("op", ["nt_xent", "l2_normalize"])
@pytest.mark.parametrize("mode", harness.MODES)
def test_the_reference_agrees_with_the_truth_in_every_mode(op: str, mode: str) -> None:
    bench = harness.discover()[op]
    case = harness.Case(op, bench.TINY, mode=mode)
    truth = bench.truth(case)
    got = bench.setup(case, "eager")()
    assert len(got) == {"forward": 1, "backward": len(truth), "both": len(truth)}[mode]
    assert all(t.dtype == torch.float64 for t in truth)
    assert harness.disagreement(got, truth) < harness.AGREEMENT["float32"]


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
    monkeypatch.setattr(bench_nt_xent, "_blocks", lambda z: [slice(i, min(i + 5, len(z))) for i in range(0, len(z), 5)])
    views = torch.randn(2, n, d, generator=torch.Generator().manual_seed(n))

    def results(function: object, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        inputs = [view.to(dtype).requires_grad_() for view in views]
        return harness.work(lambda a, b: function(a, b, temperature), inputs, "both")()

    exact, plain = results(reference.nt_xent, torch.float64), results(reference.nt_xent, torch.float32)
    chunked = results(bench_nt_xent.chunked_nt_xent, torch.float32)
    for name, got, expected, truth in zip(("value", "z0.grad", "z1.grad"), chunked, plain, exact, strict=True):
        within_budget(name, got, expected, truth, torch.float32)


def test_large_truths_do_not_store_the_matrix_and_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = bench_nt_xent.truth(tiny())
    monkeypatch.setattr(bench_nt_xent, "MATRIX_BYTES_TIMED", 0)
    monkeypatch.setattr(reference, "nt_xent", lambda *_: pytest.fail("the matrix was stored"))
    assert harness.disagreement(bench_nt_xent.truth(tiny()), stored) < 1e-13


@pytest.mark.parametrize("provider", ["lightly", "pytorch-metric-learning"])
def test_a_peer_computes_the_same_function(provider: str) -> None:
    try:
        work = bench_nt_xent.setup(tiny(), provider)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert harness.disagreement(work(), bench_nt_xent.truth(tiny())) < harness.AGREEMENT["float32"]
    assert re.fullmatch(rf"{provider}-\d+\.\d+.*", peers.label(provider))


def test_the_work_counted_for_nt_xent() -> None:
    u = 2.0 * 48**2 * 16
    flops = {mode: bench_nt_xent.cost(tiny(mode))[0] / u for mode in harness.MODES}
    assert flops == {"forward": 0.5, "backward": 1.5, "both": 2.0}
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


# ----------------------------------------------------------------------------------------------- equality, time, memory


def test_disagreement_sees_every_kind_of_wrong() -> None:
    truth = (torch.tensor(2.0, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
    right = (torch.tensor(2.0), torch.ones(4))
    assert harness.disagreement(right, truth) == 0
    assert harness.disagreement((torch.tensor(2.2), torch.ones(4)), truth) == pytest.approx(0.1)
    assert harness.disagreement((right[0], torch.tensor([1, 1, 1, 1.5])), truth) == pytest.approx(0.5)
    for wrong in ((right[0],), (right[0], torch.ones(3)), (right[0], torch.tensor([1, 1, float("nan"), 1]))):
        assert harness.disagreement(wrong, truth) == float("inf")


def test_rounds_are_interleaved_and_rotate() -> None:
    order: list[str] = []
    works = {name: harness.Work(lambda: None, lambda _, name=name: order.append(name)) for name in "abc"}

    def clock(run: object, state: object) -> float:
        run(state)
        return float(len(order))

    samples = harness.time_interleaved(works, clock, seconds=0.0)
    assert "".join(order) == "abcbcacababcbca"  # MIN_ROUNDS rounds
    assert samples["a"] == [1, 6, 8, 10, 15]
    assert harness.time_interleaved({}, clock, seconds=1.0) == {}


def test_speedups_are_taken_round_by_round_over_the_better_baseline() -> None:
    # The machine is twice as slow in the last round; a ratio of each round does not notice.
    samples = {"eager": [9.0, 9.0, 18.0], "compile": [4.0, 6.0, 12.0], "sslfast": [2.0, 3.0, 6.0]}
    assert harness.speedups(samples) == pytest.approx({"eager": 2 / 3, "compile": 1, "sslfast": 2})
    assert harness.speedups({"sslfast": [1.0]}) == {}


def test_the_bound_is_the_larger_of_arithmetic_and_traffic() -> None:
    assert PEAKS.bound_ms(1e9, 1e6, "float32") == pytest.approx(2.0)
    assert PEAKS.bound_ms(1e6, 1e9, "float32") == pytest.approx(20.0)
    assert PEAKS.bound_ms(1e9, 1e6, "bfloat16") is None
    assert PEAKS.bound_ms(0, 1e9, "bfloat16") == pytest.approx(20.0)


def test_measured_peaks_are_labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_tile_peak", lambda: None)
    monkeypatch.setattr(machine, "_copy_peak", lambda device, size, real=machine._copy_peak: real(device, 1))
    monkeypatch.setattr(machine, "_mm_peak", lambda device, size, dtype, real=machine._mm_peak: real(device, 64, dtype))
    peaks = machine.measure_peaks("cpu")
    assert [(p.source, p.kind) for p in peaks.all] == [("torch.mm", "gflops"), ("copy", "gb_per_s")]
    assert all(p.value > 0 for p in peaks.all)


def test_peak_memory_counts_the_matrices_of_the_reference() -> None:
    n = 1024
    matrix = (2 * n) ** 2 * 4 / machine.MIB
    try:
        peak = harness.peak_mib(tiny(N=n), "eager")
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert 2 * matrix < peak < 6 * matrix


def test_peak_memory_counts_what_is_alive_together() -> None:
    def run() -> torch.Tensor:
        torch.ones(24 * machine.MIB, dtype=torch.uint8)  # freed at once
        return torch.ones(16 * machine.MIB, dtype=torch.uint8)

    try:
        run()
        peak = machine.peak_extra_bytes("cpu", run) / machine.MIB
    except OSError as reason:
        pytest.skip(str(reason))
    assert 20 < peak < 44  # not 16 (the result alone); at most both, if the allocator keeps the first


def test_a_fallback_is_not_measured_as_sslfast() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(Unavailable, match="cannot serve"):
        harness.require_backend(lambda: sslfast.l2_normalize(x), "cuda")
    with pytest.raises(RuntimeError, match="another fault"):
        harness.require_backend(lambda: (_ for _ in ()).throw(RuntimeError("another fault")).__next__(), "cpu")


# ------------------------------------------------------------------------------------------------------- a run's report


def test_a_run_reports_rows_skips_and_errors() -> None:
    report = run_fake(
        {
            "eager": square,
            "compile": square,
            "lightly": Unavailable("lightly is not importable"),
            "memeff": ValueError("no such shape"),
            "chunked": lambda x: 1.01 * square(x),
            "sslfast": square,
        }
    )
    timed = {row["provider"]: row for row in report.rows if row["metric"] == "time_ms"}
    assert set(timed) == {"compile", "sslfast"}
    assert all(set(row) == set(rows.COLUMNS) for row in report.rows)
    row = timed["sslfast"]
    assert json.loads(row["shape"]) == {"N": 24, "D": 16} and row["rounds"] == harness.MIN_ROUNDS
    assert float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
    assert float(timed["compile"]["speedup_over_best_of_eager_compile"]) == 1
    # A wrong result is an error and is not timed; what is absent or fails elsewhere is a named skip.
    assert len(report.errors) == 1 and "chunked" in report.errors[0] and "differ" in report.errors[0]
    lines = "\n".join(report.named_skips())
    assert "lightly is not importable" in lines and "ValueError: no such shape" in lines
    assert re.search(r"nt_xent, eager: no memory here \(2: N=24 D=16 time_ms, N=24 D=16 peak_mib\)", lines)


def test_sslfast_failing_is_an_error_but_its_absence_is_a_skip() -> None:
    failing = run_fake({"sslfast": ValueError("broken")})
    assert len(failing.errors) == 1 and "ValueError: broken" in failing.errors[0]
    absent = run_fake({"sslfast": Unavailable("not built")})
    assert not absent.errors and [reason for *_, reason in absent.skips][0] == "not built"


def test_a_failing_measuring_process_is_an_error_of_sslfast(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(case: harness.Case, provider: str) -> float:
        raise harness.Failed("ended with status 3")

    monkeypatch.setattr(harness, "peak_mib", fail)
    report = run_fake({"compile": square, "sslfast": square}, skip=None)
    assert len(report.errors) == 1 and "peak_mib: ended with status 3" in report.errors[0]
    assert [(provider, metric) for _, provider, metric, _ in report.skips] == [("compile", "peak_mib")]


def test_a_machine_has_a_plain_file_name() -> None:
    assert MACHINE.slug == "cpu-amd-epyc-2-threads"
    gpu = machine.Machine("NVIDIA H100 80GB HBM3", 16, "580.1", "", "", "", "", "")
    assert gpu.slug == "nvidia-h100-80gb-hbm3"
    described = machine.describe("cpu", "python -m benchmarks --device cpu")
    assert described.threads == torch.get_num_threads() and described.device and not described.driver


def test_the_command_line_names_what_it_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    known = list(harness.discover())
    assert program.parse([], known).ops == known
    with pytest.raises(SystemExit):
        program.parse(["nt_xnet"], known)
    assert f"op='nt_xnet' has no benchmark; allowed: {', '.join(known)}" in capsys.readouterr().err


def test_a_whole_run_writes_the_csv_without_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "discover", lambda: {"nt_xent": bench_nt_xent})
    monkeypatch.setattr(program, "measure_peaks", lambda device: PEAKS)
    monkeypatch.setattr(bench_nt_xent, "cases", lambda device, quick: [tiny()])
    monkeypatch.setattr(bench_nt_xent, "PROVIDERS", ("eager",))
    monkeypatch.setattr(harness, "SECONDS_PER_CASE", {False: 0.0, True: 0.0})
    assert program.main(["nt_xent", "--quick", "--device", "cpu", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.csv")
    read = rows.read_csv(path)
    assert {"time_ms", "gflops", "gb_per_s"} <= {row["metric"] for row in read}
    assert {row["command"] for row in read} == {"python -m benchmarks nt_xent --quick --device cpu"}
    assert str(tmp_path) not in path.read_text()


# -------------------------------------------------------------------------------------------------- pictures and tables


def sweep_rows() -> list[rows.Row]:
    """A sweep of two providers over five sizes and one further shape, as they come back from a file."""
    runner = harness.Runner(MACHINE, PEAKS, quick=True)
    for n, d in ((256, 128), (512, 128), (1024, 128), (2048, 128), (4096, 128), (512, 512)):
        case = harness.Case("nt_xent", {"N": n, "D": d})
        for provider, factor in (("sslfast", 1.0), ("eager", 4.0)):
            times = [factor * n / 256 * scale for scale in (0.9, 1.0, 1.2)]
            runner.report.rows.append(runner._row(case, provider, "time_ms", times, 0.5, 4.0 / factor))
            runner.report.rows.append(runner._row(case, provider, "peak_mib", [factor * n], None, None))
    return [{key: str(value) for key, value in row.items()} for row in runner.report.rows]


def test_the_longest_sweep_is_found() -> None:
    of_op = [row for row in sweep_rows() if row["op"] == "nt_xent"]
    key, fixed, chosen = plot.sweep(of_op)
    assert (key, fixed) == ("N", {"D": 128})
    assert {json.loads(row["shape"])["N"] for row in chosen} == {256, 512, 1024, 2048, 4096}
    assert plot.sweep([row for row in of_op if json.loads(row["shape"])["N"] > 1024]) is None


def test_names_at_the_line_ends_do_not_overlap() -> None:
    assert plot.spread([1.0, 1.1, 9.0], 2.0) == [1.0, 2.0, 9.0]
    assert plot.spread([], 2.0) == []


def test_a_sweep_is_drawn_small_and_from_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "cpu.csv"
    rows.write_csv(path, sweep_rows())
    (picture,) = plot.draw(path)
    data = picture.read_bytes()
    assert picture.name == "cpu-nt_xent-float32.png"
    assert data.startswith(b"\x89PNG") and 5_000 < len(data) < 150_000


def test_the_readme_block_is_rewritten_from_the_csv(tmp_path: Path) -> None:
    rows.write_csv(tmp_path / "cpu.csv", sweep_rows())
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- benchmark:nt_xent -->\nold numbers\n<!-- /benchmark -->\nbelow\n")
    command = ["--results", str(tmp_path), "--readme", str(readme)]
    assert plot.main(command) == 0
    text = readme.read_text()
    assert text.startswith("above\n<!-- benchmark:nt_xent -->\n") and text.endswith("<!-- /benchmark -->\nbelow\n")
    assert "old numbers" not in text and "**AMD EPYC, 2 threads**" in text
    assert "| N | D | eager PyTorch [ms] | sslfast [ms] | speed-up |" in text
    assert "| 4096 | 128 | 64 (60.2–71.7) | 16 (15–17.9) | 4.0× | 50% | 16400 | 4100 |" in text
    assert plot.main(command) == 0 and readme.read_text() == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no block", "has no block"),
        ("<!-- benchmark:nt_xent -->\nnever closed", "each needs its own line"),
        ("<!-- benchmark:other -->\n<!-- /benchmark -->", "benchmark:other has no results"),
    ],
)
def test_a_readme_without_a_proper_block_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot.rewrite(text, {"nt_xent": "table"})
