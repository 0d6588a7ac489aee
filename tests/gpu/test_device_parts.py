"""Parts of the GPU's script: prebuilt libraries, a second ptxas, what other tools' reports say."""

from __future__ import annotations

import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.device import prebuild, prepare, ptxas, sanitizer, suite
from tools.device.steps import GREEN, RED, ROOT, Context, NotRun


def fake_ptxas(path: Path, version: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release 1, V{version}'\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("beside", "carried", "found"),
    [
        ("13.1.80", None, "13.1.80"),
        ("12.9.86", "13.3.10", "13.3.10"),
        ("12.9.86", None, "no ptxas of 13.1 or later beside Triton's own (12.8.93); found: 12.9.86"),
        (None, "13.0.88", "found: 13.0.88"),
        (None, None, "found: nothing"),
    ],
)
def test_the_second_ptxas(
    beside: str | None, carried: str | None, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = {"ptxas": fake_ptxas(tmp_path / "own", "12.8.93")}
    if beside:
        programs["ptxas-blackwell"] = fake_ptxas(tmp_path / "beside", beside)
    if carried:
        packed = lzma.compress(fake_ptxas(tmp_path / "other", carried).read_bytes())
        (tmp_path / "ptxas.xz").write_bytes(packed)
    unpacked = ptxas.unpacked(tmp_path)
    monkeypatch.setattr(ptxas, "in_triton", programs.get)
    monkeypatch.setattr(ptxas, "unpacked", lambda: unpacked)
    got = ptxas.second.__wrapped__()
    assert got[1] == found if isinstance(got, tuple) else found in got


def test_prebuilt_libraries_are_taken_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "ROOT", tmp_path)
    monkeypatch.setattr(prepare, "CARRIED", tmp_path / "carried")
    for folder in ("carried", "sslfast"):
        (tmp_path / folder).mkdir()
    for name in prepare.LIBRARIES:
        (tmp_path / "carried" / f"{name}.so").write_text("carried")
    (tmp_path / "sslfast" / "_C.so").write_text("own")
    assert prepare.taken(prepare.LIBRARIES) == ["_C_cuda"]
    assert [(tmp_path / "sslfast" / f"{name}.so").read_text() for name in prepare.LIBRARIES] == ["own", "carried"]


def test_libraries_that_do_not_work_are_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works = {"cpu": True, "cuda": True, "why": {}, "torch": "2.11", "name": "H200", "arch": "9.0"}
    fails = {**works, "cuda": False, "why": {"_C_cuda": "no kernel image"}}
    built: list[str | None] = []
    monkeypatch.setattr(prepare, "taken", lambda names: [])
    monkeypatch.setattr(prepare, "build", built.append)
    for answers, expected in (([works], "torch 2.11, H200 9.0"), ([fails, works], "built here; torch 2.11, H200 9.0")):
        monkeypatch.setattr(prepare, "probe", lambda device, answers=answers: answers.pop(0))
        assert prepare.libraries(Context(tmp_path)) == expected
    assert built == ["9.0"]
    monkeypatch.setattr(prepare, "probe", lambda device: fails)
    with pytest.raises(RuntimeError, match="missing still.*no kernel image"):
        prepare.libraries(Context(tmp_path))


def test_the_link_stands_in_for_an_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "sslfast").mkdir()
    monkeypatch.setattr(prepare, "LINK", tmp_path / "sslfast" / "kernels")
    monkeypatch.setattr(prepare, "is_installed", lambda: True)
    assert prepare.link() is None and not prepare.LINK.is_symlink()
    monkeypatch.setattr(prepare, "is_installed", lambda: False)
    assert "made the link" in (prepare.link() or "") and prepare.LINK.resolve() == tmp_path / "kernels"
    assert prepare.link() is None


def test_what_is_copied_for_a_build_is_what_a_build_reads(tmp_path: Path) -> None:
    prebuild.copy_of_the_tree(tmp_path)
    assert not [*tmp_path.rglob("*.so")] and not [*tmp_path.rglob("__pycache__")]
    for pattern in ("csrc/cuda/*.cu", "csrc/cpu/*.cpp", "csrc/cpu/engine/*.h", "csrc/*.h"):
        names = {path.relative_to(ROOT) for path in ROOT.glob(pattern)}
        assert names and names == {path.relative_to(tmp_path) for path in tmp_path.glob(pattern)}
    command = [sys.executable, "setup.py", "--quiet", "build"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "SSLFAST_SKIP_EXT": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "build/lib/sslfast/kernels/nt_xent.py").exists()


# ------------------------------------------------------------------------------------------------ what other tools say


def test_findings_of_compute_sanitizer_have_the_name_of_their_case() -> None:
    output = """\
========= COMPUTE-SANITIZER
### l2_normalize (5, 40) [l2_normalize]
### gather_tokens 3 [gather_tokens]
========= Invalid __global__ read of size 4 bytes
=========     at sslfast::(anonymous namespace)::gather_kernel+0x1f0 in gather_tokens.cu:61
=========     by thread (33,0,0) in block (0,0,0)
=========     Address 0x7f1c is out of bounds
=========     and is 4 bytes after the nearest allocation
### masked_rows, one image [masked_rows]
========= Error: Race reported between Write access at sslfast::rows_kernel+0x2a0 in masked_rows.cu:52
=========     and Read access at sslfast::rows_kernel+0x300 in masked_rows.cu:60 [16 hazards]
### done: 3 cases
========= ERROR SUMMARY: 2 errors
"""
    found = sanitizer.findings(output)
    assert list(found) == ["gather_tokens 3 [gather_tokens]", "masked_rows, one image [masked_rows]"]
    first, second = found.values()
    assert first[0] == "Invalid __global__ read of size 4 bytes" and "gather_tokens.cu:61" in first[1]
    assert len(first) == 4 and "masked_rows.cu:52" in second[0] and "[16 hazards]" in second[1]
    assert not sanitizer.findings("### a\n### done: 1 cases\n========= ERROR SUMMARY: 0 errors\n")


@pytest.mark.parametrize(("works", "words"), [("both", sanitizer.OURS), ("no filter", ()), ("nothing", None)])
def test_compute_sanitizer_is_tried_before_it_is_relied_on(
    works: str, words: tuple[str, ...] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in that knows the filter of kernels, that does not, and that refuses the device."""
    stand_in = tmp_path / "compute-sanitizer"
    refusal = "========= Error: Device not supported. Please refer to the documentation"
    refuses = {"both": "", "no filter": "*kns=*", "nothing": "*"}[works]
    stand_in.write_text(
        f"#!/bin/sh\ncase \"$*\" in {refuses or 'x'}) echo '{refusal}'; exit 1;; esac\n"
        "echo '========= ERROR SUMMARY: 0 errors'\n"
    )
    stand_in.chmod(0o755)
    monkeypatch.setattr(sanitizer, "program", lambda: stand_in)
    if words is None:
        with pytest.raises(NotRun, match="cannot use this device: Error: Device not supported"):
            sanitizer.usable()
    else:
        assert sanitizer.usable() == words


def test_the_tests_are_those_of_a_gpu(tmp_path: Path) -> None:
    words = suite.command(Context(tmp_path))
    assert words[words.index("-m", 3) + 1] == "gpu and not slow" and f"--junitxml={tmp_path / suite.JUNIT}" in words
    assert f"--maxfail={suite.MOST_FAILURES}" in words
    assert 1 <= int(words[words.index("-n") + 1]) <= 14


def test_failed_tests_are_read_by_name(tmp_path: Path) -> None:
    report = tmp_path / suite.JUNIT
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.test_a" name="test_x[1]"/>'
        '<testcase classname="tests.test_a" name="test_y"><failure message="assert 1 == 2">trace</failure></testcase>'
        '<testcase classname="tests.test_b" name="test_z"><error message="no fixture"/></testcase>'
        '<testcase classname="tests.test_b" name="test_w"><skipped/></testcase></testsuite></testsuites>'
    )
    counts, failed = suite.read(report)
    assert counts == {GREEN: 1, "skipped": 1, "failed": 2}
    assert failed == [("test_a::test_y", "assert 1 == 2"), ("test_b::test_z", "no fixture")]


def test_the_tests_of_a_gpu_are_stopped_in_time_and_still_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of one quick test, one that fails and one that hangs: the first two are reported."""
    file = tmp_path / "test_some.py"
    file.write_text(
        "import time\ndef test_a():\n    pass\ndef test_b():\n    assert 0, 'b'\ndef test_c():\n    time.sleep(600)\n"
    )
    report = f"--junitxml={tmp_path / suite.JUNIT}"
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, report, str(file)]
    monkeypatch.setattr(suite, "command", lambda context: words)
    events: list[dict[str, str]] = []
    context = Context(tmp_path, emit=events.append)
    monkeypatch.setattr(Context, "left", lambda self: suite.MARGIN + 8)
    with pytest.raises(AssertionError, match="1 tests failed: stopped when the stage's time was up; .*1 failed"):
        suite.run(context)
    assert ("test_some::test_b", RED) in [(event["step"], event["status"]) for event in events]
