"""The ring buffer of keys: what it holds after any sequence of enqueues, and that it is a torch citizen."""

from __future__ import annotations

import copy
from collections import deque

import pytest
import torch

from sslfast.losses.memory_queue import MemoryQueue


@pytest.mark.parametrize("sizes", [[3, 3, 3], [7, 7], [10, 1], [4, 9, 2], [23], [1] * 12], ids=str)
def test_holds_the_last_keys(sizes: list[int]) -> None:
    """Also across the wrap, with batches that do not divide K, and with more keys than K at once."""
    queue = MemoryQueue(10, 4)
    last = deque(queue.queue.unbind(), maxlen=10)  # oldest first
    written = 0
    for size in sizes:
        keys = torch.randn(size, 4)
        queue.enqueue(keys)
        last.extend(keys.unbind())
        written += size
        assert queue.pointer.item() == written % 10
        assert torch.equal(queue.queue.roll(-int(queue.pointer), 0), torch.stack(tuple(last)))


def test_starts_with_the_same_unit_rows_everywhere() -> None:
    before = torch.get_rng_state()
    first, second = MemoryQueue(50, 8), MemoryQueue(50, 8)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.queue, second.queue)
    torch.testing.assert_close(first.queue.norm(dim=1), torch.ones(50))
    assert first.queue.unique(dim=0).shape[0] == 50


def test_state_dict_carries_keys_and_pointer() -> None:
    queue = MemoryQueue(10, 4)
    queue.enqueue(torch.randn(7, 4))
    other = MemoryQueue(10, 4)
    other.load_state_dict(copy.deepcopy(queue.state_dict()))
    keys = torch.randn(5, 4)
    queue.enqueue(keys)
    other.enqueue(keys)
    assert torch.equal(queue.queue, other.queue) and torch.equal(queue.pointer, other.pointer)
    with pytest.raises(RuntimeError, match="size mismatch"):
        MemoryQueue(11, 4).load_state_dict(queue.state_dict())


def test_keeps_neither_graph_nor_foreign_dtype() -> None:
    queue = MemoryQueue(10, 4).to(torch.bfloat16)
    assert queue.queue.dtype == torch.bfloat16 and queue.pointer.dtype == torch.int64
    keys = torch.randn(3, 4, requires_grad=True)
    queue.enqueue(keys)
    assert not queue.queue.requires_grad
    assert torch.equal(queue.queue[:3], keys.detach().bfloat16())


def test_nearest_keys_are_those_of_lightlys_module() -> None:
    """NNCLR's positives: the key itself, by cosine, of queries and keys of any norm."""
    queue = MemoryQueue(40, 6)
    queue.enqueue(torch.randn(40, 6) * torch.linspace(0.1, 5, 40)[:, None])
    z = torch.randn(9, 6, requires_grad=True)
    cosines = torch.nn.functional.cosine_similarity(z[:, None], queue.queue, dim=2)
    found = queue.nearest(z)
    assert torch.equal(found, queue.queue[cosines.argmax(1)]) and not found.requires_grad
    with pytest.raises(ValueError, match=r"z and the queue must have the same width, got 5 and 6"):
        queue.nearest(torch.randn(3, 5))
    assert torch.equal(queue.nearest(z.double()), found.double())


def test_compiles_once_for_every_place_of_the_pointer() -> None:
    """The place is a tensor, never a number that the host (or the compiler) would have to know."""
    compiled, eager = MemoryQueue(10, 4), MemoryQueue(10, 4)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    enqueue = torch.compile(compiled.enqueue, fullgraph=True, backend=count)
    for _ in range(5):
        keys = torch.randn(4, 4)
        enqueue(keys)
        eager.enqueue(keys)
        assert torch.equal(compiled.queue, eager.queue)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        (torch.ones(3, 5), ValueError, r"as wide as the queue, 4 features, got 5"),
        (torch.ones(4), ValueError, r"keys must be two-dimensional"),
        (torch.ones(3, 4, dtype=torch.int64), TypeError, r"keys must be float32"),
        (torch.ones(3, 4, device="meta"), ValueError, r"keys must be on the queue's device cpu, got meta"),
    ],
)
def test_wrong_keys(keys: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MemoryQueue(10, 4).enqueue(keys)


@pytest.mark.parametrize(("size", "dim"), [(0, 4), (4, -1), (4.5, 4)])
def test_wrong_size(size, dim) -> None:
    with pytest.raises(ValueError, match="must be a positive integer"):
        MemoryQueue(size, dim)
