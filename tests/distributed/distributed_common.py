"""What the cases share that every rank of a process group runs: the batch, the losses, the comparison.

Every rank makes the whole global batch from a seed, takes its part, and compares what it gets with one process on the
global batch (the reference in float64).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

import sslfast
from helpers import Rounded, roundings, within_budget
from sslfast.distributed import Scope

STRATEGIES = ("gather", "ring")
# Rows of each rank: uneven, one row, more than a tile.
SIZES = {1: [(5,), (200,)], 2: [(5, 3), (4, 1), (230, 131)], 4: [(4, 4, 1, 7), (61, 2, 197, 5)]}

CASES: dict[str, Callable[[int, int], None]] = {}
Formula = Callable[..., Tensor]


def case(function: Callable[[int, int], None]) -> Callable[[int, int], None]:
    CASES[function.__name__] = function
    return function


# ------------------------------------------------------------- losses written on a scope, as the library's own ones are


def nt_xent(scope: Scope, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Rows against themselves; ids leave out the diagonal."""
    z = torch.cat([x, y])
    shard = scope.shard(z)
    ids = shard.ids(z.device)
    terms = scope.similarity_terms(z, None, scale, row_ids=ids, positives=ids.roll(len(x)))
    return shard.weight * (terms.row_lse - terms.positive).sum()


def clip(scope: Scope, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Rows and columns, a bias a column."""
    shard = scope.shard(x)
    terms = scope.similarity_terms(x, y, scale, bias=bias, columns=True, positives=shard.ids(x.device), hardest=True)
    assert not terms.hardest.requires_grad
    return shard.weight * (terms.row_lse + 0.5 * terms.col_lse - 1.7 * terms.positive).sum()


def columns_alone(scope: Scope, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """No gradient reaches the row LSE."""
    shard = scope.shard(x)
    return shard.weight * scope.similarity_terms(x, y, scale, columns=True).col_lse.sum()


def keys_without_gradient(scope: Scope, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Only rows learn."""
    shard = scope.shard(x)
    terms = scope.similarity_terms(x, y.detach(), scale, positives=shard.ids(x.device))
    return shard.weight * (terms.row_lse - terms.positive).sum() + 0 * y.sum()


def sig_lip(scope: Scope, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """One bias for all pairs; positives by equal ids, several of them."""
    shard = scope.shard(x)
    labels = shard.ids(x.device) // 2
    return shard.weight * scope.similarity_logsigmoid(x, y, scale, -scale, row_ids=labels, col_ids=labels)


def gathered(scope: Scope, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """``gather`` of features and labels, ``total``."""
    shard = scope.shard(x)
    everyone = scope.gather(y)
    labels = scope.gather((shard.ids(x.device) % 3).to(torch.int32))
    assert len(everyone) == len(labels) == shard.total
    mean = scope.total(x.sum(0)) / shard.total
    s = torch.tanh(scale * x @ everyone.T) * labels
    return shard.weight * (s.sum() + ((x - mean) ** 2).sum())


FORMULAS: tuple[Formula, ...] = (nt_xent, clip, columns_alone, keys_without_gradient, sig_lip, gathered)


def batch(sizes: Sequence[int], dtype: torch.dtype, width: int = 7) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The global x, y [total, D], scale [] and bias [total], and the ranks' parts of them."""
    generator = torch.Generator().manual_seed(sum(sizes))
    x, y = torch.randn(2, sum(sizes), width, generator=generator, dtype=torch.float64)
    whole = [x, y, torch.tensor(1.3, dtype=torch.float64), torch.randn(sum(sizes), generator=generator).double()]
    whole = [t.to(dtype) for t in whole]
    parts = [[t.split(list(sizes))[r] if t.dim() else t for t in whole] for r in range(len(sizes))]
    return whole, parts


def value_and_gradients(formula: Formula, scope: Scope, inputs: Sequence[Tensor]) -> list[Tensor]:
    inputs = [t.clone().requires_grad_() for t in inputs]
    loss = formula(scope, *inputs)
    return [loss.detach(), *torch.autograd.grad(loss, inputs, materialize_grads=True)]


@functools.cache
def global_batch(formula: Formula, sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], list[Rounded]]:
    """Value and gradients of one process on the global batch, by the reference in float64 and in ``dtype``.

    NT-Xent's views stand rank by rank in the distributed batch; for its value their order is irrelevant.
    """

    def by_reference(dtype: torch.dtype) -> list[Tensor]:
        with sslfast.use_backend("reference"):
            return value_and_gradients(formula, Scope(), batch(sizes, dtype)[0])

    return by_reference(torch.float64), roundings(by_reference, dtype)


def mean_over_ranks(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def compare(
    name: str, found: list[Tensor], rank: int, sizes: Sequence[int], formula: Formula, dtype: torch.dtype
) -> None:
    """What DDP makes of the ranks' values: the mean; for a rank's own rows that is 1/W of their gradient."""
    truth, plain = global_batch(formula, sizes, dtype)
    for what, mine, true, reference in zip(("value", "x", "y", "scale", "bias"), found, truth, plain, strict=True):
        if true.dim():
            mine = mine / len(sizes)
            true, reference = (t.split(list(sizes))[rank] for t in (true, reference))
        else:
            mine = mean_over_ranks(mine)
        within_budget(f"{name}: {what}", mine, reference, true, dtype)


def of_global_batch(
    name: str, found: Sequence[Tensor], truth: Sequence[Tensor], rank: int, sizes: Sequence[int], atol: float
) -> None:
    """Value and gradients in x, y and the scale of one process on the global batch, as DDP makes them of the ranks'."""
    for what, mine, true in zip(("value", "x", "y", "s"), found, truth, strict=True):
        if true.dim():
            mine, true = mine / len(sizes), true.split(list(sizes))[rank]
        else:
            mine = mean_over_ranks(mine)
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=atol, msg=lambda m, what=what: f"{name}: {what}: {m}")


def raises(kind: type[Exception], told: str, call: Callable[[], object]) -> None:
    try:
        call()
    except kind as error:
        assert told in str(error), f"{told!r} not in {error!s}"
    else:
        raise AssertionError(f"no {kind.__name__}: {told}")
