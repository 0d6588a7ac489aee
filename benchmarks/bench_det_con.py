"""DetCon-S, forward and backward, temperature 0.1: lightly's class, the formula, regions against themselves."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast

from . import peers
from .contrastive import Benchmark, Loss, generator, views
from .harness import Case

TEMPERATURE = 0.1
REGIONS = 16  # of an image, where the case does not say
MASKS = 8  # that they are drawn from


def regions(case: Case) -> tuple[Tensor, Tensor]:
    """Two unit-norm views [N, m, D] that learn, of m regions of each of N images."""
    m = case.shape.get("m", REGIONS)
    flat = views(Case(case.op, {**case.shape, "N": m * case.shape["N"]}, case.dtype, case.mode, case.device))
    z0, z1 = (z.detach().view(-1, m, case.shape["D"]).requires_grad_() for z in flat)
    return z0, z1


def masks(case: Case) -> tuple[Tensor, Tensor]:
    """Of the regions of both views, [N, m], drawn with replacement: some have several regions, some none in a view."""
    shape = (2, case.shape["N"], case.shape.get("m", REGIONS))
    mask0, mask1 = torch.randint(MASKS, shape, generator=generator()).to(case.device)
    return mask0, mask1


def _plain(case: Case) -> Loss:
    mask0, mask1 = masks(case)
    images, m = mask0.shape
    row = torch.arange(2 * images * m, device=case.device)
    view, image, mask = row // (images * m), row // m % images, torch.stack([mask0, mask1]).flatten()
    same = (image[:, None] == image) & (mask[:, None] == mask)  # [2Nm, 2Nm]
    beside, across = same & (view[:, None] == view), same & (view[:, None] != view)
    weights = across.to(case.torch_dtype) / across.sum(1, keepdim=True).clamp(min=1)
    factor = 2 * across.any(1) / beside.sum(1)  # of the mean over both views' rows

    def det_con(z0: Tensor, z1: Tensor) -> Tensor:
        z = F.normalize(torch.stack([z0, z1]).flatten(0, 2), dim=1)
        s = z @ z.T / TEMPERATURE
        return (factor * (s.masked_fill(beside, float("-inf")).logsumexp(1) - (weights * s).sum(1))).mean()

    return det_con


def _with_masks(loss: Loss, case: Case) -> Loss:
    chosen = masks(case)
    return lambda z0, z1: loss(z0, z1, *chosen)


def _rows(shape: dict[str, int]) -> int:
    return 2 * shape["N"] * shape.get("m", REGIONS)


BENCHMARK = Benchmark(
    op="det_con",
    sweep=[{"N": n, "m": REGIONS, "D": 256} for n in (32, 128, 256)],
    gpu_sweep=[{"N": n, "m": REGIONS, "D": 256} for n in (128, 1024)],
    inputs=regions,
    plain=_plain,
    fused=lambda case: _with_masks(lambda *given: sslfast.det_con_s(*given, TEMPERATURE), case),
    pairs=lambda shape: (_rows(shape), _rows(shape)),
    share=2.0,
    forward=0.5,
    tiny={"N": 16, "m": 4, "D": 32},
    peers={
        "lightly": lambda case: _with_masks(
            peers.lightly_loss("detcon_loss", "DetConSLoss", temperature=TEMPERATURE, gather_distributed=False), case
        )
    },
)
PROVIDERS, TINY = BENCHMARK.providers, BENCHMARK.tiny
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip
