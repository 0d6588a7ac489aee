"""The masked tokens of a batch as one list of a fixed size."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import sslfast
from augment_common import BACKENDS, KERNELS, device_of
from sslfast.ops.masked_rows import masked_rows
from sslfast.ops.partition_mask import partition_mask

pytestmark = pytest.mark.sanitize


def listed(backend: str, mask: Tensor, size: int) -> list[Tensor]:
    with sslfast.use_backend(backend):
        return [a.cpu() for a in masked_rows(mask.to(device_of(backend)), size)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 196), (1, 1), (700, 61), (2, 40_000), (0, 5), (5, 0)], ids=str)
def test_lists_what_nonzero_lists(backend: str, shape: tuple[int, int]) -> None:
    """As ``collate_data_and_cast``; rows with none, with all, with one; room to spare and none."""
    mask = torch.rand(shape) < torch.rand(shape[0], 1)
    mask[::5], mask[1::7] = False, True
    found = mask.flatten().nonzero().flatten()
    weights = (1 / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(mask)[mask]
    for spare, m in ((0, mask), (1, mask.t().contiguous().t()), (1000, mask)):
        rows, weight, count = listed(backend, m, len(found) + spare)
        assert torch.equal(rows, torch.cat([found, torch.full((spare,), -1)]))
        assert torch.equal(weight, torch.cat([weights, torch.zeros(spare)])) and weight.dtype == torch.float32
        assert count.tolist() == [len(found)] and count.dtype == torch.int64


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_too_short_a_list_is_an_error(backend: str) -> None:
    mask = torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="size must be at least the number of masked tokens, 12, got 11"):
        listed(backend, mask, 11)
    with pytest.raises(ValueError, match="size must be a whole number of at least 0, got -1"):
        listed(backend, mask, -1)
    with pytest.raises(TypeError, match=r"mask must be \[images, patches\] of bool, got \(3, 4\) of torch.float32"):
        listed(backend, mask.float(), 12)


@pytest.mark.gpu
def test_too_short_a_list_is_nan_on_a_gpu() -> None:
    mask = torch.ones(3, 4, dtype=torch.bool, device="cuda")
    rows, weights, count = masked_rows(mask, 11)
    assert rows.tolist() == list(range(11)) and count.item() == 12
    assert all(math.isnan(w) for w in weights.tolist())


@pytest.mark.parametrize("backend", KERNELS)
def test_torch_citizen(backend: str) -> None:
    mask = torch.rand(5, 7, device=device_of(backend)) < 0.4
    torch.library.opcheck(
        torch.ops.sslfast.masked_rows.default,
        (mask, 35),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    compiled = torch.compile(lambda m: masked_rows(m, 35), backend="aot_eager", fullgraph=True)
    with sslfast.use_backend(backend):
        assert all(torch.equal(a, b) for a, b in zip(compiled(mask), masked_rows(mask, 35), strict=True))


def test_a_mask_of_other_bytes_than_0_and_1() -> None:
    """As a view of bytes gives it: true is whatever is not 0."""
    mask = torch.tensor([[2, 0, 255], [0, 1, 3]], dtype=torch.uint8).view(torch.bool)
    rows, weights, count = masked_rows(mask, 5)
    assert rows.tolist() == [0, 2, 4, 5, -1] and weights.tolist() == [0.5] * 4 + [0] and count.item() == 4
    keep, masked, restore = partition_mask(mask, 1)
    assert keep.tolist() == [[1], [0]] and masked.tolist() == [[0, 2], [1, 2]]
    assert restore.tolist() == [[1, 0, 2], [0, 1, 2]]
