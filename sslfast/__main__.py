"""``python -m sslfast``: whether the kernels serve on this machine, and what this installation consists of."""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from types import ModuleType

import torch

import sslfast
from sslfast import _native, ops
from sslfast.adapters import PACKAGES

KERNELS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # the backends made for a device
NAMES = {"cpu": "C++", "cuda": "CUDA", "triton": "Triton", "reference": "plain PyTorch"}
PLACES = {"cpu": "on the CPU", "cuda": "on the GPU"}
LEVELS = {"baseline": "the baseline instruction set", "avx2": "AVX2", "avx512": "AVX-512"}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _versions() -> list[tuple[str, str]]:
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return [
        ("sslfast", sslfast.__version__),
        ("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {cuda}"),
        ("triton", _version("triton")),
        *_assemblers(),
        ("numpy", _version("numpy")),
    ]


def _assemblers() -> list[tuple[str, str]]:
    """What Triton assembles with for the GPUs here, or for Hopper, where it matters most; and what is wrong with it."""
    if _native.why_triton_is_unusable() is not None:
        return []
    from .kernels import _assembler

    present = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    capabilities = {torch.cuda.get_device_capability(i) for i in present}
    rows = []
    for architecture in sorted(10 * major + minor for major, minor in capabilities) or [_assembler.HOPPER]:
        found, wrong = _assembler.assembler(architecture), _assembler.fault(architecture)
        plain = "not found" if found is None else f"{'.'.join(map(str, found.version))} ({found.path})"
        rows.append((f"ptxas for sm_{architecture}", plain if wrong is None else wrong.removeprefix("ptxas ")))
    return rows


def _libraries() -> list[tuple[str, str]]:
    return [(name, _native.why_missing.get(name, "loaded")) for name in ("_C", "_C_cuda", "_host")]


def _probe(module: ModuleType, backend: str, device: str) -> str | None:
    """The reason a backend cannot serve an operation's tensors on a device, or ``None`` if it can."""
    if backend == "reference":
        return None
    if backend in KERNELS["cuda"] and "cuda" not in _devices() and not (backend == "triton" and _interprets()):
        return "needs a CUDA GPU (none here)"
    reason: str | None = module.why_not(backend, _rows_on(device))
    return reason


def _rows_on(device: str) -> torch.Tensor:
    return torch.empty(1, 1, device=device)


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _choices() -> dict[str, dict[str, tuple[str, str | None]]]:
    """For each device, for each operation: the backend that serves a call, and why no faster one does."""
    forced = os.environ.get("SSLFAST_BACKEND")
    found: dict[str, dict[str, tuple[str, str | None]]] = {device: {} for device in _devices()}
    for device, op in itertools.product(found, ops.__all__):
        module = getattr(ops, op)
        backend = next(backend for backend in module.BACKENDS if backend in KERNELS[device])
        reason = _probe(module, backend, device)
        if forced:
            reason = None if forced == backend else f"SSLFAST_BACKEND={forced} is set; unset it"
        found[device][op] = (backend, None) if reason is None else ("reference", reason)
    return found


def _operation_rows() -> list[tuple[str, str]]:
    """For each operation: what serves it on each device."""
    choices = _choices()
    rows = []
    for op in ops.__all__:
        served = [(place, *choices[device][op]) for device, place in PLACES.items() if device in choices]
        shown = [f"{NAMES[backend]} {place}" + (f" ({why})" if why else "") for place, backend, why in served]
        rows.append((op, "; ".join(shown)))
    return rows


def _fast_on(device: str, choices: Mapping[str, tuple[str, str | None]]) -> tuple[int, str]:
    """How many operations a kernel serves on a device, and what to say about it: with what, or why not."""
    kernels = [NAMES[backend] for backend, reason in choices.values() if reason is None]
    reasons = dict.fromkeys(reason for _, reason in choices.values() if reason is not None)
    words = []
    if kernels:
        level = f" at {_level()}" if device == "cpu" else ""
        words.append(f"{' and '.join(sorted(set(kernels)))} kernels{level} {PLACES[device]}")
    if reasons:
        which = f"for {len(choices) - len(kernels)} of {len(choices)} operations " if kernels else ""
        words.append(f"plain PyTorch {which}{PLACES[device]} ({'; '.join(reasons)})")
    return len(kernels), ", ".join(words)


def _level() -> str:
    """The instruction set in use, as people write it, and what holds it back."""
    used, widest = torch.ops.sslfast.cpu_level(), torch.ops.sslfast.cpu_level_widest()
    shown = LEVELS.get(used, used)
    if used == widest:
        return shown
    return f"{shown} (SSLFAST_CPU_CAPABILITY={used} is set; this processor has {LEVELS.get(widest, widest)})"


def verdict() -> str:
    """The first line: whether the kernels serve here, and if not, what to do."""
    choices = _choices()
    found = [_fast_on(device, of_device) for device, of_device in choices.items()]
    served = sum(count for count, _ in found)
    answer = "no" if served == 0 else "yes" if served == len(choices) * len(ops.__all__) else "in part"
    words = [said for _, said in found]
    if "cuda" not in choices:
        words.append("no CUDA GPU here")
    return f"fast path: {answer}, {'; '.join(words)}"


def _backend_rows() -> list[tuple[str, str]]:
    """For each operation and backend: the devices it serves here, or why it serves none."""
    rows = []
    for op in ops.__all__:
        module = getattr(ops, op)
        for backend in module.BACKENDS:
            reasons = {device: _probe(module, backend, device) for device in _devices()}
            usable = ", ".join(device for device, reason in reasons.items() if reason is None)
            # The last device is the GPU where there is one: its reason is the one that matters to most readers.
            rows.append((f"{op} / {backend}", f"usable on {usable}" if usable else f"no: {[*reasons.values()][-1]}"))
    return rows


def _packages() -> list[tuple[str, str]]:
    """For each package that ``sslfast.patch`` knows: what is installed, and whether that version was tested."""
    rows = []
    for name, known in PACKAGES.items():
        if known.distribution is None:
            rows.append((name, "not a distribution: its classes are tried out by sslfast.patch"))
            continue
        version = _version(known.distribution)
        tested = f"; tested: {', '.join(known.tested)}"
        rows.append((name, version + (", tested" if version in known.tested else tested)))
    return rows


def _machine() -> list[tuple[str, str]]:
    if _native.has_cpu:
        level = f"{torch.ops.sslfast.cpu_level()} in use, {torch.ops.sslfast.cpu_level_widest()} the widest here"
    else:
        level = "none: _C is missing"
    rows = [("CPU instructions", level), ("threads", str(torch.get_num_threads()))]
    if not torch.cuda.is_available():
        return [*rows, ("GPU", "none that torch can use")]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        rows.append((f"GPU {i}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"))
    return rows


def _build() -> list[tuple[str, str]]:
    if _native.host is None:
        return [("build", "unknown without _host")]
    rows = []
    for key, value in _native.host.build_info().items():
        shown = "none" if value is None else " ".join(value) if isinstance(value, list) else str(value)
        rows.append((key.replace("_", " "), shown))
    return rows


def report() -> str:
    """The whole report as text: the verdict, what serves each operation, and then every detail, one fact a line."""
    sections = {
        "Operations": _operation_rows(),
        "Compiled libraries": _libraries(),
        "Versions": _versions(),
        "Packages for sslfast.patch": _packages(),
        "Machine": _machine(),
        "Build": _build(),
        "Every backend (the first that serves a tensor's device is used)": _backend_rows(),
    }
    lines = [verdict(), ""]
    for title, rows in sections.items():
        width = max(len(name) for name, _ in rows)
        lines += [title, *(f"  {name:<{width}}  {value}" for name, value in rows), ""]
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    print(report())
