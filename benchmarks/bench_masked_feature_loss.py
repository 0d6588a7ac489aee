"""I-JEPA's loss: smooth L1 between predictions for several blocks and the teacher's layer-normed features there.

Forward, and backward to the predictions: ``S`` blocks of ``K`` tokens an image. With S = 4, K = 35, D = 768 their
gradient is 26.3 MiB.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sslfast.ops.masked_feature_loss import masked_feature_loss

from .contrastive import generator
from .harness import Case
from .masking import Benchmark, Function, Problem, leaf, normal, tokens


def _problem(case: Case) -> Problem:
    s, b, k, d = (case.shape[name] for name in ("S", "B", "K", "D"))
    ids = torch.rand(s, b, tokens(case), generator=generator()).argsort(-1)[..., :k].sort(-1).values
    given = {"teacher": 3 * normal(case, b, tokens(case), d) + 1, "ids": ids.to(case.device)}
    return Problem((leaf(normal(case, s, b, k, d)),), given)


def _published(case: Case) -> Function:
    def function(given: dict[str, Tensor], z: Tensor) -> tuple[Tensor, ...]:
        """All of the teacher's tokens are normalised, then each block is gathered by a repeated index."""
        h = F.layer_norm(given["teacher"], (case.shape["D"],))
        blocks = [h.gather(1, ids.unsqueeze(-1).repeat(1, 1, case.shape["D"])) for ids in given["ids"]]
        return (F.smooth_l1_loss(z.flatten(0, 1), torch.cat(blocks)),)

    return function


def _fused(case: Case) -> Function:
    return lambda given, z: (masked_feature_loss(z, given["teacher"], given["ids"]),)


def _cost(case: Case) -> tuple[float, float]:
    """Predictions and their teachers read in forward and in backward, the gradient written."""
    s, b, k, d = (case.shape[name] for name in ("S", "B", "K", "D"))
    return 0.0, 5.0 * s * b * k * d * case.torch_dtype.itemsize


BENCHMARK = Benchmark(
    op="masked_feature_loss",
    own="ijepa",
    sweep=[{"S": 4, "B": 64, "L": 196, "K": 35, "D": 768}],
    problem=_problem,
    published=_published,
    fused=_fused,
    whole_cost=_cost,
    tiny={"S": 2, "B": 3, "L": 11, "K": 4, "D": 20},
    pictures=False,
)
PROVIDERS, BASELINES, TINY = BENCHMARK.providers, BENCHMARK.baselines, BENCHMARK.tiny
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip
