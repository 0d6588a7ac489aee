"""Kept patches from bytes, normalised, in the order of a projection's weight: bound by memory traffic.

With K = 49 patches of 16 × 16 pixels the result is 9.2 MiB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sslfast.augment import IMAGENET_MEAN, IMAGENET_STD
from sslfast.masking import gather_patches

from .augmentation import photographs
from .harness import CALL, Case
from .masking import Benchmark, Function, Problem, pixels, shuffle


def _problem(case: Case) -> Problem:
    images = photographs(case.shape["B"], case.shape["side"]).to(case.device)
    mean, std = (torch.tensor(values, device=case.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return Problem((), {"images": images, "ids_keep": shuffle(case)[0], "mean": mean, "std": std})


def _published(case: Case) -> Function:
    p, side = case.shape["patch"], case.shape["side"]

    def function(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """ToTensor and Normalize, then all patches, then those that are kept."""
        mean, std, ids = given["mean"], given["std"], given["ids_keep"]
        x = (given["images"].to(mean.dtype) / 255 - mean) / std
        h = w = side // p
        x = x.reshape(-1, 3, h, p, w, p).permute(0, 2, 4, 1, 3, 5).reshape(len(x), h * w, 3 * p * p)
        x = torch.gather(x, dim=1, index=ids.unsqueeze(-1).repeat(1, 1, x.shape[2]))
        return (x if x.dtype == torch.float64 else x.to(case.torch_dtype),)

    return function


def _fused(case: Case) -> Function:
    def function(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        patches = gather_patches(
            given["images"],
            given["ids_keep"],
            patch_size=case.shape["patch"],
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            dtype=case.torch_dtype,
        )
        return (patches,)

    return function


def _cost(case: Case) -> tuple[float, float]:
    """Each kept byte read and its value written."""
    return 0.0, float(case.shape["B"] * case.shape["K"] * pixels(case) * (1 + case.torch_dtype.itemsize))


BENCHMARK = Benchmark(
    op="gather_patches",
    own="eager",
    sweep=[{"B": 64, "side": 224, "patch": 16, "K": 49}],
    problem=_problem,
    published=_published,
    fused=_fused,
    whole_cost=_cost,
    tiny={"B": 2, "side": 48, "patch": 16, "K": 4},
    mode=CALL,
)
PROVIDERS, BASELINES, TINY = BENCHMARK.providers, BENCHMARK.baselines, BENCHMARK.tiny
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip
