"""NT-Xent with a memory bank, as lightly's; through the shared primitive; and its diagnostics."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from benchmarks import Unavailable, peers
from sslfast.losses.contrastive.nt_xent import NTXentLoss


def lightly_loss(temperature: float, **options):
    try:
        return type(peers.nt_xent("lightly", temperature))(temperature=temperature, **options)
    except Unavailable as reason:
        pytest.skip(f"lightly 1.6.0 cannot be imported: {reason}")


def two_views(n: int, d: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    z0 = torch.randn(n, d, dtype=dtype)
    return z0.requires_grad_(), (z0.detach() + torch.randn(n, d, dtype=dtype)).requires_grad_()


@pytest.mark.parametrize("temperature", [0.5, 0.05, -0.5])
def test_bank_equals_lightly(temperature: float) -> None:
    """Value, gradients of both views and the bank itself, step after step up to the wrap, where lightly drops keys."""
    theirs = lightly_loss(temperature, memory_bank_size=(29, 12)).double()
    ours = NTXentLoss(temperature, memory_bank_size=(29, 12)).double()
    ours.memory_bank.queue.copy_(theirs.memory_bank.bank)
    for step in range(4):
        z0, z1 = two_views(7, 12)
        expected, loss = theirs(z0, z1), ours(z0, z1)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        for a, b in zip(torch.autograd.grad(loss, (z0, z1)), torch.autograd.grad(expected, (z0, z1)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(ours.memory_bank.queue, theirs.memory_bank.bank)
        assert ours.memory_bank.pointer.item() == 7 * (step + 1)
    newest = F.normalize(two_views(7, 12)[1].detach())
    ours(two_views(7, 12)[0], newest)  # keys 28 to 34 of a bank of 29
    assert ours.memory_bank.pointer.item() == 6
    torch.testing.assert_close(ours.memory_bank.queue.roll(-6, 0)[-7:], newest)


def test_bank_is_updated_only_for_training() -> None:
    loss_fn = NTXentLoss(memory_bank_size=(20, 6)).double()
    before = loss_fn.memory_bank.queue.clone()
    z0, z1 = two_views(5, 6)
    loss_fn(z0.detach(), z1)
    with torch.no_grad():
        loss_fn(z0, z1)
    assert torch.equal(loss_fn.memory_bank.queue, before)
    loss_fn(z0, z1.detach())
    assert not torch.equal(loss_fn.memory_bank.queue, before)


def test_state_dict_carries_the_bank() -> None:
    loss_fn = NTXentLoss(memory_bank_size=(20, 6))
    loss_fn(*two_views(5, 6, torch.float32))
    other = NTXentLoss(memory_bank_size=(20, 6))
    other.load_state_dict(copy.deepcopy(loss_fn.state_dict()))
    z0, z1 = two_views(5, 6, torch.float32)
    assert torch.equal(loss_fn(z0, z1), other(z0, z1))
    assert not NTXentLoss().state_dict() and NTXentLoss(memory_bank_size=(0, 6)).memory_bank is None


@pytest.mark.parametrize("size", [8, -1, (8,), (8, -2), (8, 4, 2)], ids=str)
def test_wrong_bank_sizes_are_value_errors_as_in_lightly(size) -> None:
    with pytest.raises(ValueError, match="memory_bank_size"):
        NTXentLoss(memory_bank_size=size)
    theirs = type(lightly_loss(0.5))
    with pytest.raises(ValueError):
        theirs(memory_bank_size=size)


def test_constructor_errors_as_in_lightly(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="temperature must be finite and not zero"):
        NTXentLoss(temperature=1e-9)
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch.distributed is not available"):
        NTXentLoss(gather_distributed=True)


def test_wrong_width_for_the_bank() -> None:
    with pytest.raises(ValueError, match=r"queue and out0 must have the same width, got 6 and 5"):
        NTXentLoss(memory_bank_size=(20, 6))(torch.ones(3, 5), torch.ones(3, 5))


@pytest.mark.parametrize("n", [1, 2, 37])
def test_diagnostics_and_the_same_loss(n: int) -> None:
    """With diagnostics the loss comes from the shared primitive: same value and gradients as the operator's."""
    z0, z1 = two_views(n, 12)
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    expected = sslfast.nt_xent(z0, z1, tau)
    module = NTXentLoss(diagnostics=True)
    module.temperature = tau
    loss, found = module(z0, z1)
    torch.testing.assert_close(loss, expected)
    leaves = (z0, z1, tau)
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)
    if n == 1:
        return  # no negatives
    z = F.normalize(torch.cat([z0, z1])).detach()
    s, rows = z @ z.T, torch.arange(2 * n)
    positive = s[rows, (rows + n) % (2 * n)]
    s[rows, rows] = -torch.inf
    pairs = s[s.isfinite()]
    torch.testing.assert_close(found.positive_similarity, positive.mean())
    torch.testing.assert_close(found.uniformity_at_temperature, (-2.5 * (2 - 2 * pairs)).exp().mean().log())
    s[rows, (rows + n) % (2 * n)] = -torch.inf
    torch.testing.assert_close(found.hardest_negative_similarity, s.amax(1).mean())
    torch.testing.assert_close(found.accuracy, (positive > s.amax(1)).double().mean())
    assert math.isclose(found.alignment.item(), 2 - 2 * positive.mean().item(), rel_tol=1e-9)
