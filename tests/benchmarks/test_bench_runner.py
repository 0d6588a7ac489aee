"""A run of the benchmarks: equality, time, memory, what it reports, its command line; no timing is asserted."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import benchmarks.__main__ as program
import sslfast
from bench_common import MACHINE, NO_TIME, PEAKS, fake_bench, run_fake, square, tiny
from benchmarks import Failed, Unavailable, bench_nt_xent, equality, harness, machine, memory, rows, runner


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """No timing is looked at here, so nothing of the last-level cache's size is overwritten before each sample."""
    monkeypatch.setattr(machine, "_last_level_cache", lambda device: 1 << 16)


# ------------------------------------------------------------------------------------------- equality, time, memory


def test_disagreement_sees_every_kind_of_wrong() -> None:
    truth = (torch.tensor(2.0, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
    right = (torch.tensor(2.0), torch.ones(4))
    assert equality.disagreement(right, truth) == 0
    assert equality.disagreement((torch.tensor(2.2), torch.ones(4)), truth) == pytest.approx(0.1)
    assert equality.disagreement((right[0], torch.tensor([1, 1, 1, 1.5])), truth) == pytest.approx(0.5)
    for wrong in ((right[0],), (right[0], torch.ones(3)), (right[0], torch.tensor([1, 1, float("nan"), 1]))):
        assert equality.disagreement(wrong, truth) == float("inf")


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
        peak = memory.peak_mib(tiny(N=n), "eager")
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


def test_without_memory_and_with_few_providers_less_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "peak_mib", lambda case, provider: pytest.fail("memory was measured"))
    options = runner.Options(seconds=0.0, memory=False, providers=("sslfast",))
    report = run_fake({"compile": square, "sslfast": square}, None, options)
    assert [(row["provider"], row["metric"]) for row in report.rows[len(PEAKS.all) :]] == [("sslfast", "time_ms")]
    assert not report.skips


def test_a_truth_that_does_not_fit_is_an_error_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    made = runner.Runner(MACHINE, PEAKS, NO_TIME)
    bench = fake_bench({"sslfast": square}, "no memory here")
    whole = bench.truth

    def no_room(case: harness.Case) -> tuple[torch.Tensor, ...]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 32.00 GiB")

    bench.truth = no_room
    made.run_case(bench, tiny(N=25))
    bench.truth = whole
    made.run_case(bench, tiny())
    (line,) = made.report.errors
    assert "N=25" in line and "no truth" in line and "OutOfMemoryError: CUDA out of memory" in line
    assert [row["metric"] for row in made.report.rows[len(PEAKS.all) :]] == ["time_ms"]


def test_out_of_memory_is_a_row_and_a_skip() -> None:
    report = run_fake({"compile": torch.OutOfMemoryError("tried 32 GiB"), "sslfast": square})
    found = {(row["provider"], row["metric"]): row for row in report.rows[len(PEAKS.all) :]}
    assert set(found) == {("compile", "out_of_memory"), ("sslfast", "time_ms")} and not report.errors
    assert found["compile", "out_of_memory"]["p50"] == "" and found["compile", "out_of_memory"]["rounds"] == 0
    assert "OutOfMemoryError: tried 32 GiB" in "\n".join(report.named_skips())
    assert not run_fake({"sslfast": torch.OutOfMemoryError("tried 32 GiB")}).errors  # a result, not a fault


def test_forward_and_backward_are_timed_apart_after_one_check() -> None:
    calls: list[str] = []

    def counted(x: torch.Tensor) -> torch.Tensor:
        calls.append("forward")
        return square(x)

    made = runner.Runner(MACHINE, PEAKS, NO_TIME)
    made.run_case(fake_bench({"sslfast": counted}, "no memory here"), tiny(), modes=("forward", "backward"))
    timed = made.report.rows[len(PEAKS.all) :]
    assert [(row["mode"], row["metric"]) for row in timed] == [("forward", "time_ms"), ("backward", "time_ms")]
    assert len(calls) == 1 + 2 * (1 + harness.MIN_ROUNDS)  # the check; a warm-up and the rounds of each


def test_what_fails_in_one_mode_alone_is_an_error_and_the_rest_is_timed() -> None:
    bench = fake_bench({"eager": square, "sslfast": square})
    whole = bench.setup

    def setup(case: harness.Case, provider: str) -> harness.Work:
        def broken(mode: str) -> harness.Work:
            raise_it = mode == "backward" and provider == "sslfast"
            return harness.Work(lambda: None, lambda _: (1 / 0,) if raise_it else ())

        return replace(whole(case, provider), in_mode=broken)

    bench.setup = setup
    made = runner.Runner(MACHINE, PEAKS, runner.Options(seconds=0.0, memory=False))
    made.run_case(bench, tiny(), modes=("forward", "backward"))
    timed = {(row["provider"], row["mode"]) for row in made.report.rows[len(PEAKS.all) :]}
    assert timed == {("eager", "forward"), ("sslfast", "forward"), ("eager", "backward")}
    assert len(made.report.errors) == 1 and "ZeroDivisionError" in made.report.errors[0]


def test_on_a_gpu_memory_is_measured_in_this_process_and_every_other_is_an_opponent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "Clock", lambda device: lambda run, state: len(run(state)) / 2)
    monkeypatch.setattr(memory.machine_module, "peak_extra_bytes", lambda device, work: len(work()) * machine.MIB)
    monkeypatch.setattr(memory, "peak_mib", lambda case, provider: pytest.fail("a process was started"))
    bench = fake_bench({"memeff": square, "sslfast": square})
    bench.why_skip = lambda case, provider, metric: None
    monkeypatch.setattr(runner, "label", lambda provider: provider)
    made = runner.Runner(MACHINE, PEAKS, NO_TIME)
    made.run_case(bench, tiny(device="cuda"))
    found = {(row["provider"], row["metric"]): row for row in made.report.rows[len(PEAKS.all) :]}
    assert found["sslfast", "peak_mib"]["p50"] == "2"  # value and gradient, a MiB each
    assert found["sslfast", "time_ms"]["speedup_over_best_of_eager_compile"] == "1"
    # 12 operations in 1 ms, of a peak of 500 GFLOP/s
    row = found["sslfast", "time_ms"]
    assert float(row["tflops"]) == pytest.approx(12e-9) and float(row["share_of_peak"]) == pytest.approx(2.4e-8)


def test_the_error_budget_is_that_of_plain_pytorch() -> None:
    """What plain PyTorch rounds in the same dtype is allowed twice, result by result; if it is itself right."""
    least = equality.AGREEMENT["float32"]
    assert equality.allowance("float32", [], 2) == [least, least]
    assert equality.allowance("float32", [0.0, 3e-5], 2) == pytest.approx([least, 7e-5])
    for useless in ([0.0, 2e-4], [0.0, float("inf")], [0.0]):
        assert equality.allowance("float32", useless, 2) == [least, least]
    assert equality.excess([1e-6, 6e-5], [least, 7e-5]) is None
    assert equality.excess([6e-5, 6e-5], [least, 7e-5]) == (6e-5, least)
    assert equality.excess([float("inf"), 0.0], [least, least]) is not None


@pytest.mark.parametrize(("eager", "timed"), [(1 + 2e-5, True), (1.0, False), (1.1, False), (float("nan"), False)])
def test_a_result_as_exact_as_plain_pytorchs_is_timed(eager: float, timed: bool) -> None:
    bench = fake_bench({"sslfast": lambda x: (1 + 4e-5) * square(x), "eager": lambda x: eager * square(x)})
    made = runner.Runner(MACHINE, PEAKS, runner.Options(seconds=0.0, memory=False))
    made.run_case(bench, tiny())
    assert ("sslfast" in {row["provider"] for row in made.report.rows}) == timed
    assert any("sslfast" in line for line in made.report.errors) != timed


def test_a_failing_measuring_process_is_an_error_of_sslfast(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(case: harness.Case, provider: str) -> float:
        raise Failed("ended with status 3")

    monkeypatch.setattr(memory, "peak_mib", fail)
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
    benches = harness.discover()
    known = list(benches)
    assert program.parse([], benches).ops == known
    for wrong, message in (
        (["nt_xnet"], f"op='nt_xnet' has no benchmark; allowed: {', '.join(known)}"),
        (["clip", "--providers", "eager,lightly"], "'lightly' is no provider of these operations; allowed: open_clip"),
        (["--seconds", "-1"], "--seconds -1.0: must be at least 0"),
        (["--seconds", "nan"], "--seconds nan: must be at least 0"),
    ):
        with pytest.raises(SystemExit):
            program.parse(wrong, benches)
        assert message in capsys.readouterr().err


def test_less_can_be_measured() -> None:
    benches = harness.discover()
    words = ["clip", "sup_con", "--device", "cpu", "--only", "N=1024 D=512", "--providers", "eager,sslfast"]
    options = program.parse([*words, "--seconds", "0.5", "--no-memory", "--output", "/elsewhere"], benches)
    assert [str(case) for _, case in program.chosen(options, benches)] == ["clip N=1024 D=512 float32 both"]
    assert " ".join(program.flags(options)) == (
        "clip sup_con --device cpu --only 'N=1024 D=512' --providers eager,sslfast --seconds 0.5 --no-memory"
    )
    assert program.main(["clip", "--device", "cpu", "--only", "N=3", "--no-memory"]) == 2


def test_a_whole_run_writes_the_csv_without_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "discover", lambda: {"nt_xent": bench_nt_xent})
    monkeypatch.setattr(program, "measure_peaks", lambda device: PEAKS)
    monkeypatch.setattr(bench_nt_xent, "cases", lambda device, quick: [tiny()])
    monkeypatch.setattr(bench_nt_xent, "PROVIDERS", ("eager",))
    monkeypatch.setattr(program, "SECONDS", {False: 0.0, True: 0.0})
    assert program.main(["nt_xent", "--quick", "--device", "cpu", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.csv")
    read = rows.read_csv(path)
    assert {"time_ms", "gflops", "gb_per_s"} <= {row["metric"] for row in read}
    assert {row["command"] for row in read} == {"python -m benchmarks nt_xent --quick --device cpu"}
    assert str(tmp_path) not in path.read_text()
