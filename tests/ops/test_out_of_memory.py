"""Memory that runs out is PyTorch's own error, with the size: tools that search for a batch size know it by that."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sslfast
from sslfast import _library, masking

SIDE = 2**24  # a tensor of SIDE × SIDE numbers that takes the memory of one


def huge(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros((), dtype=dtype).expand(SIDE, SIDE)


CALLS: dict[str, tuple[Callable[[], Any], int]] = {
    "l2_normalize": (lambda: sslfast.l2_normalize(huge()), 4),
    "nt_xent": (lambda: sslfast.nt_xent(huge(), huge()), 4),
    "similarity_lse": (lambda: sslfast.similarity_lse(huge(), huge(), 1.0), 4),
    "second_moment": (lambda: torch.ops.sslfast.second_moment(huge(), None, False, True, 0, 1e-5, True, False), 4),
    "partition_mask": (lambda: torch.ops.sslfast.partition_mask(huge(torch.bool), 0), 1),
    "gather_tokens": (
        lambda: masking.gather_tokens(huge()[None], torch.zeros(1, 1, dtype=torch.int64), prefix=huge()),
        4,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_allocators_words_and_the_size(name: str) -> None:
    function, item = CALLS[name]
    with pytest.raises(RuntimeError) as plain:
        huge().clone(memory_format=torch.contiguous_format)
    words = "DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    assert words in str(plain.value)
    with pytest.raises(RuntimeError, match=f"{words} {SIDE * SIDE * item} bytes"):
        function()


def test_in_the_backward() -> None:
    """The forward fits; beside its results the gradient does not."""
    code = """
import resource
import torch, sslfast
x = torch.ones(2**22, 16, requires_grad=True)
y = sslfast.l2_normalize(x)
grad = torch.ones_like(y)
used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, -1))
try:
    y.backward(grad)
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "can't allocate memory: you tried to allocate 268435456 bytes" in done.stdout, done.stdout + done.stderr


def test_on_a_gpu_it_is_torchs_class() -> None:
    def kernel(message: str) -> None:
        raise RuntimeError(message)

    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 64 bytes"):
        _library.with_memory_error(kernel, "sslfast: CUDA out of memory. Tried to allocate 64 bytes.")
    with pytest.raises(RuntimeError, match="another") as other:
        _library.with_memory_error(kernel, "another")
    assert not isinstance(other.value, torch.OutOfMemoryError)
