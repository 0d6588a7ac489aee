"""Plain PyTorch in other roundings: what its arithmetic can lose, rather than what it lost on one processor.

With u half a unit in the last place of 1, a sum of n terms in floating point is the exact sum of terms that are
moved by at most n·u of themselves each, in whichever order it is taken (so is a product of matrices, a sum of
products); roundings go up and down alike, so that its error is usually below √n·u·‖terms‖. How far below is chance.
Of a single number, a loss or the gradient of a temperature, one run in ten loses less than an eighth of the
deviation over processors, and a right kernel's error is then more than twice as large four times in five.

So the plain formula runs again, DRAWS times, with each number that any of its operations gives moved by 2u of itself
up, down, or not at all. That is twice the most that rounding it can be wrong by, and nearly three times the usual, so
that the error budget's factor of 2 is in it; no order of summation takes it back, and where nothing cancels the results
still differ by a few u only. (This is Monte Carlo arithmetic: Parker, "Monte Carlo Arithmetic: exploiting randomness in
floating-point arithmetic", 1997.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# A normally distributed error exceeds the largest of 16 others with probability 0.006 where these are 1.6 times as
# large as it, 0.00004 where 2.8 times; it exceeds twice one other as large as it with probability 0.30.
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
    numbers = torch.get_rng_state()  # every run draws the same ones, and leaves the next draw as it is
    first, structure = pytree.tree_flatten(function(*args, **kwargs))
    runs = [first]

    def result(place: int) -> Rounded:
        def draw(i: int) -> Tensor:
            while len(runs) <= i:
                with torch.random.fork_rng(devices=[]), _Moved(seed=len(runs)):
                    torch.set_rng_state(numbers)
                    runs.append(pytree.tree_leaves(function(*args, **kwargs)))
            return runs[i][place]

        return Rounded(draw)

    results = [result(i) if isinstance(x, Tensor) else x for i, x in enumerate(first)]
    return pytree.tree_unflatten(results, structure)


def every_rounding(reference: Tensor | Rounded) -> Iterator[tuple[float, Tensor]]:
    """What its error counts, and the reference as this processor rounds; then moved, each when it is reached."""
    if isinstance(reference, Rounded):
        yield 2.0, reference.draw(0)
        yield from ((1.0, reference.draw(i)) for i in range(1, 1 + DRAWS))
    else:
        yield 2.0, reference


class _Moved(TorchDispatchMode):
    """What an operation in float32 or float64 gives, in the backward too, is moved once, for all that read it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if any(result.alias_info is not None for result in func._schema.returns):  # a view, or written in place
            return found
        return pytree.tree_map(self._moved, found)

    def _moved(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
            return x
        steps = torch.randint(-1, 2, x.shape, generator=self.generator).to(x)
        return x * (1 + torch.finfo(x.dtype).eps * steps)  # zeros and infinities stay; eps is 2u
