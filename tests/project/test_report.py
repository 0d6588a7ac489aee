"""``python -m sslfast``: the first line says whether the kernels serve here, and what to do if not."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sslfast import __main__ as program, _native, ops
from sslfast.__main__ import report, verdict

GPU = "on the GPU"


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, whatever this one is, and nothing forced."""
    monkeypatch.delenv("SSLFAST_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one H100 and CUDA kernels that run there."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_native, "_capability", lambda device: (9, 0))
    monkeypatch.delitem(_native.why_missing, "_C_cuda", raising=False)
    monkeypatch.setattr(_native, "cuda_archs", ("9.0",))
    monkeypatch.setattr(program, "_rows_on", Rows)


class Rows:
    """Stands for a tensor, which a PyTorch without CUDA cannot make there."""

    shape, dtype = (1, 1), torch.float32

    def __init__(self, device: str) -> None:
        self.device, self.is_cuda = torch.device(device), device == "cuda"

    def __getitem__(self, _: int) -> Rows:
        return self


def test_the_first_line_is_the_answer_and_operations_follow() -> None:
    lines = report().splitlines()
    assert lines[0] == verdict() and lines[2] == "Operations"
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[3 : 3 + len(ops.__all__)]}
    assert rows == {op: "C++ on the CPU" for op in ops.__all__}
    assert lines[3 + len(ops.__all__)] == ""


def test_fast_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    level, widest = torch.ops.sslfast.cpu_level(), torch.ops.sslfast.cpu_level_widest()
    if level == widest == "avx512":
        assert verdict() == "fast path: yes, C++ kernels at AVX-512 on the CPU; no CUDA GPU here"
    assert verdict().startswith("fast path: yes, C++ kernels at ")
    if level != "baseline":
        code = "from sslfast.__main__ import verdict; print(verdict())"
        environment = {**os.environ, "SSLFAST_CPU_CAPABILITY": "baseline"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert "at the baseline instruction set (SSLFAST_CPU_CAPABILITY=baseline is set; this" in done.stdout


def test_without_the_cpu_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_native.why_missing, "_C", "not built; build from source")
    monkeypatch.setattr(_native, "has_cpu", False)
    assert verdict() == "fast path: no, plain PyTorch on the CPU (not built; build from source); no CUDA GPU here"
    lines = [line.split(maxsplit=1) for line in report().splitlines()]
    assert ["nt_xent", "plain PyTorch on the CPU (not built; build from source)"] in lines


def test_with_a_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSLFAST_BACKEND", "reference")
    assert verdict().startswith("fast path: no, plain PyTorch on the CPU (SSLFAST_BACKEND=reference is set; unset it)")


def test_with_a_gpu(gpu: None) -> None:
    assert verdict().startswith("fast path: yes, C++ kernels at ")
    assert verdict().endswith(f"; CUDA and Triton kernels {GPU}")


def test_with_a_gpu_and_no_cuda_library(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_native.why_missing, "_C_cuda", "not built; build beside a CUDA torch with nvcc")
    by_cuda = sum("cuda" in getattr(ops, op).BACKENDS for op in ops.__all__)
    assert verdict().startswith("fast path: in part, C++ kernels")
    assert verdict().endswith(
        f"; Triton kernels {GPU}, plain PyTorch for {by_cuda} of {len(ops.__all__)} operations {GPU} "
        "(not built; build beside a CUDA torch with nvcc)"
    )


def test_no_row_explains_what_a_machine_without_a_gpu_cannot_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    lines = report().splitlines()
    assert not [line for line in lines if "CUDA tensors" in line]
    (row,) = (line for line in lines if line.startswith("  nt_xent / triton "))
    assert row.endswith(" no: needs a CUDA GPU (none here)")


@pytest.mark.parametrize(
    ("built", "pybind11", "said"),
    [
        ([], False, "not built: pybind11 is missing; pip install pybind11, then install again"),
        ([], True, "not built; install again: pip install --no-build-isolation ."),
        (["_host.cpython-27-any.so"], True, "built for another Python (_host.cpython-27-any.so); install again"),
        ([f"_host{importlib.machinery.EXTENSION_SUFFIXES[0]}"], True, "built, but does not load: no such symbol"),
    ],
)
def test_why_there_is_no_host(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, built: list[str], pybind11: bool, said: str
) -> None:
    for name in built:
        (tmp_path / name).touch()
    monkeypatch.setattr(_native, "_HERE", tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if pybind11 else None)

    def refuse(name: str) -> None:
        raise ImportError("no such symbol")

    monkeypatch.setattr(_native.importlib, "import_module", refuse)
    monkeypatch.setitem(_native.why_missing, "_host", "")
    assert _native._import_host() is None
    monkeypatch.setattr(_native, "host", None)
    row = next(line for line in report().splitlines() if line.startswith("  _host"))
    assert row.split(maxsplit=1)[1] == f"{said}; without it NumPy draws the masks in data-loader workers"
    assert "unknown without _host" in report()
