"""An exponential moving average of a vision transformer's parameters, one update in place: bound by memory traffic.

``lightly`` multiplies all, then adds all, in two passes; ``eager`` is PyTorch's ``_foreach_lerp_``, one pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sslfast.nn import ema_update_
from sslfast.reference import ema_update as by_reference

from .harness import CALL, Case, Work, require_backend
from .peers import lightly_momentum

PROVIDERS = ("eager", "lightly", "sslfast")
BASELINES = ("eager", "lightly")
TINY = {"D": 8, "depth": 2}
MOMENTUM = 0.996


def cases(device: str, quick: bool) -> list[Case]:
    """ViT-S/16 and ViT-B/16 at 224 pixels: 22 and 86 million parameters."""
    shapes = [{"D": 384, "depth": 12}, {"D": 768, "depth": 12}]
    return [Case("ema_update", shape, mode=CALL, device=device) for shape in (shapes[:1] if quick else shapes)]


def shapes_of(case: Case) -> list[tuple[int, ...]]:
    """Of the parameters of a ViT/16 without a head."""
    d = case.shape["D"]
    block = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(1, 1, d), (1, 197, d), (d, 3, 16, 16), (d,), *block * case.shape["depth"], (d,), (d,)]


def _tensors(case: Case, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(case.device, case.torch_dtype) for s in shapes_of(case)]


def _update(provider: str) -> Callable[[list[Tensor], list[Tensor]], None]:
    if provider == "sslfast":
        return lambda teacher, student: ema_update_(teacher, student, MOMENTUM)
    if provider == "eager":
        return lambda teacher, student: torch._foreach_lerp_(teacher, student, 1 - MOMENTUM)
    return lightly_momentum(MOMENTUM)


def _some(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The first thousand numbers of each."""
    return (torch.cat([t.flatten()[:1000] for t in tensors]),)


def setup(case: Case, provider: str) -> Work:
    """The closure of one provider: another update of the same teacher each time."""
    teacher, student = _tensors(case, 0), _tensors(case, 1)
    update = _update(provider)
    if provider == "sslfast":
        require_backend(lambda: update(teacher[:1], student[:1]), "cuda" if case.device == "cuda" else "cpu")

    def run(_: None) -> tuple[Tensor, ...]:
        update(teacher, student)
        return ()

    def proof() -> tuple[Tensor, ...]:
        fresh = _tensors(case, 0)
        update(fresh, student)
        return _some(fresh)

    return Work(lambda: None, run, proof)


def truth(case: Case) -> tuple[Tensor, ...]:
    """One update in float64."""
    teacher, student = ([t.double() for t in _tensors(case, seed)] for seed in (0, 1))
    by_reference(teacher, student, MOMENTUM)
    return _some(teacher)


def cost(case: Case) -> tuple[float, float]:
    """Teacher and student read, the teacher written: 12 bytes a float32 parameter; three operations each."""
    count = sum(torch.Size(s).numel() for s in shapes_of(case))
    return 3.0 * count, 3.0 * count * case.torch_dtype.itemsize


def why_skip(case: Case, provider: str, metric: str) -> str | None:
    """Memory is left out: an update in place has none of its own."""
    return "in place" if metric == "peak_mib" else None
