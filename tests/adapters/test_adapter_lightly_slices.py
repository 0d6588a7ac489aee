"""lightly's SIGReg with sslfast inside, by itself and in LeJEPA and LeWM: the same directions, values and gradients."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import sslfast
from adapter_common import left_to_package, same_as_package, values_and_gradients
from helpers import DTYPES
from lightly_common import lightly_loss


def fixed(sigreg: nn.Module) -> nn.Module:
    """With directions that do not depend on the dtype, as drawn numbers do."""

    def directions(device: torch.device, dtype: torch.dtype, features: int) -> Tensor:
        random = torch.Generator().manual_seed(0)
        a = torch.randn(features, sigreg.num_vectors, generator=random, dtype=torch.float64)
        return a.div_(a.norm(dim=0)).to(device, dtype)

    sigreg._generate_unit_vectors = directions
    return sigreg


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", [(40, 6), (3, 17, 5), (2, 2, 9, 4), (1, 3)], ids=str)
def test_sigreg(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    make = lightly_loss("lejepa_loss").SIGReg
    for options in ({}, {"knots": 10, "t_max": 4.0}, {"knots": 2}):
        same_as_package(
            "lightly", lambda z, o=options: fixed(make(num_vectors=33, **o))(z), torch.randn(shape, dtype=dtype)
        )


def test_the_directions_are_lightlys() -> None:
    criterion, z = lightly_loss("lejepa_loss").SIGReg(num_vectors=20), torch.randn(30, 5)
    found = []
    for patched in (False, True):
        torch.manual_seed(3)
        with sslfast.patch("lightly") if patched else warnings.catch_warnings():
            found.append([criterion(z), criterion(z)])
    torch.testing.assert_close(found[1], found[0])
    assert found[0][0] != found[0][1]


def test_inside_of_other_losses() -> None:
    le_jepa, le_wm = lightly_loss("lejepa_loss").LeJEPALoss(sigreg_num_vectors=20), lightly_loss("lewm_loss").LeWMLoss()
    fixed(le_jepa.sigreg), fixed(le_wm.sigreg)
    inputs = torch.randn(2, 20, 5), torch.randn(3, 20, 5), torch.randn(20, 4, 5)

    def call(a: Tensor, b: Tensor, frames: Tensor) -> list[Tensor]:
        world = le_wm(predicted=frames[:, 1:] + 1, target=frames[:, :-1], embeddings=frames)
        return [le_jepa(local_proj=b, global_proj=a), world]

    own = values_and_gradients(call, inputs)
    with sslfast.patch("lightly"):
        fast = values_and_gradients(call, inputs)
    for a, b in zip(fast, own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    """lightly's frequencies are float32, and so is its loss, unless the module is cast too."""
    for cast in (False, True):
        criterion = fixed(lightly_loss("lejepa_loss").SIGReg(num_vectors=20))
        criterion = criterion.to(dtype) if cast else criterion
        z = torch.randn(50, 6, dtype=dtype)
        own = criterion(z)
        with sslfast.patch("lightly"):
            fast = criterion(z)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                inside = criterion(z)
        assert fast.dtype == own.dtype and inside.dtype == torch.float32
        torch.testing.assert_close(fast, own, rtol=0.05, atol=0.05)


def test_compiled() -> None:
    criterion, z = lightly_loss("lejepa_loss").SIGReg(num_vectors=20), torch.randn(12, 6)
    with sslfast.patch("lightly"):
        torch._dynamo.reset()
        found = []
        for call in (torch.compile(criterion, backend="eager", fullgraph=True), criterion):
            torch.manual_seed(1)
            found.append(call(z))
    torch.testing.assert_close(*found)


def test_what_is_left_to_lightly() -> None:
    make = lightly_loss("lejepa_loss").SIGReg
    z = torch.randn(12, 6)

    class Squared(make):
        def _integrate_via_trapezoidal_rule(self, err_per_frequency: Tensor, num_samples: int) -> Tensor:
            return super()._integrate_via_trapezoidal_rule(err_per_frequency.square(), num_samples)

    left_to_package("lightly", fixed(Squared(num_vectors=5)), z, reason="_integrate_via_trapezoidal_rule of its own")
    uneven = fixed(make(num_vectors=5))
    uneven.t = uneven.t.square()
    left_to_package("lightly", uneven, z, reason="not equally spaced")
