"""Which backend can serve an operation that has a C++ kernel, a CUDA kernel and a reference, by where a tensor is."""

from __future__ import annotations

from torch import Tensor

from .. import _native


def why_not(op: str, like: str, backend: str, tensor: Tensor) -> str | None:
    """The reason ``backend`` cannot serve ``op`` on its argument ``tensor``, called ``like``, or ``None`` if it can.

    An operation's own ``why_not(backend, tensor)`` is this with its names filled in.
    """
    if backend == "cpu":
        return _native.why_no_cpu(tensor.device, like)
    if backend == "cuda":
        return _native.why_no_cuda(tensor.device, like)
    return f"{op} has no {backend} implementation"
