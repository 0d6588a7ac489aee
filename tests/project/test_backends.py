"""The choice of a backend: automatic, forced, missing; and the table of pairs that a full run must cover."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import conftest
import sslfast
from conftest import PAIRS, TESTS
from sslfast import _backends, _native, ops


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)


def test_every_operation_is_in_the_table() -> None:
    assert {op for op, _ in PAIRS} == set(ops.__all__)
    assert {backend for _, backend in PAIRS} <= set(_backends.NAMES)


def test_compiled_parts_are_loaded() -> None:
    assert "_C" not in _native.why_missing, _native.why_missing["_C"]
    assert "_host" not in _native.why_missing, _native.why_missing["_host"]


def test_use_backend_forces_and_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    real = _backends.select
    monkeypatch.setattr(_backends, "select", lambda *args: chosen.append(real(*args)) or chosen[-1])
    x = torch.randn(3, 5)
    sslfast.l2_normalize(x)
    with sslfast.use_backend("reference"):
        sslfast.l2_normalize(x)
        with sslfast.use_backend(None):
            sslfast.l2_normalize(x)
        sslfast.l2_normalize(x)
    sslfast.l2_normalize(x)
    assert chosen == ["cpu", "reference", "cpu", "reference", "cpu"]


def test_use_backend_restores_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), sslfast.use_backend("reference"):
        raise ZeroDivisionError
    assert _backends._forced == _backends._checked(os.environ.get("SSLFAST_BACKEND") or None, "SSLFAST_BACKEND")


def test_unknown_backend_names_what_is_allowed() -> None:
    with (
        pytest.raises(ValueError, match=r"name='gpu' is not a backend; allowed: cpu, cuda, triton, reference"),
        sslfast.use_backend("gpu"),
    ):
        pass


@pytest.mark.parametrize(("backend", "reason"), [("triton", "no triton implementation"), ("cuda", "x is on cpu")])
def test_forced_backend_that_cannot_serve_is_an_error(backend: str, reason: str) -> None:
    with sslfast.use_backend(backend), pytest.raises(RuntimeError, match=f"'{backend}' was forced.*{reason}"):
        sslfast.l2_normalize(torch.randn(2, 3))


def test_missing_backend_falls_back_once_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_native.why_missing, "_C", "not built")
    monkeypatch.setattr(_backends, "_told", set())
    x = torch.randn(4, 6)
    with pytest.warns(UserWarning, match="l2_normalize: backend 'cpu' cannot serve this call .not built."):
        first = sslfast.l2_normalize(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = sslfast.l2_normalize(x)
    torch.testing.assert_close(first, torch.nn.functional.normalize(x))
    monkeypatch.setattr(_backends, "select", conftest._choose)  # the recorder's frame is none of the user's
    with pytest.warns(UserWarning, match="nt_xent: backend 'cpu'") as caught:
        sslfast.NTXentLoss()(x, -x)
    assert {w.filename for w in caught} == {__file__}
    assert torch.equal(first, second)


def test_environment_variable_forces_a_backend() -> None:
    code = "import sslfast, torch; sslfast.l2_normalize(torch.ones(2, 3)); print(sslfast._backends._forced)"
    done = run_python(code, SSLFAST_BACKEND="reference")
    assert done.returncode == 0 and done.stdout.strip() == "reference", done.stderr
    done = run_python(code, SSLFAST_BACKEND="cuda")
    assert done.returncode != 0 and "backend 'cuda' was forced but cannot serve this call" in done.stderr
    done = run_python(code, SSLFAST_BACKEND="fast")
    assert done.returncode != 0 and "SSLFAST_BACKEND='fast' is not a backend; allowed: cpu, cuda" in done.stderr


def test_cpu_level_can_be_lowered_but_not_invented() -> None:
    code = "import sslfast, torch; sslfast.l2_normalize(torch.ones(2, 3)); print(torch.ops.sslfast.cpu_level())"
    done = run_python(code, SSLFAST_CPU_CAPABILITY="baseline")
    assert done.returncode == 0 and done.stdout.strip() == "baseline", done.stderr
    done = run_python(code, SSLFAST_CPU_CAPABILITY="")
    assert done.stdout.strip() == torch.ops.sslfast.cpu_level_widest(), done.stderr
    done = run_python(code, SSLFAST_CPU_CAPABILITY="avx3")
    assert done.returncode != 0 and "allowed: baseline, avx2, avx512" in done.stderr


@pytest.mark.parametrize(("leave_out", "status"), [("nothing", 0), ("cpu", 1)])
def test_full_run_is_red_when_a_pair_never_ran(leave_out: str, status: int, tmp_path: Path) -> None:
    """The real conftest over a small tests/ folder: one test that runs every pair, or every pair but the cpu ones."""
    folder = tmp_path / "tests"
    folder.mkdir()
    shutil.copy(TESTS / "conftest.py", folder)
    (folder / "test_pairs.py").write_text(
        "from conftest import PAIRS\n"
        "from sslfast import _backends\n"
        "def test_pairs():\n"
        "    for op, backend in PAIRS:\n"
        f"        if backend != {leave_out!r}:\n"
        "            assert _backends.select(op, backend, lambda name: None) == backend\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k != "SSLFAST_BACKEND"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)  # for what the conftest imports
    full = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=300)
    assert full.returncode == status, full.stdout + full.stderr
    missing = ", ".join(f"{op} on cpu" for op, backend in PAIRS if backend == "cpu")
    assert (f"no test ran: {missing}" in full.stdout) == (status == 1), full.stdout
    one_file = [*command, str(folder / "test_pairs.py")]
    assert subprocess.run(one_file, env=environment, capture_output=True, timeout=300).returncode == 0


def test_the_inner_loop_takes_two_cases_of_what_is_quick() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "--quick", "-p", "no:cacheprovider", __file__]
    kept = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    assert "test_use_backend_forces_and_restores" in kept
    assert "test_forced_backend_that_cannot_serve_is_an_error[triton" not in kept
    assert "test_environment_variable_forces_a_backend" not in kept  # by its function run_python: a process


@pytest.mark.parametrize("case", range(4))
def test_two_cases_are_kept_and_what_was_long_is_left_out(case: int, request: pytest.FixtureRequest) -> None:
    mine = request.node
    assert conftest.quick([mine], {}) == {mine} and len(conftest.quick([mine, mine, mine], {})) == 1
    assert conftest.quick([mine], {mine.nodeid: 60.0}) == set()
