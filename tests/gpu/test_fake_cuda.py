"""Everything public on fake CUDA tensors, forward and backward: a tensor that is made on the wrong device is an error.

Fake tensors have shapes, dtypes and devices, but no numbers, so no GPU is needed. A PyTorch built without CUDA has no
autograd for its tensors either; a library of four lines that declares the device is enough for the graph to be made.
Meta tensors, fake CPU tensors, and real ones beside another default device are tried on the way.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

import sslfast
from fake_cuda import CASES, WAITS, adapters
from fake_cuda.worker import MODES
from sslfast import augment, masking, nn, ops, pretext

TESTS = Path(__file__).parents[1]
DEVICE = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>)
}
"""
PUBLIC = {
    "": sslfast,
    "masking": masking,
    "masking.compat": masking.compat,
    "augment": augment,
    "nn": nn,
    "pretext": pretext,
    **{f"ops.{op}": getattr(ops, op) for op in ops.__all__},
}
# What of it is called with no tensor that could lie on a GPU.
WITHOUT = {
    "Patch": "what a call of patch did",
    "patch": "classes and functions",
    "unpatch": "a name",
    "grad_cache_step": "encoders and a loss, which make all tensors",
    "use_backend": "a name",
    "use_gradient_form": "a name",
    "augment.ViewSpec": "numbers",
    "nn.ExponentialMovingAverage": "a deep copy of a module: of fake tensors it has another fake mode, in PyTorch 2.13",
    "nn.cosine_schedule": "numbers",
    "nn.linear_schedule": "numbers",
    "augment.recipe": "a name",
    "pretext.permutation_set": "made on the CPU, as documented",
}
NO_VALUES = (
    "DataDependentOutputException",
    "NotImplementedError: Cannot copy out of meta",
    "RuntimeError: Tensor.item()",
)


def named(name: str) -> Any:
    """The public object that a case is named after."""
    module, _, attribute = name.partition("/")[0].rpartition(".")
    return getattr(PUBLIC[module], attribute)


def test_everything_public_is_called() -> None:
    called = {id(named(name)) for name in (*CASES, *WITHOUT)}
    missing = {
        f"{module}.{name}".lstrip(".")
        for module, where in PUBLIC.items()
        for name in (where.__all__ if hasattr(where, "__all__") else [module.removeprefix("ops.")])
        if callable(value := getattr(where, name))
        and id(value) not in called
        and not (isinstance(value, type) and issubclass(value, tuple))  # a named tuple: what a call returns
    }
    assert not missing, f"neither a case in tests/fake_cuda nor a reason here: {', '.join(sorted(missing))}"


@lru_cache(maxsize=1)
def device_library(folder: Path) -> Path:
    source, library = folder / "device.cpp", folder / "device.so"
    source.write_text(DEVICE)
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    flags = [*(f"-I{path}" for path in include_paths()), *(f"-L{path}" for path in library_paths())]
    command = [compiler, "-std=c++20", "-shared", "-fPIC", str(source), *flags, "-lc10", "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def worker(what: str, folder: Path) -> dict[str, Any]:
    """What ``fake_cuda.worker`` found."""
    command = [sys.executable, "-m", "fake_cuda.worker", str(device_library(folder)), what]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def report(wrong: dict[str, str]) -> str:
    return "\n".join(f"{name}: {what}" for name, what in wrong.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("device")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return worker("own", folder)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_call(found: dict[str, Any], mode: str) -> None:
    wrong = dict(found[mode])
    if mode == "real CPU, another default device":
        # The permutation is lightly's: of the default device's generator. On the meta device it has no numbers.
        assert wrong.pop("WMSELoss").startswith(NO_VALUES)
    else:
        for name in WAITS:
            assert wrong.pop(name, "nothing").startswith(NO_VALUES), f"{name} should look at values"
    assert not wrong, report(wrong)


@pytest.fixture(scope="module")
def of_adapters(folder: Path) -> dict[str, Any]:
    return worker("adapters", folder)


@pytest.mark.slow
@pytest.mark.parametrize("package", adapters.PACKAGES)
def test_every_adapter(of_adapters: dict[str, Any], package: str) -> None:
    result = of_adapters[package]
    if "absent" in result:
        pytest.skip(result["absent"])
    assert not result["no case"]
    for dtype in (torch.bfloat16, torch.float32):
        wrong = dict(result[str(dtype)])
        for of, name in adapters.WAITS:
            if of == package:
                assert wrong.pop(name, "nothing").startswith(NO_VALUES), f"{name} should look at values"
        assert not wrong, report(wrong)
