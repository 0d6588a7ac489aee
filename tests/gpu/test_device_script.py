"""The script of a GPU's minutes: rehearsed on the CPU, and whatever its steps do, the run goes on and says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.rows import read_csv
from tools.device import __main__ as program, record
from tools.device.record import Record, Result
from tools.device.steps import GREEN, NOT_RUN, RED, ROOT
from tools.device.supervise import Group, Settings, Stage, run_stage

BUDGET = 1800.0  # seconds; a minute's work, on a machine that may do ten things besides


def rehearse(output: Path, *words: str, **environment: str) -> list[dict[str, str]]:
    """The script in a process of its own; what each step came to, once nothing is red."""
    command = [sys.executable, "-m", "tools.device", "--rehearse", "--output", str(output), "--seconds", str(BUDGET)]
    done = subprocess.run(
        [*command, *words], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=BUDGET
    )
    log = (output / record.LOG).read_text()
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{log[-5000:]}"
    assert (output / record.SUMMARY).read_text() in done.stdout
    return [json.loads(line) for line in (output / record.STEPS).read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------ rehearsal


def test_correctness_rehearsed(tmp_path: Path) -> None:
    """Every step of the stage, the Triton kernels in the interpreter."""
    found = rehearse(tmp_path, "--stages", "A")
    assert {step["status"] for step in found if step["stage"] == "A"} <= {GREEN, NOT_RUN}
    names = [step["step"] for step in found if step["status"] == GREEN]
    for kind, least in (("large ", 15), ("loss ", 35), ("operators ", 14), ("s = sᵀ", 3), ("row of ", 6)):
        assert sum(name.startswith(kind) for name in names) >= least, (kind, names)


def test_times_tests_and_sanitizer_rehearsed(tmp_path: Path) -> None:
    found = rehearse(tmp_path, "--stages", "B,C,D")
    green = {(step["stage"], step["step"].partition(" ")[0]) for step in found if step["status"] == GREEN}
    assert {("B", "peaks"), ("B", "time"), ("B", "graph"), ("B", "sweep"), ("C", "pytest")} <= green
    assert {("D", "memcheck,"), ("D", "racecheck,")} <= green
    (path,) = tmp_path.glob("*.csv")
    rows = read_csv(path)
    assert {"forward", "backward", "both", "call"} <= {row["mode"] for row in rows}
    assert {"sslfast", "sslfast-graph", "eager"} <= {row["provider"] for row in rows}
    assert str(ROOT) not in path.read_text() and str(tmp_path) not in path.read_text()
    sweeps = [json.loads(line) for line in (tmp_path / record.SWEEP).read_text().splitlines()]
    assert sweeps and all(found["ms"] is not None for found in sweeps)
    assert len([*tmp_path.iterdir()]) <= 8  # some machines hand no more than so many files back


@pytest.mark.slow
def test_cuda_operators_rehearsed_on_the_emulator(tmp_path: Path) -> None:
    from cuda_emulator import build, compiler

    if compiler() is None:
        pytest.skip("no g++, which compiles the emulated kernels")
    found = rehearse(tmp_path, "--stages", "A", "--only", "operators", SSLFAST_EMULATED=str(build()))
    assert sum(step["status"] == GREEN and step["stage"] == "A" for step in found) >= 14


# ------------------------------------------------------------------------------------------- whatever happens to a step


def ran(tmp_path: Path, target: str, seconds: float = 300.0) -> tuple[Record, dict[str, Result]]:
    made = Record(tmp_path, {"F": "faults"})
    run_stage(Stage("F", "faults", seconds, (Group(target),)), made, Settings())
    return made, {result.step: result for result in made.results}


def test_the_run_goes_on_whatever_a_step_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, found = ran(tmp_path, "device_faults:steps")
    assert {name: result.status for name, result in found.items()} == {
        "fine": GREEN,
        "raises": RED,
        "runs out of memory": RED,
        "cannot be done here": NOT_RUN,
        "hangs": RED,
        "takes its process along": RED,
        "leaves the process": RED,
        "breaks the device": RED,
        "is done in a new process": GREEN,
        "has rows": GREEN,
        "one more": RED,
        "last": GREEN,
    }
    assert found["is done in a new process"].detail == "after False"
    summary = (tmp_path / record.SUMMARY).read_text()
    for line in (
        "F faults: 4 green, 7 red, 1 not run",
        "red: raises: ValueError: the first line",
        "red: runs out of memory: out of memory: CUDA out of memory. Tried to allocate 32.00 GiB",
        "not run: cannot be done here: there is no such device",
        "red: hangs: hung: took more than 1 s",
        "red: takes its process along: ended by signal 11 (SIGSEGV)",
        "red: leaves the process: ended with status 3",
        "red: breaks the device: RuntimeError: CUDA error: an illegal memory access",
        "fine: noted",
        "sweep tiles: best 64×64 1 ms, the table's 128×64 2 ms, of 2",
        "clip N=8 bfloat16 both: sslfast 2 ms (1–9); best of 1 others eager 6 ms (1–9), 3.00×",
    ):
        assert line in summary, f"{line}\n\n{summary}"
    assert [json.loads(line)["step"] for line in (tmp_path / record.STEPS).read_text().splitlines()] == list(found)
    assert [row["provider"] for row in read_csv(tmp_path / "nvidia-h200.csv")] == ["sslfast", "eager"]
    assert "F red" in capsys.readouterr().out
    child = int((tmp_path / "child").read_text())
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z", "what a step had started runs on"


def test_a_stage_ends_when_its_time_is_up(tmp_path: Path) -> None:
    _, found = ran(tmp_path, "device_faults:slow", seconds=4.0)
    assert [(r.step, r.status) for r in found.values()] == [("step 0", GREEN), ("step 1", NOT_RUN), ("step 2", NOT_RUN)]
    assert "time was up" in found["step 1"].detail and "time was up" in found["step 2"].detail


def test_a_stage_that_cannot_start_is_red(tmp_path: Path) -> None:
    _, found = ran(tmp_path, "nowhere:steps")
    assert found["start"].status == RED and "ended with status 1" in found["start"].detail
    assert "No module named 'nowhere'" in (tmp_path / record.LOG).read_text()


def test_processes_share_the_steps_of_a_group(tmp_path: Path) -> None:
    made = Record(tmp_path)
    groups = Group("device_faults:steps", 3, " [again]"), Group("device_faults:steps")
    run_stage(Stage("F", "faults", 60.0, groups), made, Settings(only="a"))
    names = [result.step for result in made.results]
    assert sorted(names) == sorted({*names}) and "last [again]" in names and "last" in names
    assert not any(name.startswith("fine") for name in names)


def test_the_exit_status_comes_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [Stage(letter, "faults", 120.0, (Group(f"device_faults:{name}"),)) for letter, name in ("Fa", "Gs")
              for name in ["steps"]]  # fmt: skip
    made = Record(tmp_path)
    assert program.run(stages, made, Settings(only="last")) == 0
    assert program.run(stages, made, Settings(only="raises")) == 1
    assert {(r.stage, r.step) for r in made.results} == {(s, n) for s in "FG" for n in ("last", "raises")}
    assert "red: raises" in capsys.readouterr().out.splitlines()[-2]


def test_the_command_line_names_what_it_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.parse(["--stages", "D,A"]).stages == ["D", "A"]
    for words, message in (
        (["--stages", "A,X"], "--stages 'X': allowed are A, B, C, D"),
        (["--seconds", "0"], "--seconds 0.0: must be more than 0"),
    ):
        with pytest.raises(SystemExit):
            program.parse(words)
        assert message in capsys.readouterr().err
    stages = program.stages(rehearse=False)
    assert [stage.letter for stage in stages] == ["A", "B", "C", "D"] and all(s.seconds <= 240 for s in stages)
