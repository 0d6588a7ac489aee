"""ReSSL's loss against its formula in float64; the queue, which learns nothing and takes in the keys."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import sslfast
from helpers import DTYPES, check_loss, value_and_gradients

HOW = {"temperature_q": 0.3, "temperature_k": 0.1}


def formula(q: Tensor, k: Tensor, queue: Tensor, normalize: bool = True) -> Tensor:
    k, queue = k.to(q), queue.to(q)
    q, k = (F.normalize(q, dim=1), F.normalize(k, dim=1)) if normalize else (q, k)
    targets = F.softmax(k.detach() @ queue.T / 0.1, 1)
    return -(targets * F.log_softmax(q @ queue.T / 0.3, 1)).sum(1).mean()


def drawn(n: int, size: int, d: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    q, k, queue = (torch.randn(rows, d, dtype=torch.float64) for rows in (n, n, size))
    return q.to(dtype), k.to(dtype), F.normalize(queue, dim=1).to(dtype)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(32, 200, 16), (7, 61, 30), (1, 5, 8), (3, 1, 1), (16, 4099, 24)], ids=str)
def test_value_and_gradient(shape: tuple[int, int, int], dtype: torch.dtype, normalize: bool) -> None:
    q, k, queue = drawn(*shape, dtype)
    q, k = (x / shape[2] ** 0.5 for x in (q, k))
    how = {"k": k, "queue": queue, "normalize": normalize}
    check_loss(partial(sslfast.re_ssl, **how, **HOW), partial(formula, **how), (q,), floor=10.0, terms=shape[0])


def test_dtypes_of_the_queue_autocast_and_compile() -> None:
    q, k, queue = drawn(9, 40, 12, torch.float32)
    expected = value_and_gradients(lambda q: sslfast.re_ssl(q, k, queue), q)
    assert sslfast.re_ssl(q.bfloat16(), k.bfloat16(), queue).dtype == torch.float32
    torch.testing.assert_close(sslfast.re_ssl(q, k, queue.double()), expected[0].double())
    compiled = torch.compile(sslfast.re_ssl, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(value_and_gradients(lambda q: compiled(q, k, queue), q), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sslfast.re_ssl(q, k, queue), expected[0])


def test_only_the_queries_learn() -> None:
    q, k, queue = (x.requires_grad_() for x in drawn(3, 6, 4))
    loss = sslfast.re_ssl(q, k, queue, **HOW)
    assert torch.autograd.grad(loss, (k, queue), allow_unused=True, retain_graph=True) == (None, None)
    assert torch.autograd.gradcheck(lambda q: sslfast.re_ssl(q, k, queue, **HOW), q)
    assert torch.autograd.gradgradcheck(lambda q: sslfast.re_ssl(q, k, queue, **HOW), q)


def test_the_module_and_its_queue() -> None:
    """The loss is that of the queue before the keys entered it, though its backward comes later."""
    criterion = sslfast.ReSSLLoss(11, 4, **HOW).double()
    for step in range(4):
        q, k, _ = drawn(5, 1, 4)
        seen, leaf = criterion.memory_queue.queue.clone(), q.clone().requires_grad_()
        loss = criterion(leaf, k.requires_grad_())
        (gradient,) = torch.autograd.grad(loss, leaf)
        found = value_and_gradients(lambda q, k=k, seen=seen: formula(q, k, seen), q)
        torch.testing.assert_close((loss.detach(), 3 * gradient), (found[0], found[1]))
        places = (5 * step + torch.arange(5)) % 11
        torch.testing.assert_close(criterion.memory_queue.queue[places], F.normalize(k.detach(), dim=1))
    before = criterion.memory_queue.queue.clone()
    criterion(q, k)  # an evaluation
    assert torch.equal(criterion.memory_queue.queue, before)
    other = sslfast.ReSSLLoss(11, 4, **HOW).double()
    other.load_state_dict(criterion.state_dict())
    assert torch.equal(other(leaf, k), criterion(leaf, k))
    assert sorted(criterion.state_dict()) == ["memory_queue.pointer", "memory_queue.queue"]
    assert "temperature_k=0.1" in repr(criterion)


def test_what_computes_again_needs_the_queue_as_it_was() -> None:
    q, k, _ = drawn(4, 1, 5)
    for again in ("a second backward", "create_graph"):
        criterion, leaf = sslfast.ReSSLLoss(6, 5).double(), q.clone().requires_grad_()
        loss = criterion(leaf, k)
        if again == "a second backward":
            loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="the prototypes were overwritten after the loss was computed"):
            torch.autograd.grad(loss, leaf, create_graph=again == "create_graph")


def test_the_module_of_fake_tensors_and_compiled() -> None:
    """Whose backward comes after the keys are in, too."""
    q, k, _ = drawn(5, 1, 4, torch.float32)
    torch.manual_seed(0)
    eager, traced = sslfast.ReSSLLoss(11, 4), sslfast.ReSSLLoss(11, 4)
    compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        found = [value_and_gradients(lambda q, f=f: f(q, k), q) for f in (eager, compiled)]
        torch.testing.assert_close(found[1], found[0])
        torch.testing.assert_close(traced.memory_queue.queue, eager.memory_queue.queue)
    with FakeTensorMode():
        leaf = torch.randn(5, 4, requires_grad=True)
        sslfast.ReSSLLoss(11, 4)(leaf, torch.randn(5, 4)).backward()
        assert leaf.grad is not None and leaf.grad.shape == (5, 4)


def test_bad_input() -> None:
    q, k, queue = drawn(4, 9, 6)
    for name in HOW:
        with pytest.raises(ValueError, match=f"{name} must be finite and not zero"):
            sslfast.re_ssl(q, k, queue, **{name: 0.0})
        with pytest.raises(TypeError, match=f"{name} must be a number"):
            sslfast.re_ssl(q, k, queue, **{name: torch.tensor(0.1)})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="queue and q must have the same width, got 5 and 6 features"):
        sslfast.re_ssl(q, k, queue[:, 1:])
    with pytest.raises(ValueError, match="q and k must have the same shape"):
        sslfast.re_ssl(q, k[1:], queue)
    with pytest.raises(TypeError, match="k must be a torch.Tensor, got list"):
        sslfast.re_ssl(q, [k], queue)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dim must be a positive integer"):
        sslfast.ReSSLLoss(8, 0)
