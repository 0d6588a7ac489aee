"""A step of the losses over many rows makes no tensor of all rows against all: plain PyTorch in their place would."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import sslfast
from helpers import Sizes

N, K, D = 300, 700, 8
MASKS = torch.arange(4).repeat(N // 4, 1)


def regions(z: Tensor) -> Tensor:
    return z[: N // 4 * 4].view(N // 4, 4, D)


# Of features z [N, D] that learn, fixed ones t [N, D] and prototypes w [K, D] that learn.
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "det_con_s": lambda z, t, w: sslfast.det_con_s(regions(z), regions(t), MASKS, MASKS),
    "det_con_b": lambda z, t, w: sslfast.det_con_b(*(regions(x) for x in (z, z, t, t)), MASKS, MASKS),
    "direct_clr": lambda z, t, w: sslfast.direct_clr(z, t, loss_dim=4),
    "macl": lambda z, t, w: sslfast.macl(z, t),
    "re_ssl": lambda z, t, w: sslfast.re_ssl(z, t, w.detach()),
    "deep_cluster_v2": lambda z, t, w: sslfast.deep_cluster_v2(z, torch.arange(N), prototypes=w),
    "prototype_cross_entropy": lambda z, t, w: sslfast.prototype_cross_entropy(z, t, w),
    "PrototypeLoss": lambda z, t, w: sslfast.PrototypeLoss(K)(z.view(2, -1, D), t.view(2, -1, D), w),
    "koleo": lambda z, t, w: sslfast.koleo(z),
}
# Without a gradient.
OTHERS: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "k_means": lambda z, t, w: sslfast.k_means(t, t[:100]),
    "nearest_neighbours, Euclidean": lambda z, t, w: sslfast.nearest_neighbours(t, w.detach(), metric="euclidean"),
    "duplicate_prototypes": lambda z, t, w: sslfast.duplicate_prototypes(w),
}


def stepped(loss: Callable[[Tensor, Tensor, Tensor], Tensor], *given: Tensor) -> None:
    loss(*given).backward()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", [*LOSSES, *OTHERS])
def test_no_matrix_of_pairs(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's is seen, so that this test sees something. Without the tiles that a CPU keeps for the backward,
    42 MiB at most, which would be all of these."""
    for op, constant in (("similarity_lse", "TILE_CACHE"), ("nt_xent", "MEMORY"), ("nt_xent", "LEAST_CACHE")):
        monkeypatch.setattr(sys.modules[f"sslfast.ops.{op}"], constant, 0)
    call = partial(stepped, LOSSES[name]) if name in LOSSES else OTHERS[name]
    z, t, w = torch.randn(N, D, requires_grad=True), torch.randn(N, D), torch.randn(K, D, requires_grad=True)
    with sslfast.use_backend(backend), Sizes() as sizes:
        call(z, t, w)
    most = 3 * K * D  # a few vectors of each row and prototype
    assert (sizes.largest <= most) == (backend == "cpu"), sizes.largest
