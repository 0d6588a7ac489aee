"""Trials: whether a package's method gives the numbers and gradients of sslfast's form of it, for small inputs."""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ._serve import Unserved, own_method, parameters, served

Fast = Callable[..., Any]
EXACT = (1e-9, 1e-11)  # relative and absolute error
SINGLE = (1e-4, 1e-6)  # of a method that computes in float32 whatever it is given


def shaken(model: Any) -> Any:
    """In float64, with random numbers in every parameter: what is zero at the start hides what is done with it."""
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def same(
    original: Fast,
    fast: Fast,
    model: nn.Module,
    calls: Sequence[tuple[Any, ...]],
    close: tuple[float, float] = EXACT,
) -> bool:
    """Both give the same numbers, and the same gradients of all parameters and inputs, from the same random numbers.

    In training and in evaluation: a method may ask which one it is.
    """
    for training, call in itertools.product((True, False), calls):
        model.train(training)
        found = []
        for function in (original, fast):
            seed()
            try:
                result = function(model, *call)
            except Exception:
                return False
            if isinstance(result, Unserved):
                return False
            found.append(_numbers(result, [*model.parameters(), *(t for t in call if isinstance(t, Tensor))]))
        if not all(
            a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, *close)
            for a, b in zip(*found, strict=True)
        ):
            return False
    return True


def seed() -> None:
    """The trials' random numbers; torch.manual_seed would seed every GPU too."""
    torch.default_generator.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@contextlib.contextmanager
def random_numbers_kept() -> Iterator[None]:
    """After the block the generators of torch (the CPU's), ``random`` and NumPy are where they were before."""
    states = torch.default_generator.get_state(), random.getstate(), np.random.get_state()
    try:
        # A default device that is a GPU would build the small models there, from its random numbers.
        with torch.device("cpu"):
            yield
    finally:
        torch.default_generator.set_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def _numbers(result: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    tensors = [t for t in (result if isinstance(result, tuple) else [getattr(result, "logits", result)])]
    learned = [t for t in inputs if t.requires_grad]
    weighted = [(t.double() * torch.linspace(1, 2, t.numel()).view(t.shape)).sum() for t in tensors if t.requires_grad]
    if not weighted:
        return tensors
    return [*tensors, *torch.autograd.grad(sum(weighted), learned, materialize_grads=True, allow_unused=True)]


# ------------------------------------------------------------------------------------- classes that sum over the ranks


class Trial(NamedTuple):
    """What a method is tried with.

    Args:
        fast: sslfast's form of it.
        calls: its arguments, several times.
        close: the relative and absolute error of a result.
        sums: over all calls, how many tensors of ``columns`` numbers the package's own code sums over the ranks. (A
            fast form that calls it adds its own.)
    """

    fast: Fast
    calls: Sequence[tuple[Any, ...]]
    close: tuple[float, float] = EXACT
    sums: int = 0


def tried(
    cls: Any, models: Sequence[nn.Module], trials: Mapping[str, Trial], columns: int, origin: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """The methods of ``cls`` that sslfast serves, and those that it leaves, with the reason.

    A method may change its module: buffers are results too. The process group, if there is one, takes no part.

    Args:
        models: small ones of the class.
        trials: by method.
        origin: the repository whose code the class is a copy of.
    """
    methods: dict[str, Any] = {}
    unchanged: dict[str, str] = {}
    for name, trial in trials.items():
        original = own_method(cls, name)
        if original is None or parameters(original) != parameters(trial.fast):
            unchanged[name] = f"its arguments are not those of {origin}'s"
            continue
        with _one_rank(sys.modules[cls.__module__]) as group, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is the package's code
            pair = _with_state(original), _with_state(trial.fast)
            alike = all(same(*pair, model, trial.calls, trial.close) for model in models)
        if alike and group.sums.count(columns) == 2 * len(models) * trial.sums:  # in training and in evaluation
            methods[name] = served(original, trial.fast)
        else:
            unchanged[name] = f"it does not compute what {origin}'s does"
    return methods, unchanged


def _with_state(method: Fast) -> Fast:
    """``method`` of a copy of the module: what it returns, if anything, and the numbers that it leaves there."""

    def call(model: nn.Module, *arguments: Any) -> Any:
        model = copy.deepcopy(model)
        found = method(model, *arguments)
        if isinstance(found, Unserved):
            return found
        left = [torch.as_tensor(v) for v in vars(model).values() if isinstance(v, (Tensor, int, float))]
        return (*(() if found is None else (found,)), *model.buffers(), *left)

    return call


class _OneRank:
    """``torch.distributed`` to code that is tried out: a group of this process alone, whose sums are noted."""

    def __init__(self) -> None:
        self.sums: list[int] = []

    def is_initialized(self) -> bool:
        return True

    def is_enabled(self) -> bool:  # dinov3's name for it, of code that gathers
        return False

    def get_world_size(self, group: Any = None) -> int:
        return 1

    def get_rank(self, group: Any = None) -> int:
        return 0

    def all_reduce(self, x: Tensor, group: Any = None, async_op: bool = False) -> None:
        self.sums.append(x.numel())


@contextlib.contextmanager
def _one_rank(module: Any) -> Iterator[_OneRank]:
    """Inside, ``module``'s names for process groups mean one of this process alone."""
    group = _OneRank()
    names = {"dist": group, "get_process_subgroup": lambda: None, "get_subgroup_size": lambda: 1}
    before = {name: vars(module)[name] for name in names if name in vars(module)}
    vars(module).update({name: names[name] for name in before})
    try:
        yield group
    finally:
        vars(module).update(before)
