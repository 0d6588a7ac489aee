"""GPUs, Tritons and assemblers that are too old or known to be wrong: what is said, and what computes instead."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import conftest
import sslfast
from sslfast import _backends, _native
from sslfast.__main__ import report

triton = pytest.importorskip("triton")
CUDA = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told once is told anew, and a fake tensor's call does not count as a backend's."""
    monkeypatch.setattr(_backends, "_told", set())
    monkeypatch.setattr(_backends, "select", conftest._choose)


def with_capability(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> None:
    monkeypatch.setattr(_native, "_capability", lambda device: capability)


# -------------------------------------------------------------------------------------------------------------- the GPU


@pytest.mark.parametrize(("capability", "served"), [((7, 5), False), ((8, 0), True), ((9, 0), True), (None, True)])
def test_triton_needs_capability_8(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, served: bool
) -> None:
    with_capability(monkeypatch, capability)
    reason = _native.why_no_triton(CUDA)
    assert reason == (None if served else "the Triton kernels need compute capability 8.0, cuda:0 has 7.5")


# With the operation that the warning names; an indexed tensor wants a PyTorch that knows the CUDA device.
LOSSES = {
    "nt_xent": ("nt_xent", sslfast.nt_xent),
    "barlow_twins": ("second_moment", sslfast.barlow_twins),
}


@pytest.mark.parametrize("name", LOSSES)
def test_on_an_old_gpu_the_reference_computes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with_capability(monkeypatch, (7, 5))
    operation, loss_of = LOSSES[name]
    with FakeTensorMode():
        a, b = torch.randn(2, 6, 8, device=CUDA).unbind()
        with pytest.warns(UserWarning, match=f"{operation}: backend 'triton' cannot serve this call .*has 7.5.*refer"):
            loss = loss_of(a, b)
        assert loss.device == CUDA and loss.shape == ()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss_of(a, b)
        with sslfast.use_backend("triton"), pytest.raises(RuntimeError, match="'triton' was forced .*has 7.5"):
            loss_of(a, b)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), 80), ((8, 6), 86), ((8, 9), 86), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100), ((12, 0), 86)],
)
def test_which_tiles_a_gpu_gets(
    monkeypatch: pytest.MonkeyPatch, no_interpreter: None, capability: tuple[int, int], expected: int
) -> None:
    from sslfast.kernels import _common

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(_common, "warn_of_fault", lambda architecture: None)
    assert _common.architecture(torch.empty(0)) == expected


def test_a_launch_on_an_old_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch, no_interpreter: None) -> None:
    from sslfast.kernels import _common

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(RuntimeError, match="need compute capability 8.0 or newer, cpu has 7.0"):
        _common.architecture(torch.empty(0))


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)


# Built for, met, served. Machine code runs on later GPUs of its major version, PTX on all later ones.
BUILDS = [
    ("8.0 8.6 9.0 10.0 12.0+PTX", (8, 0), True),
    ("8.0 8.6 9.0 10.0 12.0+PTX", (8, 9), True),
    ("8.0 8.6 9.0 10.0 12.0+PTX", (10, 3), True),
    ("8.0 8.6 9.0 10.0 12.0+PTX", (13, 0), True),
    ("8.0 8.6 9.0 10.0 12.0+PTX", (7, 5), False),
    ("9.0", (8, 0), False),
    ("9.0", (10, 0), False),
    ("9.0a", (9, 0), True),
    ("9.0a", (10, 0), False),
    ("10.0a", (10, 3), False),
    ("10.0f", (10, 3), True),
    ("8.6", (8, 0), False),
    ("8.0+PTX", (12, 0), True),
    ("", (7, 5), True),  # not known what it was built for: it is tried
]


@pytest.mark.parametrize(("archs", "capability", "served"), BUILDS)
def test_the_cuda_library_is_asked_what_it_was_built_for(
    monkeypatch: pytest.MonkeyPatch, archs: str, capability: tuple[int, int], served: bool
) -> None:
    monkeypatch.delitem(_native.why_missing, "_C_cuda", raising=False)
    monkeypatch.setattr(_native, "cuda_archs", tuple(archs.split()))
    with_capability(monkeypatch, capability)
    reason = _native.why_no_cuda(CUDA)
    assert (reason is None) == served
    if not served:
        number = ".".join(map(str, capability))
        assert reason == (
            f"built for compute capability {', '.join(archs.split())}, and cuda:0 has {number}: "
            f"build with TORCH_CUDA_ARCH_LIST={number}"
        )
        with FakeTensorMode(), pytest.warns(UserWarning, match="'cuda' cannot serve this call .built for"):
            assert sslfast.l2_normalize(torch.randn(3, 4, device=CUDA)).device == CUDA


def test_a_meta_tensor_needs_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_native.why_missing, "_C", "not built")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sslfast.nt_xent(*torch.randn(2, 3, 4, device="meta").unbind()).device.type == "meta"


# --------------------------------------------------------------------------------------------------------------- Triton


@pytest.mark.parametrize(
    ("version", "served"),
    [("3.3.1", False), ("2.1.0", False), ("3.4.0", True), ("3.10.0", True), ("4.0", True), ("3.7.0+git1a2b", True)],
)
def test_an_old_triton_is_not_used(monkeypatch: pytest.MonkeyPatch, version: str, served: bool) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    reason = _native.why_no_triton(CUDA)
    assert reason == (None if served else f"the Triton kernels need Triton 3.4 or newer, and {version} is installed")
    if not served:
        a, b = torch.randn(2, 6, 8).unbind()
        with FakeTensorMode(), pytest.warns(UserWarning, match="need Triton 3.4 or newer.*using 'reference'"):
            sslfast.nt_xent(*torch.randn(2, 6, 8, device=CUDA).unbind(), normalize=False)
        with sslfast.use_backend("triton"), pytest.raises(RuntimeError, match=f"and {version} is installed"):
            sslfast.nt_xent(a, b)
        assert "ptxas" not in report()


# ---------------------------------------------------------------------------------------------------------------- ptxas


@pytest.fixture
def assemblers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """ptxas of any version: ``ptxas-<version>`` in the folder, a script that says which one it is."""
    from sslfast.kernels import _assembler

    for version in ("12.4", "12.8", "12.9", "13.0", "13.1", "13.3", "14.0"):
        script = tmp_path / f"ptxas-{version}"
        script.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.80'\n")
        script.chmod(0o755)
    _assembler.warn_of_fault.cache_clear()
    yield
    _assembler.warn_of_fault.cache_clear()


def choose(monkeypatch: pytest.MonkeyPatch, folder: Path, usual: str, blackwell: str) -> None:
    """The assemblers for Triton's two settings, and that of Hopper by the rule of Triton 3.6 to 3.8."""
    from triton.backends.nvidia import compiler

    monkeypatch.setenv("TRITON_PTXAS_PATH", str(folder / f"ptxas-{usual}"))
    monkeypatch.setenv("TRITON_PTXAS_BLACKWELL_PATH", str(folder / f"ptxas-{blackwell}"))
    nvidia = triton.knobs.nvidia
    monkeypatch.setattr(compiler, "get_ptxas", lambda arch: nvidia.ptxas_blackwell if arch >= 100 else nvidia.ptxas)


@pytest.mark.parametrize(
    ("version", "sound"),
    [
        ("12.4", False),
        ("12.8", False),
        ("12.9", False),
        ("13.0", False),
        ("13.1", True),
        ("13.3", True),
        ("14.0", True),
    ],
)
def test_a_ptxas_with_the_fault_is_named_once(
    monkeypatch: pytest.MonkeyPatch, assemblers: None, no_interpreter: None, tmp_path: Path, version: str, sound: bool
) -> None:
    from sslfast.kernels import _common

    choose(monkeypatch, tmp_path, version, "13.1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            assert _common.architecture(torch.empty(0)) == 90
    wanted = [
        f"sslfast: ptxas {version} ({tmp_path}/ptxas-{version}) can overwrite registers that a running wgmma still "
        "reads, so that results are wrong without a word; set TRITON_PTXAS_PATH to ptxas 13.1 or newer before Python "
        f"starts, such as Triton's own {tmp_path}/ptxas-13.1"
    ]
    assert [str(warning.message) for warning in told] == ([] if sound else wanted)


def test_the_fault_is_hoppers_alone(monkeypatch: pytest.MonkeyPatch, assemblers: None, tmp_path: Path) -> None:
    from sslfast.kernels import _assembler

    choose(monkeypatch, tmp_path, "12.8", "12.9")
    assert [_assembler.fault(architecture) is None for architecture in (80, 86, 90, 100, 120)] == [1, 1, 0, 1, 1]
    assert "Triton's own" not in str(_assembler.fault(90))  # that one has the fault too


def test_tritons_other_rules(monkeypatch: pytest.MonkeyPatch, assemblers: None, tmp_path: Path) -> None:
    from sslfast.kernels import _assembler
    from triton.backends.nvidia import compiler

    choose(monkeypatch, tmp_path, "12.8", "12.9")
    nvidia = triton.knobs.nvidia
    # Before 3.6 there is one for all; from 3.9 on Hopper's is the other.
    monkeypatch.setattr(compiler, "get_ptxas", lambda: nvidia.ptxas)
    assert _assembler.assembler(100) == (str(tmp_path / "ptxas-12.8"), (12, 8), "TRITON_PTXAS_PATH")
    monkeypatch.setattr(compiler, "get_ptxas", lambda arch: nvidia.ptxas_blackwell if arch >= 90 else nvidia.ptxas)
    assert _assembler.assembler(90) == (str(tmp_path / "ptxas-12.9"), (12, 9), "TRITON_PTXAS_BLACKWELL_PATH")
    assert "set TRITON_PTXAS_BLACKWELL_PATH" in str(_assembler.fault(90))

    def none(arch: int) -> None:
        raise RuntimeError("Cannot find ptxas")

    monkeypatch.setattr(compiler, "get_ptxas", none)
    assert _assembler.assembler(90) is None and _assembler.fault(90) is None


def test_the_report_names_the_assembler(monkeypatch: pytest.MonkeyPatch, assemblers: None, tmp_path: Path) -> None:
    choose(monkeypatch, tmp_path, "13.3", "12.9")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    row = next(line for line in report().splitlines() if "ptxas" in line)
    assert row.split(maxsplit=3)[:3] == ["ptxas", "for", "sm_90"] and row.endswith(f"13.3 ({tmp_path}/ptxas-13.3)")
    choose(monkeypatch, tmp_path, "12.9", "13.3")
    row = next(line for line in report().splitlines() if "ptxas" in line)
    assert f"  12.9 ({tmp_path}/ptxas-12.9) can overwrite registers" in row
