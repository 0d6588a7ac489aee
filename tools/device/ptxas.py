"""A second ptxas, for what the first may do wrong.

ptxas 12.8 and 12.9 can overwrite a register operand of a running ``wgmma``: wrong sums, silently. 13.1 and later do
not. The Triton kernels are therefore checked under both: the one that Triton takes, and one that is known to be right.
"""

from __future__ import annotations

import functools
import importlib.util
import lzma
import re
import subprocess
import tempfile
from pathlib import Path

from .steps import ROOT

CARRIED = ROOT / "build" / "device"
RIGHT = (13, 1)  # the first version without the fault


def version_of(path: Path) -> str | None:
    """``13.1.80``, or ``None`` of what does not run."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"\bV(\d+\.\d+\.\d+)", done.stdout)
    return found[1] if found else None


def in_triton(name: str) -> Path | None:
    """A program of Triton's package, which is not imported for it."""
    spec = importlib.util.find_spec("triton")
    places = (spec.submodule_search_locations if spec else None) or []
    found = [Path(place) / "backends/nvidia/bin" / name for place in places]
    return next((path for path in found if path.exists()), None)


def unpacked(folder: Path = CARRIED) -> Path | None:
    """The one that was carried along, out of ``ptxas.xz`` into a folder of its own."""
    packed, plain = folder / "ptxas.xz", folder / "ptxas"
    if plain.exists() or not packed.exists():
        return plain if plain.exists() else None
    path = Path(tempfile.mkdtemp(prefix="ptxas-")) / "ptxas"
    path.write_bytes(lzma.decompress(packed.read_bytes()))
    path.chmod(0o755)
    return path


@functools.cache
def second() -> tuple[Path, str] | str:
    """(path, version) of a ptxas without the fault, other than the one Triton takes, or why there is none."""
    first = in_triton("ptxas")
    used = version_of(first) if first else None
    seen = []
    for path in (in_triton("ptxas-blackwell"), unpacked()):
        version = version_of(path) if path else None
        if path and version:
            if version != used and tuple(map(int, version.split(".")))[:2] >= RIGHT:
                return path, version
            seen.append(version)
    return f"no ptxas of 13.1 or later beside Triton's own ({used or 'none'}); found: {', '.join(seen) or 'nothing'}"
