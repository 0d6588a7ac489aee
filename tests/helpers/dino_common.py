"""What the tests of the DINOv2 and DINOv3 adapters share: inputs, and the trials made once."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from sslfast.adapters import dinov2, dinov3

CLOSE = {"rtol": 2e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def tried_once():
    """The classes are tried out at every patch; here they stay the same."""
    with pytest.MonkeyPatch.context() as patch:
        for adapter in (dinov2, dinov3):
            patch.setattr(adapter, "contents", functools.cache(adapter.contents))
        yield


def logits(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def targets(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return logits(*shape, dtype=torch.float64, seed=7).mul(2).softmax(-1).to(dtype)


def masks_of(*counts: int, patches: int = 9) -> Tensor:
    return torch.arange(patches) < torch.tensor(counts)[:, None]
