"""A masked autoencoder's loss of normalised pixels, forward and backward to the prediction of all patches.

The images are float32, as they are under autocast too. With L = 196 patches of 16 × 16 pixels the prediction's gradient
is 36.8 MiB.
"""

from __future__ import annotations

from torch import Tensor

from sslfast.ops.masked_patch_loss import masked_patch_loss

from .harness import Case
from .masking import Benchmark, Function, Problem, leaf, normal, pictures, pixel_loss, pixels, shuffle, tokens


def _problem(case: Case) -> Problem:
    prediction = normal(case, case.shape["B"], tokens(case), pixels(case))
    return Problem((leaf(prediction),), {"images": pictures(case), "mask": shuffle(case)[2]})


def _published(case: Case) -> Function:
    return lambda given, pred: (pixel_loss(given["images"], pred, given["mask"], case.shape["patch"]),)


def _fused(case: Case) -> Function:
    def function(given: dict[str, Tensor], pred: Tensor) -> tuple[Tensor, ...]:
        p = case.shape["patch"]
        return (masked_patch_loss(given["images"], pred, given["mask"], patch_size=p, target="mae"),)

    return function


def _cost(case: Case) -> tuple[float, float]:
    """Masked patches of image and prediction read in forward and in backward, the whole gradient written."""
    b, length = case.shape["B"], tokens(case)
    masked, size = length - case.shape["K"], case.torch_dtype.itemsize
    return 0.0, float(b * pixels(case) * (2 * masked * (4 + size) + length * size))


BENCHMARK = Benchmark(
    op="masked_patch_loss",
    own="mae",
    sweep=[{"B": 64, "side": 224, "patch": 16, "K": 49}],
    problem=_problem,
    published=_published,
    fused=_fused,
    whole_cost=_cost,
    tiny={"B": 2, "side": 48, "patch": 16, "K": 4},
)
PROVIDERS, BASELINES, TINY = BENCHMARK.providers, BENCHMARK.baselines, BENCHMARK.tiny
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip
