"""Random unit vectors for sliced statistics, keyed by a seed and a step: Philox4x32-10 and Box and Muller's formula.

No state: the same (seed, step) gives the same directions on every rank and device, to a few units in the last place of
float32 (the random words and the angles are the same to the bit; logarithms, roots and lengths round as each device
does). ``step`` stays where it is: nothing waits for a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backends, _library, _native, reference

BACKENDS = ("cpu", "triton", "reference")
MOST_FEATURES = 2**18  # four of a block, and 2^16 blocks of a stream


def why_not(backend: str, step: Tensor) -> str | None:
    """The reason ``backend`` cannot serve a ``step`` like this, or ``None`` if it can."""
    if backend == "cpu":
        return _native.why_no_cpu(step.device, "step")
    if backend == "triton":
        return _native.why_no_triton(step.device)
    return f"unit_slices has no {backend} implementation"


def _fake(step: Tensor, seed: int, features: int, count: int) -> Tensor:
    return step.new_empty((features, count), dtype=torch.float32)


def _triton(step: Tensor, seed: int, features: int, count: int) -> Tensor:
    from ..kernels import unit_slices as kernel

    return kernel.unit_slices(step, seed, features, count)


for _name in ("unit_slices", "unit_slices_triton"):
    _library.define(f"{_name}(Tensor step, int seed, int features, int count) -> Tensor", _fake)
_library.implement("unit_slices_triton", _triton, "CUDA", "CPU")


def unit_slices(step: Tensor, seed: int, features: int, count: int) -> Tensor:
    """Unit columns with independent uniform directions.

    For losses in this package, which have checked the arguments.

    Args:
        step: [] int64, on the device of the result; its lower 32 bits count.
        seed: any 64 bits, signed.
        features: D, at most 2^18.
        count: S, how many columns.

    Returns:
        [D, S] float32.

    Example:
        >>> from sslfast.ops.unit_slices import unit_slices
        >>> unit_slices(torch.tensor(0), 0, 64, 8).norm(dim=0).round().tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    backend = _backends.serve("unit_slices", step, "triton", why_not)
    if backend == "reference":
        return reference.unit_slices(step, seed, features, count).float()
    name = "unit_slices_triton" if backend == "triton" else "unit_slices"
    slices: Tensor = _library.call(name, step, seed, features, count)
    return slices
