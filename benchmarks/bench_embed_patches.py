"""From images to a masked autoencoder's visible tokens, forward and backward: weight, bias and class token learn.

Both sides make the mask from the same noise. The published code projects all L patches and keeps K; what is counted as
needed is the projection of the kept ones. With K = 49, D = 768 the tokens are 9.4 MiB, the gradients 2.3 MiB.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from sslfast.masking import embed_patches

from .harness import Case
from .masking import Benchmark, Function, Problem, leaf, masks, noise, normal, pictures, pixels, tokens, visible_tokens


def _problem(case: Case) -> Problem:
    b, k, d, p = (case.shape[name] for name in ("B", "K", "D", "patch"))
    learn = (normal(case, d, 3, p, p, scale=pixels(case) ** -0.5), normal(case, d), normal(case, 1, 1, d))
    given = {"images": pictures(case), "position": normal(case, 1, 1 + tokens(case), d), "noise": noise(case)}
    return Problem(tuple(map(leaf, learn)), given, normal(case, b, 1 + k, d))


def _published(case: Case) -> Function:
    p, kept = case.shape["patch"], case.shape["K"]

    def function(given: dict[str, Tensor], weight: Tensor, bias: Tensor, cls_token: Tensor) -> tuple[Tensor, ...]:
        x = F.conv2d(given["images"].to(weight.dtype), weight, bias, stride=p).flatten(2).transpose(1, 2)
        return visible_tokens(x, cls_token, given["position"], kept, given["noise"])

    return function


def _fused(case: Case) -> Function:
    p, chosen = case.shape["patch"], masks(case)

    def function(given: dict[str, Tensor], weight: Tensor, bias: Tensor, cls_token: Tensor) -> tuple[Tensor, ...]:
        made, position = chosen(given["noise"]), given["position"]
        prefix = cls_token + position[:, :1]
        x = embed_patches(
            given["images"], made.ids_keep, weight, bias, patch_size=p, position=position[:, 1:], prefix=prefix
        )
        return x, made.mask, made.ids_restore

    return function


def _cost(case: Case) -> tuple[float, float]:
    """Two products of the kept patches; their pixels read twice, weight and its gradient, tokens and theirs, once."""
    b, k, d, f = case.shape["B"], case.shape["K"], case.shape["D"], pixels(case)
    floats = 2.0 * d * f + 2.0 * b * (1 + k) * d
    return 4.0 * b * k * d * f, 2.0 * 4 * b * k * f + floats * case.torch_dtype.itemsize


_VIT_B = {"B": 64, "side": 224, "patch": 16, "D": 768}

BENCHMARK = Benchmark(
    op="embed_patches",
    own="mae",
    sweep=[{**_VIT_B, "K": k} for k in (49, 20, 98, 196)],
    problem=_problem,
    published=_published,
    fused=_fused,
    whole_cost=_cost,
    tiny={"B": 2, "side": 48, "patch": 16, "D": 40, "K": 4},
)
PROVIDERS, BASELINES, TINY = BENCHMARK.providers, BENCHMARK.baselines, BENCHMARK.tiny
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip
