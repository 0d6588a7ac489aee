"""CO2 against lightly's and against the formula, blocks, queues, and wrong input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers import check_loss, roundings, same_value_and_gradients, two_views, value_and_gradients, within_budget
from lightly_common import lightly_loss
from sslfast.losses.contrastive import co2 as module
from sslfast.losses.contrastive.co2 import CO2Regularizer, co2


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Half the symmetric one of two logits [N, K], mean over the rows."""
    p, q = p.log_softmax(1), q.log_softmax(1)
    return sum(F.kl_div(*pair, reduction="batchmean", log_target=True) for pair in ((p, q), (q, p))) / 2


def plain(q: Tensor, k: Tensor, queue: Tensor | None = None, tau: float | Tensor = 0.05) -> Tensor:
    q, k = F.normalize(q), F.normalize(k)
    if queue is None:
        return divergence(q @ k.T / tau, k @ q.T / tau)
    positive = (q * k).sum(1, keepdim=True)
    return divergence(*(torch.cat([positive, x @ queue.T], 1) / tau for x in (q, k)))


def keys(count: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(count, width, dtype=torch.float64)).to(dtype)


@pytest.fixture(params=[2**20, 40, 1], ids=["one block", "several blocks", "a row a block"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("shape", [(13, 6), (2, 3), (1, 4), (7, 1)], ids=str)
@pytest.mark.parametrize("count", [None, 1, 19])
def test_equals_the_formula(count: int | None, shape: tuple[int, int]) -> None:
    queue = None if count is None else keys(count, shape[1])
    inputs = (*two_views(shape), torch.tensor(0.3, dtype=torch.float64))
    same_value_and_gradients(lambda q, k, t: co2(q, k, queue, t), lambda q, k, t: plain(q, k, queue, t), *inputs)


@pytest.mark.parametrize("size", [0, (16, 6)], ids=str)
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_value_is_lightlys(size) -> None:
    """lightly's result is a copy without gradient."""
    theirs = lightly_loss("regularizer").CO2Regularizer(2.0, 0.2, size).double()
    ours = CO2Regularizer(2.0, 0.2, size).double()
    if size:
        theirs.memory_bank.bank.copy_(ours.memory_bank.queue)
    for _ in range(6):  # the bank wraps around once
        q, k = two_views((4, 6))
        expected = theirs(q, k)
        assert not expected.requires_grad
        torch.testing.assert_close(ours(q.requires_grad_(), k).detach(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [None, 40])
def test_dtypes(count: int | None, dtype: torch.dtype) -> None:
    queue = None if count is None else keys(count, 12, dtype)
    inputs = tuple(F.normalize(z).to(dtype) for z in two_views((30, 12)))

    def formula(q: Tensor, k: Tensor) -> Tensor:
        return plain(q, k, None if queue is None else queue.to(q.dtype), 0.2)

    check_loss(lambda q, k: co2(q, k, queue, 0.2), formula, inputs)


@pytest.mark.parametrize("tau", [0.5, 0.02])
def test_a_temperature_that_learns(tau: float) -> None:
    inputs = (*two_views((25, 8), torch.float32), torch.tensor(tau))
    kernel, single = (
        value_and_gradients(lambda q, k, t: co2(q, k, None, t), *inputs),
        roundings(value_and_gradients, lambda q, k, t: plain(q, k, None, t), *inputs),
    )
    truth = value_and_gradients(lambda q, k, t: plain(q, k, None, t), *(t.double() for t in inputs))
    for name, k, r, t in zip(("loss", "dq", "dk", "dtau"), kernel, single, truth, strict=True):
        within_budget(name, k, r, t, torch.float32, 1 / tau**2 if name == "dtau" else 0.1 / tau)


def test_keys_that_do_not_learn() -> None:
    q, k = two_views((9, 5))
    for queue in (None, keys(7, 5)):
        same_value_and_gradients(lambda q, n=queue: co2(q, k, n), lambda q, n=queue: plain(q, k, n), q)
        same_value_and_gradients(lambda k, n=queue: co2(q, k, n), lambda k, n=queue: plain(q, k, n), k)


def test_equal_views_agree() -> None:
    q = two_views((9, 5))[0]
    for queue in (None, keys(7, 5)):
        views = [q.clone().requires_grad_() for _ in range(2)]
        loss = co2(*views, queue)
        loss.backward()
        assert loss.abs() < 1e-12 and all(z.grad.abs().max() < 1e-10 for z in views)


def test_no_number_comes_out_of_nan() -> None:
    q, k = two_views((6, 4), torch.float32)
    k[2, 1] = float("nan")
    assert co2(q, k).isnan() and co2(q, k, keys(5, 4, torch.float32)).isnan()


@pytest.mark.usefixtures("block")
def test_derivatives_twice() -> None:
    inputs = [x.requires_grad_() for x in (*two_views((4, 3)), torch.tensor(0.5, dtype=torch.float64))]
    for queue in (None, keys(5, 3)):
        assert torch.autograd.gradgradcheck(lambda q, k, t, n=queue: co2(q, k, n, t), inputs)


def test_a_queue_may_take_in_keys_before_the_backward() -> None:
    q, k = two_views((4, 3))
    queue, leaf = keys(5, 3), q.clone().requires_grad_()
    true = torch.autograd.grad(plain(leaf, k, queue.clone()), leaf)[0]
    loss = co2(leaf, k, queue)
    queue.zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, leaf, retain_graph=True)[0], true)
    with pytest.raises(RuntimeError, match="overwritten after the loss was computed: create_graph=True"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_compile_without_graph_breaks() -> None:
    inputs = two_views((20, 6), torch.float32)
    for queue in (None, keys(9, 6, torch.float32)):
        step = torch.compile(lambda q, k, n=queue: co2(q, k, n, 0.2), fullgraph=True, backend="aot_eager")
        same_value_and_gradients(step, lambda q, k, n=queue: co2(q, k, n, 0.2), *inputs)


def test_autocast() -> None:
    q, k = two_views((20, 6), torch.float32)
    true = co2(q, k, temperature=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = co2(q.bfloat16(), k, temperature=0.2)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, true, rtol=5e-2, atol=1e-2)


def test_the_module_is_the_function_and_keeps_its_bank() -> None:
    q, k = two_views((5, 6))
    assert torch.equal(CO2Regularizer(3.0, 0.2)(q, k), 3 * co2(q, k, None, 0.2))
    assert not CO2Regularizer().state_dict() and CO2Regularizer(memory_bank_size=(0, 6)).memory_bank is None
    regularizer = CO2Regularizer(memory_bank_size=(8, 6)).double()
    before = regularizer.memory_bank.queue.clone()
    regularizer(q, k.requires_grad_())
    assert torch.equal(regularizer.memory_bank.queue, before)  # an evaluation
    regularizer(q.requires_grad_(), k)
    torch.testing.assert_close(regularizer.memory_bank.queue[:5], F.normalize(k))
    other = CO2Regularizer(memory_bank_size=(8, 6)).double()
    other.load_state_dict(copy.deepcopy(regularizer.state_dict()))
    assert torch.equal(other(q, k), regularizer(q, k))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((torch.ones(4, 3), torch.ones(4, 2)), ValueError, r"q and k .*same shape"),
        ((torch.ones(4, 3), torch.ones(4, 3), torch.ones(5, 2)), ValueError, r"queue and q .*same width, got 2 and 3"),
        ((torch.ones(4, 3), torch.ones(4, 3), None, 0.0), ValueError, r"temperature .*not zero"),
    ],
)
def test_wrong_input(given: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        co2(*given)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": "1"}, TypeError, "alpha must be a number, got '1'"),
        ({"t_consistency": 0}, ValueError, "temperature .*not zero"),
        ({"memory_bank_size": 8}, ValueError, "memory_bank_size"),
    ],
)
def test_wrong_options(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CO2Regularizer(**options)
