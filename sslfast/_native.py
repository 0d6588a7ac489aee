"""Loading of the compiled parts, and what is known about them.

``_C`` (CPU operators) and ``_C_cuda`` (CUDA operators) are plain shared libraries on LibTorch's stable ABI: they carry
no Python symbols, so one build serves every Python version and every torch from 2.10 on. Each registers its kernels for
schemas that ``sslfast.ops`` defines. A library that is absent or does not load leaves its reason in ``why_missing``.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import torch

from . import _library

_HERE = Path(__file__).parent
why_missing: dict[str, str] = {}


def _load(name: str) -> bool:
    path = _HERE / f"{name}.so"
    if not path.exists():
        why_missing[name] = "not built; build from source with a C++ compiler: pip install --no-build-isolation ."
        if name == "_C_cuda":
            why_missing[name] = "not built; build beside a CUDA torch with nvcc, or with FORCE_CUDA=1"
        return False
    if name == "_C_cuda" and torch.version.cuda is None:
        why_missing[name] = f"built, but this torch ({torch.__version__}) has no CUDA"
        return False
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        why_missing[name] = f"built, but does not load: {error}"
        return False
    return True


def _import_host() -> ModuleType | None:
    try:
        return importlib.import_module("sslfast._host")
    except ImportError as error:
        why_missing["_host"] = str(error)
        return None


# Implemented in csrc/cpu/levels.cpp and tile_peak.cpp; they take no tensor, so they need no fake kernel.
_library.LIB.define("cpu_level() -> str")
_library.LIB.define("cpu_level_widest() -> str")
_library.LIB.define("tile_peak(int m, int n, int k, int repeats) -> float")

has_cpu = _load("_C")
has_cuda = _load("_C_cuda")
host = _import_host()


@_library.constant_to_the_compiler  # it cannot read Triton's settings; they are fixed at its import
def _triton_interprets() -> bool:
    import triton

    return triton.knobs.runtime.interpret


def why_no_triton(device: torch.device) -> str | None:
    """The reason Triton kernels cannot run on ``device``, or ``None`` if they can."""
    try:
        import triton  # noqa: F401  (only whether it can be imported)
    except ImportError as error:
        return f"triton is not importable ({error})"
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "the Triton kernels are made for NVIDIA GPUs"
        major, minor = torch.cuda.get_device_capability(device)
        return None if major >= 8 else f"the Triton kernels need compute capability 8.0, {device} has {major}.{minor}"
    if device.type == "cpu" and _triton_interprets():
        return None
    return f"Triton runs on CUDA tensors, and on CPU tensors only with TRITON_INTERPRET=1; got a {device.type} tensor"
