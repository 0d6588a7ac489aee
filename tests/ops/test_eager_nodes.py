"""In eager mode the node of the graph is made beside the dispatcher: the same function, seen by all who look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sslfast import _library

ROWS = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
VIEWS = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1))
Run = Callable[..., Any]


def l2_normalize(run: Run, x: Tensor) -> Tensor:
    return run("l2_normalize", x, 1e-12)[0].square().sum(0)[:3].sum()


def cross_entropy(run: Run, *views: Tensor) -> Tensor:
    """Of an operator that takes lists of tensors."""
    targets = [x[None] for x in torch.softmax(VIEWS[:2], -1)]
    student = [x[None] for x in views]
    of_row: Tensor = run("distillation_cross_entropy", student, targets, None, 0.1, 1.0, True, True, None, None)[0]
    return of_row.sum()


CASES: list[tuple[Callable[..., Tensor], Sequence[Tensor], str]] = [
    (l2_normalize, [ROWS], "L2NormalizeBackward"),
    (cross_entropy, list(VIEWS), "DistillationCrossEntropyBackward"),
]
cases = pytest.mark.parametrize("function, inputs, node", CASES, ids=lambda x: getattr(x, "__name__", None))


def by_dispatcher(name: str, *args: Any) -> Any:
    return getattr(torch.ops.sslfast, name)(*args)


def nodes_of(loss: Tensor) -> set[str]:
    names, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            names.add(node.name())
            todo += [after for after, _ in node.next_functions]
    return names


@cases
def test_gradients_are_the_dispatchers(function: Any, inputs: Sequence[Tensor], node: str) -> None:
    found = []
    for run in (_library.run, by_dispatcher):
        leaves = [x.clone().requires_grad_() for x in inputs]
        loss = function(run, *leaves)
        assert (node in nodes_of(loss)) == (run is _library.run)
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        again = torch.autograd.grad(loss, leaves)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        found.append((loss.detach(), *first))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert any(g.abs().max() > 0 for g in found[0][1:])


@cases
def test_part_of_the_inputs_learns(function: Any, inputs: Sequence[Tensor], node: str) -> None:
    leaves = [x.clone() for x in inputs]
    leaves[-1].requires_grad_()
    function(_library.run, *leaves).backward()
    assert leaves[-1].grad is not None and leaves[-1].grad.abs().max() > 0
    assert all(x.grad is None for x in leaves[:-1])


@cases
def test_without_a_gradient_there_is_no_node(function: Any, inputs: Sequence[Tensor], node: str) -> None:
    assert function(_library.run, *inputs).grad_fn is None
    with torch.no_grad():
        assert function(_library.run, *(x.clone().requires_grad_() for x in inputs)).grad_fn is None


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@cases
def test_a_mode_sees_the_operators(function: Any, inputs: Sequence[Tensor], node: str) -> None:
    leaves = [x.clone().requires_grad_() for x in inputs]
    with Seen() as seen:
        function(_library.run, *leaves).backward()
    ours = [name.removeprefix("sslfast::").removesuffix("_backward") for name in seen.names if "sslfast" in name]
    assert len(ours) == 2 and len(set(ours)) == 1  # forward and backward


class Logged(Tensor):
    names: list[str] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.names.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_subclass_sees_the_operators() -> None:
    x = ROWS.clone().as_subclass(Logged)
    assert isinstance(_library.run("l2_normalize", x, 1e-12)[0], Logged)
    assert any("l2_normalize" in name for name in Logged.names)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated")
def test_a_traced_function_has_the_operators() -> None:
    traced = torch.jit.trace(lambda x: _library.run("l2_normalize", x, 1e-12)[0], ROWS)
    assert "sslfast::l2_normalize" in str(traced.graph)
