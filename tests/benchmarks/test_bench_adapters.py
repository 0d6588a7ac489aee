"""The benchmarks of patched packages and of whole scripts, on tiny problems; no timing is asserted."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bench_common import MACHINE, NO_TIME, PEAKS
from benchmarks import (
    Failed,
    Unavailable,
    adapters,
    bench_import_time,
    equality,
    harness,
    memory,
    plot,
    rows,
    runner,
    scripts,
)
from sslfast.adapters import _serve

losses = pytest.mark.parametrize("theirs", adapters.ALL, ids=lambda t: f"{t.package}-{t.name}")


def tiny(theirs: adapters.Theirs, op: str = "adapters", n: int = 16) -> harness.Case:
    return harness.Case(op, {"package": theirs.versioned, "loss": theirs.name, "N": n, "D": 24})


def present(theirs: adapters.Theirs) -> harness.Case:
    case = tiny(theirs)
    absent = harness.discover()["adapters"].why_skip(case, adapters.UNPATCHED, "time_ms")
    if absent:
        pytest.skip(absent)
    return case


@losses
def test_both_sides_compute_the_same(theirs: adapters.Theirs) -> None:
    case = present(theirs)
    bench = harness.discover()["adapters"]
    truth = bench.truth(case)
    assert all(t.dtype == torch.float64 for t in truth) and len(truth) == 1 + len(theirs.inputs(case))
    own, fast = (bench.setup(case, provider) for provider in (adapters.UNPATCHED, adapters.PATCHED))
    for work in (own, fast):
        assert equality.disagreement(work(), truth) < 2 * equality.AGREEMENT["float32"]
    flops, moved = bench.cost(case)
    assert flops >= 2 * 2 * 16 * 16 * 24 and moved >= 4 * 16 * 24 * 4


@losses
def test_the_sides_are_the_package_s_code_and_sslfast_s(theirs: adapters.Theirs) -> None:
    from examples.common.measure import operators_of

    case = present(theirs)
    bench = harness.discover()["adapters"]
    own, fast = (operators_of(bench.setup(case, provider)) for provider in (adapters.UNPATCHED, adapters.PATCHED))
    assert not any(op.startswith("sslfast::") for op in own)
    assert any(op.startswith("sslfast::") for op in fast)


@pytest.mark.parametrize("theirs", [t for t in adapters.ALL if t.plain], ids=lambda t: f"{t.package}-{t.name}")
def test_the_plain_formula_of_small_batches_is_the_package_s(theirs: adapters.Theirs) -> None:
    present(theirs)
    case, bench = tiny(theirs, "small_batches"), harness.discover()["small_batches"]
    assert equality.disagreement(bench.setup(case, adapters.EAGER)(), bench.truth(case)) < 1e-5


def test_what_sslfast_leaves_to_the_package_is_not_timed_as_sslfast(monkeypatch: pytest.MonkeyPatch) -> None:
    present(adapters.LIGHTLY_NT_XENT)
    import sslfast.adapters.lightly as lightly

    bench, case = harness.discover()["adapters"], tiny(adapters.LIGHTLY_NT_XENT, n=40)
    own, seen = lightly.NTXentLoss.__mro__[1].forward, []

    def left(self: Any, out0: torch.Tensor, out1: torch.Tensor) -> _serve.Unserved:
        seen.append(tuple(out0.shape))
        return _serve.Unserved("a reason")

    monkeypatch.setattr(lightly.NTXentLoss, "forward", _serve.served(own, left))
    with pytest.warns(UserWarning, match="a reason"):
        work = bench.setup(case, adapters.PATCHED)
    assert set(seen) <= {(16, 24)}  # nothing of the problem's size before its memory is measured
    for _ in range(2):  # the second time it has been said already
        with pytest.raises(Failed, match="a reason"):
            work.proof()
    assert bench.setup(case, adapters.UNPATCHED).proof is None


def test_an_absent_package_is_a_named_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = adapters.Theirs("nowhere", "nowhere.losses", "Loss", lambda c, _: c, lambda _: (), bench_import_time)
    monkeypatch.setattr(adapters, "ALL", (theirs,))
    bench, case = harness.discover()["adapters"], tiny(theirs)
    assert case.shape["package"] == "nowhere"
    for provider in bench.PROVIDERS:
        assert "nowhere is not importable" in bench.why_skip(case, provider, "time_ms")
    with pytest.raises(Unavailable, match="nowhere is not importable"):
        theirs.own(case)


def test_every_declared_case_finds_its_loss() -> None:
    for op in ("adapters", "small_batches"):
        bench = harness.discover()[op]
        for case, (theirs, n, d) in zip(bench.cases("cpu", False), bench.BENCHMARK.sweep, strict=True):
            assert bench.BENCHMARK._theirs(case) is theirs and (case.shape["N"], case.shape["D"]) == (n, d)
            assert json.loads(json.dumps(case.shape)) == case.shape


def test_the_table_names_package_and_loss(tmp_path: Path) -> None:
    made = runner.Runner(MACHINE, PEAKS, NO_TIME)
    for n in (4, 8, 16, 32):
        case = tiny(adapters.LIGHTLY_VICREG, "small_batches", n)
        for provider, factor in ((adapters.UNPATCHED, 3.0), (adapters.EAGER, 0.5), (adapters.PATCHED, 1.0)):
            times = [factor * n / 4] * 5
            made.report.rows.append(made._row(case, provider, "time_ms", times, None, 0.5 / factor))
            made.report.rows.append(made._row(case, provider, "peak_mib", [factor], None, None))
    other = {"package": "nowhere", "N": 4, "D": 24}
    for i in range(5):
        case = harness.Case("small_batches", {**other, "loss": f"Loss{i}"})
        made.report.rows.append(made._row(case, adapters.PATCHED, "time_ms", [1.0], None, None))
    path = tmp_path / "cpu.csv"
    rows.write_csv(path, made.report.rows)
    table = plot.tables([path])["small_batches"]
    assert "| package | loss | N | D | the package's own [ms] | eager PyTorch [ms] | sslfast [ms] | speed-up |" in table
    assert "speed-up over the best of the others" in table
    name = adapters.LIGHTLY_VICREG.versioned
    assert f"| {name} | VICRegLoss | 8 | 24 | 6 (6–6) | 1 (1–1) | 2 (2–2) | 0.5× |  | 0.5 | 1 |" in table
    assert (
        plot.sweep([row for row in rows.read_csv(path) if row["op"] == "small_batches"])[0] == "N"
    )  # no name is an axis
    (picture,) = plot.draw(path)
    assert picture.stat().st_size > 5_000


def test_memory_warms_up_with_the_same_loss(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    present(adapters.LIGHTLY_NT_XENT)
    bench, case = harness.discover()["adapters"], tiny(adapters.LIGHTLY_NT_XENT, n=40)
    seen: list[dict[str, Any]] = []

    def setup(case: harness.Case, provider: str) -> harness.Work:
        seen.append(case.shape)
        return adapters.Patched.setup(bench.BENCHMARK, case, provider)

    monkeypatch.setattr(bench, "setup", setup)
    monkeypatch.setattr(memory.machine_module, "peak_extra_bytes", lambda device, run: len(run()))
    request = json.dumps({"case": asdict(case), "provider": adapters.UNPATCHED})
    monkeypatch.setattr(sys, "argv", ["worker", request])
    memory.memory_worker()
    assert json.loads(capsys.readouterr().out) == {"bytes": 3}  # value and two gradients
    assert seen == [case.shape, {**case.shape, "N": 16, "D": 24}]


def test_imports_are_processes_that_end_well() -> None:
    (case,) = bench_import_time.cases("cpu", quick=True)
    for provider in bench_import_time.PROVIDERS:
        assert equality.disagreement(bench_import_time.setup(case, provider)(), bench_import_time.truth(case)) == 0
    assert equality.disagreement(bench_import_time.setup(case, "nowhere")(), bench_import_time.truth(case)) > 0


# ------------------------------------------------------------------------------------------------------- whole scripts


def report(side: str, losses: Sequence[float] = (4.0, 3.0, 2.0), **other: Any) -> scripts.Run:
    """What a script says of itself: 100 ms a step, of which 60 are the loss's; with sslfast 50 and 10."""
    fast = side == "with"
    found = {"batch_size": 8, "steps": len(losses), "data": "digits", "losses": list(losses)}
    found |= {"seconds_per_step": 0.05 if fast else 0.1, "loss_seconds_per_step": 0.01 if fast else 0.06}
    found |= {"loss_share": 0.2 if fast else 0.6, "seconds_total": 1.0, "peak_memory_mib": 500 if fast else 900}
    return found | {"peak_memory_before_training_mib": 400} | other


class Bar(types.SimpleNamespace):
    def set_description(self, text: str) -> None: ...
    def update(self) -> None: ...
    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None: ...  # fmt: skip


def test_the_sides_take_turns_and_the_first_one_changes() -> None:
    order: list[str] = []

    def once(name: str, side: str, flags: Sequence[str]) -> scripts.Run:
        order.append(side)
        return report(side)

    runs = scripts.repeated("lightly_simclr", 3, [], once, Bar())
    assert order == ["without", "with", "with", "without", "without", "with"]
    assert all(len(each) == 3 for each in runs.values())


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ((4.0, 3.0, 2.0), None),
        ((4.00003, 3.02, 2.0), None),
        ((4.0002, 3.0, 2.0), "at the first step"),
        ((4.0, 3.0, 2.1), "5.0e-02 later"),
        ((4.0, float("nan"), 2.0), "inf later"),
        ((4.0, 3.0), "2 steps beside 3"),
    ],
)
def test_curves_that_disagree_are_an_error(losses: tuple[float, ...], told: str | None) -> None:
    runs = {"without": [report("without")] * 2, "with": [report("with"), report("with", losses)]}
    if told is None:
        assert scripts.summary("lightly_simclr", runs)["repeats"] == 2
    else:
        with pytest.raises(scripts.Failed, match=told):
            scripts.summary("lightly_simclr", runs)


def page(folder: Path) -> list[str]:
    (folder / "page.md").write_text("above\n<!-- benchmark:scripts -->\nold\n<!-- /benchmark -->\nbelow\n")
    return ["--json", str(folder / "found.json"), "--page", str(folder / "page.md"), "--repeats", "2", "--steps", "3"]


def test_the_page_and_the_json_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, list[str]]] = []

    def once(name: str, side: str, flags: Sequence[str]) -> scripts.Run:
        asked.append((name, side, list(flags)))
        return report(side)

    monkeypatch.setattr(scripts, "run", once)
    monkeypatch.setattr(scripts.importlib.util, "find_spec", lambda module: None if module == "open_clip" else object())
    assert scripts.main([*page(tmp_path), "--data", "digits"]) == 0
    assert {name for name, _, _ in asked} == set(scripts.SCRIPTS) - {"open_clip_two_towers"}
    assert all(("--data" in flags) == scripts.SCRIPTS[name].has_data for name, _, flags in asked)
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text
    line = "| 8 | 60% | 100 → 50 | 2× | 2.5× | 60 → 10 | 6× | 500 → 100 | 0e+00 |"
    assert f"| `lightly_simclr` | lightly `NTXentLoss`, D = 128 {line}" in text
    found = json.loads((tmp_path / "found.json").read_text())
    assert str(tmp_path) not in json.dumps(found)
    assert found["scripts"][0]["losses"] == {"without": [4.0, 3.0, 2.0], "with": [4.0, 3.0, 2.0]}


def test_nothing_is_written_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {"with": (4.0, 3.0, 1.0), "without": (4.0, 3.0, 2.0)}
    monkeypatch.setattr(scripts, "run", lambda name, side, flags: report(side, wrong[side]))
    monkeypatch.setattr(scripts.importlib.util, "find_spec", lambda module: object())
    assert scripts.main(["lightly_vicreg", *page(tmp_path)]) == 1
    assert "lightly_vicreg: the losses with and without sslfast differ" in capsys.readouterr().out
    assert "old" in (tmp_path / "page.md").read_text() and not (tmp_path / "found.json").exists()


@pytest.mark.parametrize(
    ("status", "output", "errors", "told"),
    [
        (0, 'noise\n{"losses": [1.0]}\n', "sslfast.patch: lightly 1.6.0", None),
        (3, "", "Traceback\nValueError: broken", "status 3: ValueError: broken"),
        (
            0,
            '{"losses": [1.0]}\n',
            "x.py:1: UserWarning: sslfast does not serve this use of y: z",
            "not serve this use",
        ),
    ],
)
def test_a_process_that_fails_or_falls_back_is_an_error(
    status: int, output: str, errors: str, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def process(command: list[str], **_: Any) -> types.SimpleNamespace:
        commands.append(command)
        return types.SimpleNamespace(returncode=status, stdout=output, stderr=errors)

    monkeypatch.setattr(scripts.subprocess, "run", process)
    if told is None:
        assert scripts.run("lightly_simclr", "with", ["--steps", "3"]) == {"losses": [1.0]}
        scripts.run("lightly_simclr", "without", [])
        assert commands[0][-3:] == ["--steps", "3", "--sslfast"] and "--sslfast" not in commands[1]
    else:
        with pytest.raises(scripts.Failed, match=told):
            scripts.run("lightly_simclr", "with", [])


def test_the_command_line_of_the_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, told in ((["lightly_simcrl"], "allowed: lightly_simclr,"), (["--steps", "2"], "3 and 2")):
        with pytest.raises(SystemExit, match="2"):
            scripts.parse(arguments)
        assert told in capsys.readouterr().err
