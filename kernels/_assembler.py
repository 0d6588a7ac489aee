"""ptxas, which turns what Triton writes into machine code, and the fault for Hopper that some versions of it have."""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from typing import NamedTuple

from triton import knobs

HOPPER = 90
# Before, a register may be given to another value while an asynchronous wgmma still reads it, and sums are silently
# wrong; seen with 12.8, 12.9 and 13.0, and no more with 13.1.80. NVIDIA's notes name the repair with CUDA 13.3.
SOUND = (13, 1)


class Assembler(NamedTuple):
    path: str
    version: tuple[int, ...]
    variable: str  # of the environment, which chooses another


def assembler(architecture: int) -> Assembler | None:
    """What Triton assembles with for an architecture such as 90; ``None`` where it finds none.

    Triton has two of them, and its versions differ in which one is for Hopper.
    """
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        takes_architecture = len(inspect.signature(get_ptxas).parameters) > 0  # from Triton 3.6 on
        tool = get_ptxas(architecture) if takes_architecture else get_ptxas()
        usual = tool == knobs.nvidia.ptxas
    except (ImportError, RuntimeError):  # a Triton for other GPUs; no such file
        return None
    variable = "TRITON_PTXAS_PATH" if usual else "TRITON_PTXAS_BLACKWELL_PATH"
    return Assembler(tool.path, _numbers(tool.version), variable)


def fault(architecture: int) -> str | None:
    """What is wrong with that assembler, and what to set; ``None``: nothing known."""
    used = assembler(architecture) if architecture == HOPPER else None
    if used is None or used.version >= SOUND:
        return None
    found, sound = (".".join(map(str, version)) for version in (used.version, SOUND))
    return (
        f"ptxas {found} ({used.path}) can overwrite registers that a running wgmma still reads, so that results are "
        f"wrong without a word; set {used.variable} to ptxas {sound} or newer before Python starts{_another()}"
    )


@functools.cache
def warn_of_fault(architecture: int) -> None:
    """Say it, once in a process. A kernel's table of tiles is asked for at every launch, so this is called often."""
    found = fault(architecture)
    if found is not None:
        warnings.warn(f"sslfast: {found}", stacklevel=3)


def _another() -> str:
    """The one for Blackwell, if Triton has it beside and it is sound."""
    try:
        other = knobs.nvidia.ptxas_blackwell
    except (AttributeError, RuntimeError):  # before Triton 3.6
        return ""
    return f", such as Triton's own {other.path}" if _numbers(other.version) >= SOUND else ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
