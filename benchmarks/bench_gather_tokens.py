"""A masked autoencoder's random masking of tokens, with position and class token, forward and backward.

``learned``: 1 where the position learns too. With K = 49, D = 768 the kept tokens are 9.4 MiB, the gradient of all
tokens 36.8 MiB.
"""

from __future__ import annotations

from torch import Tensor

from sslfast.masking import gather_tokens

from .harness import Case
from .masking import (
    Function,
    Problem,
    masks,
    noise,
    normal,
    of_tokens,
    position_of,
    problem_with_position,
    tokens,
    visible_tokens,
)


def _problem(case: Case) -> Problem:
    b, d = case.shape["B"], case.shape["D"]
    learn, given = [normal(case, b, tokens(case), d), normal(case, 1, 1, d)], {"noise": noise(case)}
    return problem_with_position(case, learn, given, 1 + case.shape["K"])


def _published(case: Case) -> Function:
    kept = case.shape["K"]

    def function(given: dict[str, Tensor], x: Tensor, cls_token: Tensor, *learned: Tensor) -> tuple[Tensor, ...]:
        return visible_tokens(x, cls_token, position_of(given, learned), kept, given["noise"])

    return function


def _fused(case: Case) -> Function:
    chosen = masks(case)

    def function(given: dict[str, Tensor], x: Tensor, cls_token: Tensor, *learned: Tensor) -> tuple[Tensor, ...]:
        position, made = position_of(given, learned), chosen(given["noise"])
        kept = gather_tokens(x, made.ids_keep, position=position[:, 1:], prefix=cls_token + position[:, :1])
        return kept, made.mask, made.ids_restore

    return function


def _cost(case: Case) -> tuple[float, float]:
    """Kept tokens read and written, their gradients read, and all tokens' gradients written; positions aside."""
    b, k, d = case.shape["B"], case.shape["K"], case.shape["D"]
    return 0.0, float(b * d * (k + 2 * (1 + k) + tokens(case)) * case.torch_dtype.itemsize)


BENCHMARK = of_tokens("gather_tokens", 768, problem=_problem, published=_published, fused=_fused, whole_cost=_cost)
PROVIDERS, BASELINES, TINY = BENCHMARK.providers, BENCHMARK.baselines, BENCHMARK.tiny
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip
