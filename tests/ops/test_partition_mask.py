"""Ids of kept and of masked patches of given masks, and where each patch went."""

from __future__ import annotations

import pytest
import torch

import sslfast
from augment_common import KERNELS, device_of
from sslfast import masking
from sslfast.ops.partition_mask import partition_mask

pytestmark = pytest.mark.sanitize


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize(("batch", "length", "kept"), [(1, 1, 0), (1, 1, 1), (3, 7, 2), (5, 196, 49), (2, 1000, 999)])
def test_ids_are_those_of_a_stable_sort(batch: int, length: int, kept: int, backend: str) -> None:
    order = torch.stack([torch.randperm(length) for _ in range(batch)])
    mask = torch.ones(batch, length, dtype=torch.bool).scatter(1, order[:, :kept], False)
    with sslfast.use_backend(backend):
        found = [x.cpu() for x in partition_mask(mask.to(device_of(backend)), kept)]
    both = mask.to(torch.uint8).argsort(dim=1, stable=True)  # kept ones first, each part ascending
    expected = both[:, :kept], both[:, kept:], both.argsort(dim=1)
    for mine, true in zip(found, expected, strict=True):
        assert mine.dtype == torch.int64 and torch.equal(mine, true)


def test_the_operator_checks_how_many_are_kept() -> None:
    with pytest.raises(RuntimeError, match="kept must be between 0 and 4, got 5"):
        torch.ops.sslfast.partition_mask(torch.zeros(2, 4, dtype=torch.bool), 5)


@pytest.mark.parametrize("backend", KERNELS)
def test_torch_citizen(backend: str) -> None:
    ids = torch.arange(5, device=device_of(backend))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    mask = masking.random_masks(ids, 24).mask
    torch.library.opcheck(torch.ops.sslfast.partition_mask.default, (mask, 6), test_utils=tests)


@pytest.mark.gpu
def test_a_mask_of_other_counts_stays_in_bounds() -> None:
    """On CUDA nothing is checked: ids that are missing are −1, what is too much is left out."""
    mask = torch.tensor([[0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]], dtype=torch.bool, device="cuda")
    keep, masked, restore = (a.cpu().tolist() for a in partition_mask(mask, 2))
    assert keep == [[0, 2], [-1, -1], [0, 1]] and masked == [[1, -1], [0, 1], [2, 3]]
    assert restore[2] == [0, 1, 2, 3] and all(0 <= i < 4 for row in restore for i in row)
