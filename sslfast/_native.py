"""Loading of the compiled parts, and what is known about them.

``_C`` (CPU operators) and ``_C_cuda`` (CUDA operators) are plain shared libraries on LibTorch's stable ABI: they carry
no Python symbols, so one build serves every Python version and every torch from 2.10 on. Each registers its kernels for
schemas that ``sslfast.ops`` defines. A library that is absent or does not load leaves its reason in ``why_missing``.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import torch

from . import _library

_HERE = Path(__file__).parent
OLDEST_TRITON = (3, 4)
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
        why_missing["_host"] = f"{_why_no_host(error)}; without it NumPy draws the masks in data-loader workers"
        return None


def _why_no_host(error: ImportError) -> str:
    """Why the module of one Python version does not import, and what to do."""
    built = sorted(path.name for path in _HERE.glob("_host.*") if path.suffix in (".so", ".pyd"))
    own = [name for name in built if name in {f"_host{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES}]
    if own:
        return f"built, but does not load: {error}"
    if built:
        return f"built for another Python ({', '.join(built)}); install again"
    if importlib.util.find_spec("pybind11") is None:
        return "not built: pybind11 is missing; pip install pybind11, then install again"
    return "not built; install again: pip install --no-build-isolation ."


# Implemented in csrc/cpu/levels.cpp and tile_peak.cpp; they take no tensor, so they need no fake kernel.
_library.LIB.define("cpu_level() -> str")
_library.LIB.define("cpu_level_widest() -> str")
_library.LIB.define("tile_peak(int m, int n, int k, int repeats) -> float")

has_cpu = _load("_C")
has_cuda = _load("_C_cuda")
host = _import_host()


# The compute capabilities that _C_cuda has machine code for, such as "9.0", or code to compile from, "12.0+PTX". Known
# from the module that is built beside it; empty: not known.
cuda_archs: tuple[str, ...] = tuple(host.build_info()["cuda_archs"] or ()) if host is not None else ()


def why_no_cpu(device: torch.device, like: str = "the input") -> str | None:
    """The reason the C++ kernels cannot serve an argument, called ``like``, on ``device``, or ``None`` if they can.

    Of meta tensors only shapes and dtypes are asked, which the operators know without a library.
    """
    if device.type == "meta":
        return None
    return why_missing.get("_C") if device.type == "cpu" else f"it takes CPU tensors, and {like} is on {device}"


def why_no_cuda(device: torch.device, like: str = "the input") -> str | None:
    """The same for the CUDA kernels."""
    if device.type != "cuda":
        return f"it takes CUDA tensors, and {like} is on {device}"
    if "_C_cuda" in why_missing:
        return why_missing["_C_cuda"]
    capability = _capability(device)
    if capability is None or not cuda_archs or any(_runs(arch, capability) for arch in cuda_archs):
        return None
    number = f"{capability[0]}.{capability[1]}"
    return (
        f"built for compute capability {', '.join(cuda_archs)}, and {device} has {number}: "
        f"build with TORCH_CUDA_ARCH_LIST={number}"
    )


def _capability(device: torch.device) -> tuple[int, int] | None:
    """``device``'s compute capability; ``None`` where PyTorch has not met a GPU: then the tensor is a fake one."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_initialized() else None


def _runs(arch: str, capability: tuple[int, int]) -> bool:
    """Machine code runs on later GPUs of its major version (``9.0a``: on its own alone), PTX on every later one."""
    number, _, ptx = arch.partition("+")
    major, minor = (int(digits) for digits in number.rstrip("af").split("."))
    if number.endswith("a"):
        return capability == (major, minor)
    return capability >= (major, minor) and (capability[0] == major or bool(ptx))


@_library.constant_to_the_compiler  # it cannot read Triton's settings; they are fixed at its import
def why_triton_is_unusable() -> str | None:
    """The reason no Triton kernel can run, on any device, or ``None``."""
    try:
        import triton
    except ImportError as error:
        return f"triton is not importable ({error})"
    found = re.match(r"(\d+)\.(\d+)", triton.__version__)
    if found and tuple(map(int, found.groups())) < OLDEST_TRITON:
        wanted = ".".join(map(str, OLDEST_TRITON))
        return f"the Triton kernels need Triton {wanted} or newer, and {triton.__version__} is installed"
    return None


@_library.constant_to_the_compiler
def _triton_interprets() -> bool:
    import triton

    return triton.knobs.runtime.interpret


def why_no_triton(device: torch.device) -> str | None:
    """The reason Triton kernels cannot run on ``device``, or ``None`` if they can."""
    reason = why_triton_is_unusable()
    if reason is not None:
        return reason
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "the Triton kernels are made for NVIDIA GPUs"
        capability = _capability(device)
        if capability is None or capability >= (8, 0):
            return None
        return f"the Triton kernels need compute capability 8.0, {device} has {capability[0]}.{capability[1]}"
    if device.type == "cpu" and _triton_interprets():
        return None
    return f"Triton runs on CUDA tensors, and on CPU tensors only with TRITON_INTERPRET=1; got a {device.type} tensor"
