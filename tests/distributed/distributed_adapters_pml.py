"""Cases of test_distributed.py: pytorch-metric-learning's DistributedLossWrapper, with sslfast in its losses or not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import sslfast
from benchmarks import Unavailable, peers
from distributed_common import case
from sslfast.adapters import _serve

ROWS, WIDTH = 12, 6


def _wrapper(kind: str, efficient: bool) -> Any:
    peers._import_torchvision()  # Unavailable skips the case
    try:
        from pytorch_metric_learning import losses
        from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
    except ImportError as error:
        raise Unavailable(f"pytorch-metric-learning is not importable: {error}") from error
    return DistributedLossWrapper(getattr(losses, kind)(), efficient=efficient)


def _inputs(rank: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Embeddings and references, and the labels of each: other ones on every rank."""
    generator = torch.Generator().manual_seed(rank)
    z = torch.randn(2, ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return list(z.unbind()), list(torch.randint(4, (2, ROWS), generator=generator).unbind())


def _value_and_gradients(call: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    loss = call(*leaves)
    return [loss.detach(), *torch.autograd.grad(1.7 * loss, leaves)]


@case
def pytorch_metric_learning_with_sslfast_in_it(rank: int, world: int) -> None:
    """Each rank's value and gradients are the package's own; of ``efficient=True`` because its pairs are left to it."""
    if world != 2:
        return  # importing the package takes longer than the comparison
    for kind in ("NTXentLoss", "SupConLoss"):
        for efficient in (False, True):
            wrapper = _wrapper(kind, efficient)
            for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
                (z, ref), (y, ref_y) = _inputs(rank, dtype)
                calls: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
                    "batch": (lambda z, w=wrapper, y=y: w(z, y), [z]),
                    "references": (lambda z, r, w=wrapper, y=y, s=ref_y: w(z, y, None, r, s), [z, ref]),
                }
                for name, (call, inputs) in calls.items():
                    own = _value_and_gradients(call, inputs)
                    with sslfast.patch("pytorch_metric_learning"), warnings.catch_warnings(record=True) as told:
                        warnings.simplefilter("always")
                        _serve._told.clear()
                        fast = _value_and_gradients(call, inputs)
                    left = [str(w.message) for w in told if "sslfast does not serve" in str(w.message)]
                    assert len(left) == efficient and all("an indices_tuple" in m for m in left), left
                    for place, (mine, theirs) in enumerate(zip(fast, own, strict=True)):
                        what = f"{kind}, efficient={efficient}, {name}, {dtype}, {place}"
                        torch.testing.assert_close(
                            mine, theirs, rtol=tolerance, atol=tolerance, msg=lambda m, what=what: f"{what}: {m}"
                        )
