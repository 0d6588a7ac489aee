"""MoCo's losses against the formulas of the reference code, and a queue that moves on before the backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers import roundings, within_budget
from sslfast.losses.contrastive.moco import MoCoLoss, MoCoV3Loss, moco, moco_v3

GRAD_LOSS = 3.0  # not 1: a backward that forgets it fails


def plain(q: Tensor, k: Tensor, tau: Tensor, queue: Tensor) -> Tensor:
    """Equation 1: a softmax over the positive and the queue, the positive first."""
    q, k = F.normalize(q), F.normalize(k)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / tau
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))


def plain_v3(q: Tensor, k: Tensor, tau: Tensor) -> Tensor:
    logits = F.normalize(q) @ F.normalize(k.detach()).T / tau
    return F.cross_entropy(logits, torch.arange(len(q))) * (2 * tau)


def value_and_gradients(function, *inputs: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    loss = function(*leaves)
    found = torch.autograd.grad(loss, leaves, torch.full_like(loss, GRAD_LOSS), allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True))]


def rows(n: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    q = torch.randn(n, d)
    return q.to(dtype), (q + torch.randn(n, d)).to(dtype)


def within(name: str, ours, formula, inputs: tuple[Tensor, ...]) -> None:
    dtype = inputs[0].dtype
    kernel, reference = value_and_gradients(ours, *inputs), roundings(value_and_gradients, formula, *inputs)
    truth = value_and_gradients(formula, *(t.double() for t in inputs))
    # dq is a sum of terms of size g/(N τ ‖q‖), dτ one of terms of size g·max|q·k|/τ².
    tau = inputs[2].item()
    each = GRAD_LOSS / (len(inputs[0]) * tau)
    floors = {"loss": 1.0, "dq": each, "dk": each, "dtau": GRAD_LOSS / tau**2}
    for what, k, r, t in zip(floors, kernel, reference, truth, strict=True):
        within_budget(f"{name}: {what}", k, r, t, dtype, floors[what])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("tau", [0.07, 0.01, 1.0])
@pytest.mark.parametrize("shape", [(16, 40, 8), (1, 1, 3), (33, 301, 20)], ids=str)
def test_queue(shape: tuple[int, int, int], tau: float, dtype: torch.dtype) -> None:
    n, size, d = shape
    queue = F.normalize(torch.randn(size, d)).to(dtype)
    inputs = (*rows(n, d, dtype), torch.tensor(tau, dtype=dtype))
    within(
        "moco",
        lambda q, k, t: moco(q, k, queue, t),
        lambda q, k, t: plain(q, k, t, queue.to(q.dtype)),
        inputs,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_v3(dtype: torch.dtype) -> None:
    inputs = (*rows(33, 20, dtype), torch.tensor(0.2, dtype=dtype))
    within("moco_v3", moco_v3, plain_v3, inputs)
    assert torch.equal(MoCoV3Loss()(*inputs[:2]), moco_v3(*inputs[:2], 0.2))


def test_keys_without_gradient_and_a_transposed_queue() -> None:
    """solo-learn keeps its queue as [D, K]; a view of it will do."""
    q, k = rows(10, 6)
    queue = F.normalize(torch.randn(6, 30), dim=0)
    q.requires_grad_()
    loss = moco(q, k, queue.T, 0.2)
    loss.backward()
    torch.testing.assert_close(loss, moco(q, k, queue.T.contiguous(), 0.2))
    assert k.grad is None and q.grad.isfinite().all()


@pytest.mark.parametrize("diagnostics", [False, True])
def test_backward_after_the_queue_moved_on(diagnostics: bool) -> None:
    """Two steps' losses, then one backward: each gradient is that of the keys its loss saw."""
    loss_fn = MoCoLoss(12, 6, 0.2, diagnostics=diagnostics)
    steps = [tuple(F.normalize(x) for x in rows(5, 6)) for _ in range(4)]
    total, expected, leaves = 0.0, [], []
    for q, k in steps:
        seen = loss_fn.memory_queue.queue.clone()
        leaf = q.clone().requires_grad_()
        expected.append(torch.autograd.grad(plain(leaf, k, torch.tensor(0.2), seen), leaf)[0])
        result = loss_fn(leaf, k)
        total = total + (result[0] if diagnostics else result)
        leaves.append(leaf)
        assert not torch.equal(loss_fn.memory_queue.queue, seen)
    total.backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


def test_no_copy_of_the_queue_is_kept() -> None:
    loss_fn = MoCoLoss(1000, 6)
    q, k = rows(4, 6)
    saved: list[int] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss_fn(q.requires_grad_(), k)
    assert saved and max(saved) < 1000


def test_a_second_derivative_after_an_enqueue_is_an_error() -> None:
    loss_fn = MoCoLoss(12, 6)
    q, k = rows(5, 6)
    loss = loss_fn(q.requires_grad_(), k)
    with pytest.raises(RuntimeError, match="k was overwritten"):
        torch.autograd.grad(loss, q, create_graph=True)
    queue = loss_fn.memory_queue.queue
    (first,) = torch.autograd.grad(moco(q, k, queue), q, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), q)
    assert second.isfinite().all()


def test_evaluation_leaves_the_queue_as_it_is() -> None:
    loss_fn = MoCoLoss(12, 6)
    before = loss_fn.memory_queue.queue.clone()
    q, k = rows(5, 6)
    loss_fn(q, k)
    with torch.no_grad():
        loss_fn(q.clone().requires_grad_(), k)
    assert torch.equal(loss_fn.memory_queue.queue, before) and loss_fn.memory_queue.pointer == 0


def test_queue_in_another_dtype() -> None:
    """Rows and queue are used in the wider dtype; what enters the queue is normalised in it."""
    loss_fn = MoCoLoss(12, 6)
    q, k = rows(5, 6, torch.bfloat16)
    seen = loss_fn.memory_queue.queue.clone()
    loss = loss_fn(q.requires_grad_(), k)
    loss.backward()
    torch.testing.assert_close(loss, plain(q.float(), k.float(), torch.tensor(0.07), seen))
    assert q.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss_fn.memory_queue.queue[:5], F.normalize(k.float()))


def test_diagnostics() -> None:
    q, k = (F.normalize(x) for x in rows(20, 6, torch.float64))
    queue = F.normalize(torch.randn(30, 6, dtype=torch.float64))
    module = MoCoLoss(30, 6, 0.2, diagnostics=True).double()
    module.memory_queue.queue.copy_(queue)
    loss, found = module(q, k)
    torch.testing.assert_close(loss, moco(q, k, queue, 0.2))
    positive, negative = (q * k).sum(1), q @ queue.T
    torch.testing.assert_close(found.accuracy, (positive > negative.amax(1)).double().mean())
    torch.testing.assert_close(found.positive_similarity, positive.mean())
    torch.testing.assert_close(found.hardest_negative_similarity, negative.amax(1).mean())
    pairs = torch.cat([positive[:, None], negative], dim=1)
    torch.testing.assert_close(found.uniformity_at_temperature, (-2.5 * (2 - 2 * pairs)).exp().mean().log())


def test_training_step_compiles_without_graph_breaks() -> None:
    eager, compiled = MoCoLoss(12, 6, 0.2), MoCoLoss(12, 6, 0.2)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(4):
        q, k = rows(5, 6)
        results = []
        for function in (eager, step):
            leaf = q.clone().requires_grad_()
            loss = function(leaf, k)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        torch.testing.assert_close(results[0], results[1])
        assert torch.equal(eager.memory_queue.queue, compiled.memory_queue.queue)


def test_learnable_temperature_and_state_dict() -> None:
    learns = torch.nn.Parameter(torch.tensor(0.2))
    loss_fn = MoCoLoss(12, 6, learns)
    q, k = rows(5, 6)
    loss_fn(q.requires_grad_(), k).backward()
    assert learns.grad is not None and learns.grad != 0
    assert sorted(loss_fn.state_dict()) == ["memory_queue.pointer", "memory_queue.queue", "temperature"]


@pytest.mark.parametrize(
    ("q", "k", "queue", "error", "message"),
    [
        (torch.ones(4, 3), torch.ones(4, 3), torch.ones(9, 2), ValueError, r"queue and q .*same width.*2 and 3"),
        (torch.ones(4, 3), torch.ones(5, 3), torch.ones(9, 3), ValueError, r"q and k .*same shape"),
        (torch.ones(4, 3), torch.ones(4, 3).double(), torch.ones(9, 3), TypeError, r"q and k .*same dtype"),
        (torch.ones(4, 3), torch.ones(4, 3), torch.ones(9), ValueError, r"queue must be two-dimensional"),
        (torch.ones(4, 3), torch.ones(4, 3), torch.ones(9, 3, device="meta"), ValueError, r"same device"),
    ],
)
def test_wrong_input(q, k, queue, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        moco(q, k, queue)
