"""The input of a masked autoencoder's decoder (unshuffle, mask tokens, class token, position), forward and backward.

``learned``: 1 where the position learns too, as the mask token always does. With L = 196, D = 512 the tokens are
24.6 MiB, the gradient of the encoder's 6.3 MiB.
"""

from __future__ import annotations

from torch import Tensor

from sslfast.masking import scatter_tokens

from .harness import Case
from .masking import (
    Function,
    Problem,
    decoder_input,
    normal,
    of_tokens,
    position_of,
    problem_with_position,
    shuffle,
    tokens,
)


def _problem(case: Case) -> Problem:
    b, k, d = case.shape["B"], case.shape["K"], case.shape["D"]
    learn = [normal(case, b, 1 + k, d), normal(case, 1, 1, d)]
    return problem_with_position(case, learn, {"ids_restore": shuffle(case)[1]}, 1 + tokens(case))


def _published(case: Case) -> Function:
    def function(given: dict[str, Tensor], x: Tensor, mask_token: Tensor, *learned: Tensor) -> tuple[Tensor, ...]:
        return (decoder_input(x, mask_token, position_of(given, learned), given["ids_restore"]),)

    return function


def _fused(case: Case) -> Function:
    def function(given: dict[str, Tensor], x: Tensor, mask_token: Tensor, *learned: Tensor) -> tuple[Tensor, ...]:
        position = position_of(given, learned)
        return (scatter_tokens(x, given["ids_restore"], mask_token, position=position, passed=1),)

    return function


def _cost(case: Case) -> tuple[float, float]:
    """The encoder's tokens read and all written; all gradients read and the encoder's written; positions aside."""
    b, k, d = case.shape["B"], case.shape["K"], case.shape["D"]
    return 0.0, 2.0 * b * d * (1 + k + 1 + tokens(case)) * case.torch_dtype.itemsize


BENCHMARK = of_tokens("scatter_tokens", 512, problem=_problem, published=_published, fused=_fused, whole_cost=_cost)
PROVIDERS, BASELINES, TINY = BENCHMARK.providers, BENCHMARK.baselines, BENCHMARK.tiny
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip
