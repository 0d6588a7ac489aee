"""lightly with sslfast inside: coding rates, patch kernels, a bank's nearest keys, moving averages."""

from __future__ import annotations

import copy
import importlib
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sslfast
from adapter_common import left_to_package, peer, same_as_package, served_runs_agree
from lightly_common import pair
from sslfast.adapters import _serve

DTYPES = [torch.float32, torch.float64]


@pytest.fixture(scope="module")
def loss():
    return peer("lightly.loss")


@pytest.fixture(scope="module")
def utils(loss):
    return importlib.import_module("lightly.models.utils")


def same(call, *inputs: Tensor, **options) -> None:
    same_as_package("lightly", call, *inputs, **options)


# ---------------------------------------------------------------------------------------------------------- EMP-SSL


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("shape", [(20, 50), (33, 32), (40, 6), (1, 4), (9, 1)], ids=str)
def test_emp_ssl(loss, shape, count, dtype):
    views = F.normalize(torch.randn(count, *shape, dtype=torch.float64), dim=2).to(dtype)
    same(lambda *z: loss.EMPSSLLoss(0.4, 7)(list(z)), *views.unbind(), floor=20 * max(shape))


def test_emp_ssl_that_is_left(loss):
    a, b = pair((6, 4))
    for options, reason in (({"tcr_eps": -0.2}, "eps that is no"), ({"inv_coef": True}, "inv_coef that is no number")):
        call = lambda a, b, options=options: loss.EMPSSLLoss(**options)([a, b])  # noqa: E731
        left_to_package("lightly", call, 0.01 * a, 0.01 * b, reason=reason)
    left_to_package("lightly", lambda a: loss.EMPSSLLoss()([a]), a, reason="no list of two views or more")


# -------------------------------------------------------------------------------------------------------- alignment


@pytest.mark.parametrize("most", [None, 7])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(3, 20, 30), (2, 40, 11), (1, 2, 5)], ids=str)
def test_patch_kernel_alignment(loss, shape, masked, most):
    """float32, which lightly makes of everything."""
    mask = torch.rand(shape[:2]) < 0.3 if masked else None
    if mask is not None:
        mask[-1, :2] = False

    def call(x, y):
        torch.manual_seed(5)
        return [loss.PatchKernelAlignmentLoss(max_tokens=most)(x, y, mask=mask), torch.rand(1)]

    same(call, *pair(shape), floor=10)


def test_patch_kernel_alignment_that_is_left(loss):
    x, y = pair((2, 5, 3))
    criterion = loss.PatchKernelAlignmentLoss()
    few = "no image with two tokens that count"
    left_to_package("lightly", criterion, x[:, :1], y[:, :1], reason=few)
    left_to_package("lightly", lambda x, y: criterion(x, y, torch.ones(2, 5, dtype=torch.bool)), x, y, reason=few)
    with sslfast.patch("lightly"):
        with pytest.raises(ValueError, match=r"must have the same shape but have"):
            criterion(x, y[:, :4])
        with pytest.raises(ValueError, match=r"mask must have dtype torch.bool"):
            criterion(x, y, torch.zeros(2, 5))
    other = copy.deepcopy(criterion)
    other.max_tokens = 1
    left_to_package("lightly", other, x, y, reason="max_tokens that is no whole number")


# ----------------------------------------------------------------------------------------- nearest keys of a bank


@pytest.mark.parametrize("update", [False, True])
def test_nearest_keys(loss, update):
    """The same keys, and a bank that is lightly's bit by bit."""
    module = importlib.import_module("lightly.models.modules").NNMemoryBankModule

    def run() -> list[Tensor]:
        torch.manual_seed(3)
        bank, found = module((60, 9)), []
        for rows in (7, 7, 60, 5, 1):
            found.append(bank(torch.randn(rows, 9), update=update))
        return [*found, bank.bank.clone(), bank.bank_ptr.clone()]

    served_runs_agree("lightly", run, rtol=0, atol=0)


def test_nearest_keys_that_are_left(loss):
    bank = importlib.import_module("lightly.models.modules").NNMemoryBankModule((20, 4))
    with sslfast.patch("lightly"):
        _serve._told.clear()
        with pytest.raises(RuntimeError):
            bank(torch.randn(3, 4, dtype=torch.float64))
        with pytest.raises(RuntimeError):
            bank(torch.randn(3, 5))
        with pytest.raises(AssertionError):
            type(bank)(0)(torch.randn(3, 4))


# --------------------------------------------------------------------------------------------------- moving averages


def models(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    student, average = (nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).to(dtype) for _ in range(2))
    average[1].running_mean += 1  # buffers stay as they are
    student[0].to(memory_format=torch.channels_last)
    return student, average


@pytest.mark.parametrize("momentum", [0.99, 0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_momentum(utils, dtype, momentum):
    def run() -> list[Tensor]:
        student, average = models(dtype)
        for _ in range(3):
            utils.update_momentum(student, average, m=momentum)
        return [*average.state_dict().values(), *student.state_dict().values()]

    served_runs_agree("lightly", run, rtol=1e-6, atol=1e-7)


def test_update_momentum_takes_16_bit_students_and_refuses_nothing_of_lightlys(utils):
    student, average = models()
    before, own = copy.deepcopy(average), copy.deepcopy(average)
    student.bfloat16()
    utils.update_momentum(student, own, 0.9)
    with sslfast.patch("lightly"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="sslfast does not serve")
        utils.update_momentum(student, average, 0.9)
    torch.testing.assert_close(average.state_dict(), own.state_dict())
    assert not torch.equal(before[0].weight, average[0].weight) and average[0].weight.requires_grad


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda student, average: (student.half(), average.half(), 0.9), "averages of torch.float16"),
        (lambda student, average: (student, average, 1.5), "momentum must be between 0 and 1, got 1.5"),
        (lambda student, average: (student, average, torch.tensor(0.9)), "a momentum that is no number"),
        (lambda student, average: (average, average, 0.9), "teacher and student must not share memory"),
    ],
)
def test_update_momentum_that_is_left(utils, change, reason):
    own, fast = (change(*models()) for _ in range(2))
    utils.update_momentum(*own)
    with sslfast.patch("lightly"):
        _serve._told.clear()
        with pytest.warns(UserWarning, match=reason):
            utils.update_momentum(*fast)
    for mine, theirs in zip(fast[1].parameters(), own[1].parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_update_momentum_of_models_that_do_not_fit(utils):
    student, average = models()
    with sslfast.patch("lightly"), pytest.raises(RuntimeError):
        utils.update_momentum(student[0], average, 0.9)
