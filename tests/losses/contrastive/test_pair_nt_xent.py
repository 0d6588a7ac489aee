"""NT-Xent over labelled pairs and SupCon against keys: against their formulas with every matrix."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from helpers import check_loss, roundings, value_and_gradients, within_budget
from sslfast.losses.contrastive import pair_nt_xent as module
from sslfast.losses.contrastive.pair_nt_xent import pair_nt_xent
from sslfast.losses.contrastive.sup_con_keys import sup_con_keys

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Rows and their classes: pairs, few large classes, more classes than rows, one class, ragged, tiny.
BATCHES = {
    "pairs": torch.arange(32).repeat(2),
    "one or two": torch.arange(23).repeat(2)[:37],
    "large classes": torch.arange(71) % 3,
    "one class": torch.zeros(9, dtype=torch.int64),
    "no pair": torch.arange(7),
    "two rows": torch.tensor([5, 5]),
    "one row": torch.tensor([-3]),
    "huge labels": torch.tensor([2**62, -(2**62), 2**62, 0, 0, 0, -(2**62), 7]),
}


def check_against_keys(loss, formula, z: Tensor, keys: Tensor, temperature: Tensor) -> None:
    """Value and gradients in anchors, keys and temperature."""
    found = value_and_gradients(loss, z, keys, temperature)
    plain = roundings(value_and_gradients, formula, z, keys, temperature)
    truth = value_and_gradients(formula, z.double(), keys.double(), temperature.double())
    for name, one, other, true in zip(("loss", "dz", "dkeys", "dτ"), found, plain, truth, strict=True):
        within_budget(name, one, other, true, z.dtype, 1.0)


def masks(labels: Tensor, key_labels: Tensor | None, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which columns are positives, and which are a row itself; both [M, N]."""
    columns = labels if key_labels is None else key_labels
    same = labels[:, None] == columns
    if key_labels is None:
        own = torch.arange(len(labels))
    itself = torch.zeros_like(same) if own is None else own[:, None] == torch.arange(len(columns))
    return same & ~itself, itself


def pair_formula(z, labels, keys=None, key_labels=None, own=None, temperature=0.07, smallest=0.0):
    z = F.normalize(z)
    s = z @ (z if keys is None else F.normalize(keys)).T / temperature
    positive, _ = masks(labels, key_labels, own)
    negative = labels[:, None] != (labels if key_labels is None else key_labels)
    rows, columns = positive.nonzero(as_tuple=True)
    each = s[rows].masked_fill(~negative[rows], -torch.inf)
    pair = s[rows, columns]
    log_p = pair - torch.cat([each, pair[:, None]], 1).logsumexp(1)
    if smallest:
        log_p = torch.logaddexp(log_p, log_p.new_full((), math.log(smallest))).clamp(max=0)
    return -log_p.sum() / max(len(rows), 1)


def keys_formula(z, labels, keys=None, key_labels=None, own=None, temperature=0.1, reduction="mean_nonzero"):
    z = F.normalize(z)
    s = z @ (z if keys is None else F.normalize(keys)).T / temperature
    positive, itself = masks(labels, key_labels, own)
    log_p = s - s.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    count = positive.sum(1)
    each = -log_p.masked_fill(~positive, 0.0).sum(1) / count.clamp(min=1)
    return each.mean() if reduction == "mean" else each.sum() / max(int((each > 0).sum()), 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_pairs_of_a_batch(name, dtype):
    labels = BATCHES[name]
    z = torch.randn(len(labels), 13, dtype=torch.float64).to(dtype)
    check_loss(lambda z: pair_nt_xent(z, labels), lambda z: pair_formula(z, labels), (z,), floor=20.0)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("block", [(128, 2**20), (3, 2**20), (128, 64)], ids=str)
def test_pairs_against_keys(dtype, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ROWS", block[0])
    monkeypatch.setattr(module, "BLOCK", block[1])
    labels, key_labels = torch.randint(-4, 4, (29,)), torch.randint(-4, 6, (53,))
    own = torch.where(torch.rand(29) < 0.5, torch.randint(0, 53, (29,)), -1)  # of any class
    z, keys = torch.randn(29, 8, dtype=dtype), torch.randn(53, 8, dtype=dtype)
    tau = torch.tensor(0.2, dtype=dtype)
    check_against_keys(
        lambda z, k, t: pair_nt_xent(z, labels, k, key_labels, own=own, temperature=t),
        lambda z, k, t: pair_formula(z, labels, k, key_labels, own, t),
        z,
        keys,
        tau,
    )


def test_keys_that_do_not_learn_give_the_same_gradient():
    labels, key_labels = torch.randint(0, 3, (20,)), torch.randint(0, 3, (40,))
    z, keys = torch.randn(20, 8, dtype=torch.float64), torch.randn(40, 8, dtype=torch.float64)
    for loss in (pair_nt_xent, sup_con_keys):
        both = value_and_gradients(lambda z, k: loss(z, labels, k, key_labels), z, keys)  # noqa: B023
        frozen = value_and_gradients(lambda z: loss(z, labels, keys, key_labels), z)  # noqa: B023
        for one, other in zip(both[:2], frozen, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("classes", ["pairs", "large classes"])
@pytest.mark.parametrize("smallest", [0.0, 1e-30, 1e-3], ids=str)
def test_the_probability_s_floor(classes, smallest):
    labels = BATCHES[classes]
    z = torch.randn(len(labels), 13, dtype=torch.float64)
    check_loss(
        lambda z: pair_nt_xent(z, labels, temperature=0.01, smallest=smallest),
        lambda z: pair_formula(z, labels, temperature=0.01, smallest=smallest),
        (z,),
        floor=100.0,
    )
    assert pair_nt_xent(z, torch.zeros_like(labels), smallest=smallest) == 0  # without negatives
    if smallest:
        assert pair_nt_xent(z, labels, temperature=1e-4, smallest=smallest) <= -math.log(smallest)


def test_pairs_that_are_all_right_or_all_wrong_stay_finite():
    z = torch.eye(4)[[0, 0, 0, 1, 1, 1]].requires_grad_()
    right, wrong = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 0, 1, 2])
    for labels, value in ((right, 0.0), (wrong, 1 / 0.001)):
        loss = pair_nt_xent(z, labels, temperature=0.001)
        (grad,) = torch.autograd.grad(loss, z)
        assert math.isclose(loss.item(), value, rel_tol=0.01, abs_tol=1e-6) and grad.isfinite().all()


def test_blocks_of_pairs_do_not_grow_with_the_pairs():
    """2·10⁶ pairs with 2·10⁶ negatives of each: no tensor of the backward is larger than the block or the rows."""
    labels = (torch.arange(2048) % 2)[torch.randperm(2048)]
    z = torch.randn(2048, 4, requires_grad=True)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    with Sizes():
        pair_nt_xent(z, labels).backward()
    assert largest <= module.BLOCK


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "mean_nonzero"])
@pytest.mark.parametrize("name", [n for n in BATCHES if n not in ("two rows", "one row")])
def test_sup_con_of_a_batch(name, reduction, dtype):
    labels = BATCHES[name]
    z = torch.randn(len(labels), 13, dtype=torch.float64).to(dtype)
    check_loss(
        lambda z: sup_con_keys(z, labels, reduction=reduction),
        lambda z: keys_formula(z, labels, reduction=reduction),
        (z,),
        floor=20.0,
    )


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("with_own", [True, False])
def test_sup_con_against_keys(dtype, with_own):
    labels, key_labels = torch.randint(-4, 4, (29,)), torch.randint(-4, 6, (31,))
    own = torch.where(torch.rand(29) < 0.7, torch.randint(0, 31, (29,)), -1) if with_own else None
    z, keys = torch.randn(29, 8, dtype=dtype), torch.randn(31, 8, dtype=dtype)
    check_against_keys(
        lambda z, k, t: sup_con_keys(z, labels, k, key_labels, own=own, temperature=t),
        lambda z, k, t: keys_formula(z, labels, k, key_labels, own, t),
        z,
        keys,
        torch.tensor(0.2, dtype=dtype),
    )


def test_anchors_that_are_right_to_the_last_bit_leave_the_mean():
    """Four anchors beside their only positive, two away from theirs: the mean is over the two, in float32 too."""
    rows = torch.eye(8)[[0, 0, 1, 1, 2, 3]]
    z = F.normalize(rows + 0.001 * torch.randn(6, 8))
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    found, truth = (value_and_gradients(lambda z: sup_con_keys(z, labels, temperature=0.005), x) for x in (z, z))
    true = keys_formula(z[[4, 5, 0, 1, 2, 3]].double(), torch.tensor([2, 2, 0, 0, 1, 1]), temperature=0.005)
    each = true * int((true > 0).sum())
    assert each > 0 and math.isclose(found[0].item(), truth[0].item())
    alone = z @ z.T / 0.005
    expected = (alone[4, [0, 1, 2, 3, 5]].logsumexp(0) - alone[4, 5] + alone[5, :5].logsumexp(0) - alone[5, 4]) / 2
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", [pair_nt_xent, sup_con_keys])
def test_arguments(loss):
    z, labels = torch.randn(4, 3), torch.arange(4)
    for arguments, options, error, words in [
        ((z, labels.to(torch.complex64)), {}, TypeError, "labels must hold integers"),
        ((z, labels[:3]), {}, ValueError, "labels must have shape"),
        ((z, labels, z), {}, ValueError, "keys need key_labels"),
        ((z, labels), {"own": labels}, ValueError, "belong to keys"),
        ((z, labels, z[:, :2], labels), {}, ValueError, "same width"),
        ((z, labels, z, labels), {"own": labels[:2]}, ValueError, "own must have shape"),
        ((z, labels), {"temperature": 0.0}, ValueError, "temperature"),
    ]:
        with pytest.raises(error, match=words):
            loss(*arguments, **options)
    with pytest.raises(ValueError, match="smallest"):
        pair_nt_xent(z, labels, smallest=-1.0)
    with pytest.raises(ValueError, match="reduction"):
        sup_con_keys(z, labels, reduction="sum")


@pytest.mark.parametrize("classes", [3, 2])
def test_second_derivative(classes):
    z = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(6) % classes
    assert torch.autograd.gradgradcheck(lambda z: pair_nt_xent(z, labels, temperature=0.5), z)


def test_autocast_and_strides():
    labels, wide = torch.arange(40) % 7, torch.randn(40, 32)
    z = wide[:, ::2]
    for loss, formula in ((pair_nt_xent, pair_formula), (sup_con_keys, keys_formula)):
        plain = value_and_gradients(lambda z: loss(z, labels), z)  # noqa: B023
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = value_and_gradients(lambda z: loss(z, labels), z)  # noqa: B023
        assert plain[0].dtype == inside[0].dtype == torch.float32
        truth = value_and_gradients(lambda z: formula(z, labels), z.double())  # noqa: B023
        for i, (a, b, true) in enumerate(zip(plain, inside, truth, strict=True)):
            within_budget(f"result {i}", a, b, true, torch.float32, 1.0)
            within_budget(f"result {i} in autocast", b, a, true, torch.float32, 1.0)


def test_public_names():
    assert sslfast.pair_nt_xent is pair_nt_xent and sslfast.sup_con_keys is sup_con_keys
