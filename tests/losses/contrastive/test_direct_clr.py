"""DirectCLR against lightly's and against NT-Xent of the leading features, and wrong input."""

from __future__ import annotations

import pytest
import torch

from helpers import same_value_and_gradients, two_views
from lightly_common import lightly_loss
from sslfast.losses.contrastive.direct_clr import DirectCLRLoss, direct_clr
from sslfast.losses.contrastive.nt_xent import NTXentLoss, nt_xent


@pytest.mark.parametrize("loss_dim", [1, 5, 30, 99])
def test_equals_lightly(loss_dim: int) -> None:
    theirs = lightly_loss("directclr_loss").DirectCLRLoss(loss_dim, 0.2)
    same_value_and_gradients(DirectCLRLoss(loss_dim, 0.2), theirs, *two_views((21, 30), torch.float64))


def test_maps_are_flattened() -> None:
    z0, z1 = two_views((9, 24), torch.float64)
    expected = nt_xent(z0[:, :10], z1[:, :10], 0.2)
    assert torch.equal(direct_clr(z0.view(9, 6, 2, 2), z1.view(9, 6, 2, 2), 0.2, loss_dim=10), expected)


def test_the_bank_holds_the_features_that_count() -> None:
    ours, theirs = DirectCLRLoss(4, 0.2, (16, 4)).double(), NTXentLoss(0.2, (16, 4)).double()
    for _ in range(3):
        z0, z1 = two_views((7, 9), torch.float64)
        z0.requires_grad_()
        assert torch.equal(ours(z0, z1), theirs(z0[:, :4], z1[:, :4]))
    other = DirectCLRLoss(4, 0.2, (16, 4)).double()
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other(z0, z1), ours(z0, z1)) and ours.memory_bank.pointer == (4 * 7) % 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_features_that_do_not_count_have_no_gradient(dtype: torch.dtype) -> None:
    z0, z1 = (z.requires_grad_() for z in two_views((12, 9), dtype))
    loss, found = DirectCLRLoss(3, diagnostics=True)(z0, z1)
    loss.backward()
    assert found.accuracy <= 1 and z0.grad[:, :3].any() and not z0.grad[:, 3:].any() and not z1.grad[:, 3:].any()
    if dtype == torch.float32:  # in 16 bits diagnostics round the normalised rows, which the loss alone does not
        torch.testing.assert_close(loss, nt_xent(z0[:, :3], z1[:, :3]))


def test_compile_without_graph_breaks() -> None:
    step = torch.compile(lambda a, b: direct_clr(a, b, 0.2, loss_dim=4), fullgraph=True, backend="aot_eager")
    same_value_and_gradients(step, lambda a, b: direct_clr(a, b, 0.2, loss_dim=4), *two_views((9, 6), torch.float32))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss_dim": 0}, ValueError, "loss_dim must be a whole number of at least 1, got 0"),
        ({"loss_dim": 2.5}, ValueError, r"loss_dim must be a whole number of at least 1, got 2\.5"),
        ({"temperature": 0.0}, ValueError, "temperature .*not zero"),
    ],
)
def test_wrong_options(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        direct_clr(torch.ones(4, 3), torch.ones(4, 3), **options)
    with pytest.raises(error, match=message):
        DirectCLRLoss(**options)


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match=r"z0 must be two-dimensional .*\(4,\)"):
        direct_clr(torch.ones(4), torch.ones(4))
    with pytest.raises(ValueError, match=r"out0 and out1 must have the same shape"):
        DirectCLRLoss(2, memory_bank_size=(5, 2))(torch.ones(4, 3), torch.ones(3, 3))
    with pytest.raises(TypeError, match=r"z1 must be float32"):
        direct_clr(torch.ones(4, 3), torch.ones(4, 3).long())
