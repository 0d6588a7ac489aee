"""What losses of several families share: checked rows, two views of them, a queue beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import (
    accumulator,
    autocasts,
    check_matrix,
    check_same,
    readable,
)
from .._warn import warn_user
from ..distributed.scope import check_strategy
from ..ops.l2_normalize import l2_normalize

NORMALIZE = "torch.nn.functional.normalize(x, dim=1)"
LOOKS = 8  # calls of a loss whose rows are looked at: a script that does not normalise does not from the first step on
_looks: dict[str, int] = {}


def expect_unit_rows(call: str, remedy: str, **rows: Tensor) -> None:
    """Warn, once for each loss, where most rows of a matrix are far from norm 1: the loss takes them as they are.

    A few rows of the first calls are looked at, and only where that waits for no device. Unit rows in 16 bits are
    within 2⁻⁸ of norm 1; rows of zeros and of NaN say nothing.
    """
    looks = _looks.get(call, 0)
    if looks == LOOKS or not all(readable(x) for x in rows.values()):
        return
    _looks[call] = looks + 1
    for name, x in rows.items():
        squares = x[:64].detach().to(accumulator(x)).square().sum(1)
        far = ((squares - 1).abs() > 0.1) & (squares > 0)
        if 2 * int(far.sum()) > len(squares):
            _looks[call] = LOOKS
            least, most = squares.aminmax()
            warn_user(
                f"sslfast.{call}: {name} should have rows of norm 1, and theirs are {least.sqrt():.3g} to "
                f"{most.sqrt():.3g}: normalise them first ({remedy}), unless this is meant"
            )
            return


def check_fits(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """``x`` has ``like``'s width, device and dtype."""
    if x.shape[-1] != like.shape[-1]:
        raise ValueError(
            f"{name} and {like_name} must have the same width, got {x.shape[-1]} and {like.shape[-1]} features"
        )
    if x.device != like.device:
        raise ValueError(f"{name} and {like_name} must be on the same device, got {x.device} and {like.device}")
    if x.dtype != like.dtype:
        raise TypeError(f"{name} and {like_name} must have the same dtype, got {x.dtype} and {like.dtype}")


def in_one_dtype(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as they are; inside an autocast region, which mixes them, in the widest of their dtypes."""
    present = [t for t in tensors if isinstance(t, Tensor)]
    if not present or not autocasts(present[0]):
        return tensors
    widest = present[0].dtype
    for t in present:
        widest = torch.promote_types(widest, t.dtype)
    return tuple(t.to(widest) if isinstance(t, Tensor) else t for t in tensors)


def two_views(name0: str, z0: Tensor, name1: str, z1: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Two checked matrices [N, D] of the same shape, device and dtype, their rows normalised if asked."""
    check_matrix(name0, z0)
    check_matrix(name1, z1)
    first, second = in_one_dtype(z0, z1)
    assert first is not None and second is not None
    check_same(name0, first, name1, second)
    return (l2_normalize(first), l2_normalize(second)) if normalize else (first, second)


def views_and_queue(
    named_q: tuple[str, Tensor], named_k: tuple[str, Tensor], queue: Tensor, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and queue, checked, in their widest dtype, rows of the first two normalised if asked."""
    check_matrix("queue", queue)
    q, k = two_views(*named_q, *named_k, normalize=False)
    widest = torch.promote_types(q.dtype, queue.dtype)
    q, k, queue = q.to(widest), k.to(widest), queue.detach().to(widest)
    check_fits("queue", queue, named_q[0], q)
    return (l2_normalize(q), l2_normalize(k), queue) if normalize else (q, k, queue)


def check_gather(gather_distributed: bool, strategy: str = "gather") -> None:
    """``strategy`` exists, and ``gather_distributed=True`` needs a torch that was built with ``torch.distributed``."""
    check_strategy(strategy)
    if gather_distributed and not torch.distributed.is_available():
        raise ValueError(
            "gather_distributed=True, but torch.distributed is not available: "
            "set gather_distributed=False or install a torch with distributed support"
        )
