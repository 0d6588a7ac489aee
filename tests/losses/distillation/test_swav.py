"""SwAV's loss against its formula in float64; the adapter's tests hold it against lightly."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from helpers import DTYPES, check_loss


def assigned(x: Tensor, queue: Tensor | None) -> Tensor:
    q = torch.exp((x if queue is None else torch.cat([queue, x])).detach() / 0.3).T
    for _ in range(3):
        q = q / q.sum(1, keepdim=True)
        q = q / q.sum(0, keepdim=True)
    return q.T if queue is None else q.T[len(queue) :]


def formula(scores: Tensor, queue: Tensor | None = None) -> Tensor:
    """Two views that are assigned, and smaller ones."""
    total = scores.new_zeros(())
    for i in range(2):
        q = assigned(scores[i], None if queue is None else queue.to(scores))
        total = total - sum((q * F.log_softmax(s / 0.1, 1)).sum(1).mean() for v, s in enumerate(scores) if v != i)
    return total / (2 * (len(scores) - 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(32, 48), (17, 301), (1, 3), (2, 1)], ids=str)
def test_value_and_gradients(shape: tuple[int, int], dtype: torch.dtype) -> None:
    views = (torch.randn(3, *shape, dtype=torch.float64) / 3).to(dtype)
    queue = torch.randn(5, shape[1]).to(dtype) / 3

    def loss(scores: Tensor, queue: Tensor | None = None) -> Tensor:
        queues = None if queue is None else [queue, queue]
        return sslfast.swav(list(scores[:2]), list(scores[2:]), queues, sinkhorn_epsilon=0.3)

    check_loss(loss, formula, (views,), floor=10.0, terms=shape[0])
    with_queue = partial(loss, queue=queue), partial(formula, queue=queue)
    check_loss(*with_queue, (views,), floor=10.0, terms=shape[0])


def test_finite_where_the_exponentials_are_not() -> None:
    views = [(torch.randn(64, 300) * 0.5).clamp(-0.6, 0.6).half() for _ in range(3)]
    far = [5 + torch.randn(64, 300) * 3 for _ in range(3)]
    for scores in (views, far):
        assert sslfast.swav(scores[:2], scores[2:]).isfinite()


def test_diagnostics_and_the_module() -> None:
    criterion = sslfast.SwAVLoss(diagnostics=True)
    scores = [torch.randn(200, 16) / 20 for _ in range(3)]
    loss, found = criterion(scores[:2], scores[2:])
    assert torch.equal(loss, sslfast.swav(scores[:2], scores[2:]))
    torch.testing.assert_close(found.loss_above_uniform, loss - math.log(16))
    q = torch.cat([sslfast.sinkhorn(s) for s in scores[:2]])
    torch.testing.assert_close(found.teacher_entropy, torch.special.entr(q).sum(1).mean())
    torch.testing.assert_close(found.usage_perplexity, torch.special.entr(q.mean(0)).sum().exp())
    assert 15 < found.usage_perplexity <= 16.001
    assert "sinkhorn_epsilon=0.05" in repr(criterion)


def test_bad_input() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="swav needs at least two views, got 1"):
        sslfast.swav([x])
    with pytest.raises(ValueError, match="sinkhorn_epsilon must be finite and not zero"):
        sslfast.swav([x, x], sinkhorn_epsilon=0.0)
    with pytest.raises(ValueError, match="queue_outputs must be one for each of 2 high-resolution views, got 1"):
        sslfast.swav([x, x], (), [x])
    with pytest.raises(ValueError, match=r"queue_outputs must be \[Q, 4\], got shape \(3, 3\)"):
        sslfast.swav([x, x], (), [x, x[:, 1:]])
    with pytest.raises(ValueError, match="the views of the views|must have the same shape"):
        sslfast.swav([x, x], [x[:2]])
    with pytest.raises(ValueError, match="iterations must be a whole number"):
        sslfast.swav([x, x], sinkhorn_iterations=0)
