"""lightly's relatives of NT-Xent with sslfast inside: MACL, DetCon and CO2."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import sslfast
from adapter_common import left_to_package, peer, same_as_package, served_runs_agree
from lightly_common import pair

DTYPES = [torch.float32, torch.float64]

pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # lightly's CO2Regularizer


@pytest.fixture(scope="module")
def loss():
    return peer("lightly.loss")


@pytest.fixture(scope="module")
def regularizer(loss):
    return peer("lightly.loss.regularizer").CO2Regularizer


def same(call, *inputs: Tensor, **options) -> None:
    same_as_package("lightly", call, *inputs, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [(), (0.3, 1.0, 0.2)], ids=str)
@pytest.mark.parametrize("shape", [(64, 32), (31, 17), (2, 5)], ids=str)
def test_macl(loss, shape, options, dtype):
    same(lambda a, b: loss.MACLLoss(*options)(a, b), *pair(shape, dtype), floor=50)


def test_macl_that_is_left_to_lightly(loss):
    a, b = pair((6, 4))
    criterion = loss.MACLLoss()
    criterion.eps = 1e-3
    left_to_package("lightly", criterion, a, b, reason="another eps")
    left_to_package("lightly", loss.MACLLoss(), *pair((1, 4)), reason="one pair, which has no negative")
    with sslfast.patch("lightly"), pytest.raises(ValueError, match=r"Alpha must be in the range \[0, 1\]"):
        loss.MACLLoss(alpha=2)


def regions(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return list(torch.randn(count, 6, 4, 8, dtype=torch.float64).to(dtype))


# One, two and four regions of a mask, of which lightly's float32 weights are exact; none in the other view.
MASKS = (
    torch.tensor([[0, 0, 1, 2], [5, 5, 5, 5], [0, 1, 2, 3]] * 2),
    torch.tensor([[1, 0, 1, 0], [5, 5, 5, 5], [4, 5, 6, 7]] * 2),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_det_con(loss, dtype):
    same(lambda a, b: loss.DetConSLoss(0.2)(a, b, *MASKS), *regions(2, dtype), floor=10)
    same(lambda *z: loss.DetConBLoss(0.2)(*z, *MASKS), *regions(4, dtype), floor=10)
    fixed = regions(2, dtype)
    targets = lambda a: [x.to(a.dtype) for x in fixed]  # noqa: E731
    same(lambda a, b: loss.DetConBLoss()(a, b, *targets(a), *(m.int() for m in MASKS)), *regions(2, dtype), floor=10)


def test_det_con_that_is_left_to_lightly(loss):
    z = regions(2)
    for masks, reason in (
        ([mask.float() for mask in MASKS], "a mask that is not"),
        ([mask[:1].expand(6, 4) + 0.5 for mask in MASKS], "a mask that is not"),
    ):
        left_to_package("lightly", lambda a, b, m=masks: loss.DetConSLoss()(a, b, *m), *z, reason=reason)


def test_the_module_inside_det_con_s(loss):
    """It is called where it is more than its forward: a hook, a subclass."""
    z, hooked, seen = regions(2), loss.DetConSLoss(), []
    hooked.detconbloss.register_forward_hook(lambda *call: seen.append(call))
    same(lambda a, b: hooked(a, b, *MASKS), *z, floor=10)
    assert len(seen) > 2

    class Twice(loss.DetConBLoss):
        def forward(self, *args):
            return 2 * super().forward(*args)

    doubled = loss.DetConSLoss()
    doubled.detconbloss = Twice()
    same(lambda a, b: doubled(a, b, *MASKS), *z, floor=20)
    same(lambda *z: Twice()(*z, *MASKS), *regions(4), floor=20)


def test_errors_of_det_con_are_lightlys(loss):
    with sslfast.patch("lightly"):
        with pytest.raises(ValueError, match="Illegal temperature"):
            loss.DetConSLoss(0.0)
        with pytest.raises(ValueError, match="not enough values to unpack"):
            loss.DetConSLoss()(*pair((4, 3)), *MASKS)
        with pytest.raises(RuntimeError):
            loss.DetConSLoss()(*regions(2), MASKS[0][:3], MASKS[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, (16, 6)], ids=str)
def test_co2(regularizer, size, dtype):
    """A value without gradient, as lightly's; the bank is lightly's, bit by bit."""
    torch.manual_seed(5)
    criterion = regularizer(2.0, 0.2, size).to(dtype)
    steps, banks = [pair((rows, 6), dtype) for rows in (5, 5, 7, 1, 20)], []

    def run() -> list[Tensor]:
        mine = copy.deepcopy(criterion)
        found = [mine(a.requires_grad_(), b) for a, b in steps]
        assert not any(x.requires_grad for x in found) and all(x.dtype == dtype for x in found)
        banks.append(mine.memory_bank.bank)
        return found

    served_runs_agree("lightly", run, rtol=1e-5 if dtype == torch.float32 else 1e-10, atol=1e-6)
    assert torch.equal(*banks)


def test_co2_that_is_left_to_lightly(regularizer):
    def value(criterion: nn.Module, reason: str) -> None:
        with sslfast.patch("lightly"), pytest.warns(UserWarning, match=reason):
            fast = criterion(*views)
        assert torch.equal(fast, criterion(*views))

    views, smooth = pair((5, 6)), regularizer()
    smooth.kl_div = nn.KLDivLoss(reduction="sum", log_target=True)
    value(smooth, "kl_div is not the plain one")

    class Labels(regularizer):
        def _get_pseudo_labels(self, *args):
            return super()._get_pseudo_labels(*args)

    value(Labels(), "Labels has a _get_pseudo_labels of its own")
