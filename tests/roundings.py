"""Plain PyTorch in other roundings: what its arithmetic can lose, rather than what it lost on one processor.

With u half a unit in the last place of 1, a sum of n terms in floating point is the exact sum of terms that are
moved by at most n·u of themselves each, in whichever order it is taken (so is a product of matrices, a sum of
products); roundings go up and down alike, so that its error is usually below √n·u·‖terms‖. How far below is chance.
Of a single number, a loss or the gradient of a temperature, one run in ten loses less than an eighth of the
deviation over processors, and a right kernel's error is then more than twice as large four times in five.

So the plain formula runs again with each number in every operand of every operation moved by 2u of itself, up or
down, one in nine each: with a deviation of u, as another rounding of each term might move it. No order of summation
takes that back, and where nothing cancels the results still differ by a few u only. Twice the largest error of
:data:`DRAWS` such runs holds for a right kernel on any processor, but for one case in a thousand before any
tolerance. (This is Monte Carlo arithmetic: Parker, "Monte Carlo Arithmetic: exploiting randomness in floating-point
arithmetic", 1997.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# Of normally distributed errors one is more than twice the largest of 1, 4, 8, 16 others with probability 0.30, 0.04,
# 0.008, 0.0012.
DRAWS = 16


class Rounded:
    """A tensor in as many roundings as are asked for. Its methods and indices are those of each of them."""

    def __init__(self, draw: Callable[[int], Any]) -> None:
        self.draw = draw  # 0: as this processor rounds

    def __getattr__(self, name: str) -> Callable[..., Rounded]:
        return lambda *args, **kwargs: Rounded(lambda i: getattr(self.draw(i), name)(*args, **kwargs))

    def __getitem__(self, place: Any) -> Rounded:
        return Rounded(lambda i: self.draw(i)[place])


def roundings(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, which runs again on demand, with a :class:`Rounded` in place of every tensor."""
    first, structure = pytree.tree_flatten(function(*args, **kwargs))
    runs = [first]

    def result(place: int) -> Rounded:
        def draw(i: int) -> Tensor:
            while len(runs) <= i:
                with _Moved(seed=len(runs)):
                    runs.append(pytree.tree_leaves(function(*args, **kwargs)))
            return runs[i][place]

        return Rounded(draw)

    return pytree.tree_unflatten([result(i) for i in range(len(first))], structure)


def every_rounding(reference: Tensor | Rounded) -> Iterator[Tensor]:
    """One for a tensor, :data:`DRAWS` for one of :func:`roundings`, each computed when it is reached."""
    if isinstance(reference, Rounded):
        yield from (reference.draw(i) for i in range(1 + DRAWS))
    else:
        yield reference


class _Moved(TorchDispatchMode):
    """Operations of float32 and float64, the backward's too, get operands that are moved by 2u or not at all."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(result.alias_info is not None for result in func._schema.returns):  # a view, or in place
            return func(*args, **kwargs)
        found = func(*args, **kwargs)
        if not any(_is_wide(t) for t in pytree.tree_leaves(found)):  # a comparison, or a conversion to 16 bits
            return found
        return func(*pytree.tree_map(self._moved, args), **pytree.tree_map(self._moved, kwargs))

    def _moved(self, x: Any) -> Any:
        if not _is_wide(x):
            return x
        steps = torch.randint(-4, 5, x.shape, generator=self.generator).div(4, rounding_mode="trunc").to(x)
        return x * (1 + torch.finfo(x.dtype).eps * steps)  # zeros and infinities stay; eps is 2u


def _is_wide(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float64)
