"""What the launchers share: which row of a configuration table a device uses, and how float32 products are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ._assembler import HOPPER, warn_of_fault

# Shared memory that one program may use, in bytes, for each architecture that a configuration table names.
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
INTERPRETER = 0


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options of one kernel.

    ``block_m``, ``block_n``: rows and columns of a tile of similarities; ``block_k``: features that a product takes at
    a time; ``block_d``: features of the result that one program owns (backward only); ``resident``: programs that fit a
    multiprocessor, by their registers.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    block_d: int = 0
    resident: int = 1


def architecture(z: Tensor) -> int:
    """The key of ``z``'s device in a configuration table: 80, 86, 90, 100, or ``INTERPRETER``.

    Compute capabilities 8.6, 8.9 and 12.x share one row: they have ``mma.sync`` and 99 KiB a program.

    Raises:
        RuntimeError: the GPU's compute capability is below 8.0.
    """
    if triton.knobs.runtime.interpret:
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(z.device)
    if major < 8:
        raise RuntimeError(f"the Triton kernels need compute capability 8.0 or newer, {z.device} has {major}.{minor}")
    if (major, minor) == (8, 0):
        return 80
    key = {9: HOPPER, 10: 100, 11: 100}.get(major, 86)
    warn_of_fault(key)
    return key


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: float32 products keep float32 accuracy unless the user allowed TF32.

    ``fp32_precision`` is what PyTorch's own products go by, whichever of its interfaces was used last; the older one
    (``get_float32_matmul_precision``, ``allow_tf32``) raises where the newer one has been written. 16-bit inputs ignore
    the result.
    """
    exact = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "tf32x3" if exact else "tf32"


def upcast(dtype: torch.dtype) -> bool:
    """Whether a kernel must widen its input right after the load: the interpreter cannot compute in bfloat16."""
    return triton.knobs.runtime.interpret and dtype == torch.bfloat16


def launch_options(config: Config, z: Tensor) -> dict[str, Any]:
    """What a kernel over tiles of rows like ``z`` [·, D] is compiled with, ``BLOCK_D`` where it owns such a part."""
    owned = {"BLOCK_D": config.block_d} if config.block_d else {}
    return {
        "D": z.shape[1],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        **owned,
        "PRECISION": dot_precision(z.dtype),
        "UPCAST": upcast(z.dtype),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def multiprocessors(z: Tensor) -> int:
    """Of ``z``'s GPU; of an H200 for the interpreter."""
    return torch.cuda.get_device_properties(z.device).multi_processor_count if z.is_cuda else 132


def best_split(programs: int, slots: int, most: int) -> int:
    """Among how many programs to share the work of each of ``programs``, at most ``most``.

    ``slots`` programs run at a time, a wave. The split with the fullest waves, the smaller one of equals: every part
    costs the writing of a partial result.
    """

    def fullness(split: int) -> float:
        waves = -(-programs * split // slots)
        return programs * split / (waves * slots)

    return max(range(1, max(1, most) + 1), key=lambda split: (round(fullness(split), 2), -split))
