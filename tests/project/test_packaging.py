"""Wheels and the source distribution, built from a copy of the tree and used in an environment of their own."""

from __future__ import annotations

import platform
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import sslfast
from packages import SITE, USE_KERNEL, build_wheel, copy_of_the_tree, environment_with, run, succeed

USE_REFERENCE = """
import warnings, sslfast, torch
x = torch.randn(9, 40)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for _ in range(3):
        y = sslfast.l2_normalize(x)
torch.testing.assert_close(y, torch.nn.functional.normalize(x))
print(sslfast.__file__)
print(len(told), told[0].message)
"""


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_the_tree(tmp_path_factory.mktemp("clean") / "sslfast")


@pytest.fixture(scope="session")
def native_wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return build_wheel(tree, tmp_path_factory.mktemp("wheel"), FORCE_CUDA="0")


@pytest.mark.slow
def test_wheel_runs_its_kernels(native_wheel: tuple[Path, str], tmp_path: Path) -> None:
    wheel, output = native_wheel
    names = zipfile.ZipFile(wheel).namelist()
    expected = {"sslfast/_C.so", "sslfast/py.typed", "sslfast/ops/nt_xent.py", "sslfast/kernels/nt_xent.py"}
    assert expected <= set(names)
    assert not [name for name in names if name.startswith(("tests", "csrc", "kernels", "benchmarks", "examples"))]
    assert "sslfast: built _C (" in output and "not _C_cuda (FORCE_CUDA=0)" in output
    python = environment_with(wheel, tmp_path)
    where, version, cuda = succeed([python, "-c", USE_KERNEL], tmp_path).splitlines()
    assert Path(where).is_relative_to(tmp_path / "env") and version == sslfast.__version__
    assert cuda.startswith("not built")
    report = succeed([python, "-m", "sslfast"], tmp_path)
    report = re.sub(" +", " ", report)
    assert f" sslfast {sslfast.__version__}\n" in report
    for op in sslfast.ops.__all__:
        assert f" {op} / cpu usable on cpu\n" in report


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction-set level only")
def test_no_shared_function_is_compiled_for_a_wider_processor(native_wheel: tuple[Path, str], tree: Path) -> None:
    """Weak symbols are merged by the linker: one compiled for AVX-512 could then be called on any processor."""
    built = set(
        re.findall(r"^build (\S+/avx\S+/\w+\.o):", (tree / "build/native/build.ninja").read_text(), re.MULTILINE)
    )
    objects = sorted(tree / path for path in built)
    assert len(objects) >= 4
    for path in objects:
        symbols = succeed(["nm", "--demangle", path], tree).splitlines()
        assert [line for line in symbols if line[17:18] in "WVu"] == [], path
        assert [line for line in symbols if line[17:18] == "T"], path


@pytest.mark.slow
def test_wheel_without_extensions_serves_through_the_reference(tree: Path, tmp_path: Path) -> None:
    wheel, output = build_wheel(tree, tmp_path, SSLFAST_SKIP_EXT="1")
    assert wheel.name == f"sslfast-{sslfast.__version__}-py3-none-any.whl"
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert "SSLFAST_SKIP_EXT=1" in output
    python = environment_with(wheel, tmp_path)
    where, warning = succeed([python, "-c", USE_REFERENCE], tmp_path).splitlines()
    assert Path(where).is_relative_to(tmp_path / "env")
    assert warning.startswith("1 sslfast.l2_normalize: backend 'cpu' cannot serve this call (not built;")
    assert "_C is missing" in succeed([python, "-m", "sslfast"], tmp_path)


@pytest.mark.slow
def test_source_distribution_builds_in_isolation(tree: Path, tmp_path: Path) -> None:
    succeed([sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, tree], tmp_path)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {
        path.relative_to(tree).as_posix()
        for folder in ("csrc", "kernels", "tests", "sslfast")
        for path in (tree / folder).rglob("*")
        if path.suffix in (".py", ".h", ".cpp", ".cu")
    }
    assert len(expected) > 20 and expected <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "requirements-dev.txt"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
    # The pins keep the isolated environment from choosing another torch than the one of the tests. Without optimisation
    # the whole is compiled in half of the time.
    pins = str(tree / "requirements-dev.txt")
    isolated = {"PIP_CONSTRAINT": pins, "PIP_BUILD_CONSTRAINT": pins, "FORCE_CUDA": "0", "DEBUG": "1"}
    wheel, _ = build_wheel(sdist, tmp_path, **isolated)
    where, *_ = succeed([environment_with(wheel, tmp_path), "-c", USE_KERNEL], tmp_path).splitlines()
    assert Path(where).is_relative_to(tmp_path / "env")


@pytest.mark.parametrize("found", ["no torch", "torch 2.9.1"])
def test_build_without_a_usable_torch_says_what_to_do(tree: Path, tmp_path: Path, found: str) -> None:
    """Metadata needs no torch; the compiled parts do, and the error names both ways out."""
    modules = tmp_path / "modules"
    modules.mkdir()
    for name in ("setuptools", "_distutils_hack"):
        (modules / name).symlink_to(Path(SITE) / name)
    if found == "torch 2.9.1":
        (modules / "torch.py").write_text("__version__ = '2.9.1'\n")
    succeed([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], tmp_path)
    setup = [tmp_path / "env" / "bin" / "python", "setup.py", "-q"]
    assert sslfast.__version__ in succeed([*setup, "--version"], tree, PYTHONPATH=str(modules))
    done = run([*setup, "build_ext", "--build-lib", tmp_path / "lib"], tree, PYTHONPATH=str(modules))
    assert done.returncode != 0
    for words in ("torch >= 2.10", "--no-build-isolation", "SSLFAST_SKIP_EXT=1"):
        assert words in done.stderr, done.stderr
    assert ("found torch 2.9.1" if found == "torch 2.9.1" else "No module named 'torch'") in done.stderr


def test_bad_build_settings_are_named(tree: Path, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib"]
    done = run(command, tree, MAX_JOBS="many", FORCE_CUDA="0")
    assert done.returncode != 0 and "MAX_JOBS='many' is not a positive whole number" in done.stderr
    done = run(command, tree, FORCE_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0 and "FORCE_CUDA=1, but nvcc was found neither" in done.stderr
    done = run(command, tree, CXX="no-such-compiler")
    assert done.returncode != 0 and "no C++ compiler 'no-such-compiler'" in done.stderr
