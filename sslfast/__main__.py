"""``python -m sslfast``: what this installation consists of, and which backends can serve a call on this machine."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

import sslfast
from sslfast import _native, ops
from sslfast.adapters import PACKAGES


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


def _backend_rows(devices: list[str]) -> list[tuple[str, str]]:
    """For each operation and backend: the devices it serves here, or why it serves none."""
    rows = []
    for op in ops.__all__:
        module = getattr(ops, op)
        for backend in module.BACKENDS:
            if backend == "reference":
                rows.append((f"{op} / {backend}", f"usable on {', '.join(devices)}"))
                continue
            reasons = {device: module.why_not(backend, torch.empty(1, 1, device=device)) for device in devices}
            usable = ", ".join(device for device, reason in reasons.items() if reason is None)
            # The last device is the GPU where there is one: its reason is the one that matters to most readers.
            rows.append((f"{op} / {backend}", f"usable on {usable}" if usable else f"no: {reasons[devices[-1]]}"))
    return rows


def _packages() -> list[tuple[str, str]]:
    """For each package that ``sslfast.patch`` knows: what is installed, and whether that version was tested."""
    rows = []
    for name, known in PACKAGES.items():
        if known.distribution is None:
            rows.append((name, "not a distribution: classes of loaded modules"))
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
        return [("build", "unknown: _host is missing")]
    rows = []
    for key, value in _native.host.build_info().items():
        shown = "none" if value is None else " ".join(value) if isinstance(value, list) else str(value)
        rows.append((key.replace("_", " "), shown))
    return rows


def report() -> str:
    """The whole report as text, one fact a line."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    sections = {
        "Versions": _versions(),
        "Compiled libraries": _libraries(),
        "Backends": _backend_rows(devices),
        "Packages for sslfast.patch": _packages(),
        "Machine": _machine(),
        "Build": _build(),
    }
    width = max(len(name) for rows in sections.values() for name, _ in rows)
    lines = []
    for title, rows in sections.items():
        lines += [title, *(f"  {name:<{width}}  {value}" for name, value in rows), ""]
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    print(report())
