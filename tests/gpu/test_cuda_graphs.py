"""Every public loss that docs/cuda_graphs.md does not except is captured in a CUDA graph, replayed on new values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fake_cuda import WAITS
from fake_cuda.distillation import DISTILLATION
from fake_cuda.inputs import Case, Inputs
from fake_cuda.losses import CONTRASTIVE, DECORRELATION, MASKED

DOCS = Path(__file__).parents[2] / "docs"
LOSSES = {**CONTRASTIVE, **DECORRELATION, **DISTILLATION, **MASKED}
# What waits for the device in each.
WAITING = {
    "mmcr": "an eigenvalue solver",
    "MMCRLoss": "an eigenvalue solver",
    "WMSELoss": "a permutation of the CPU, and a Cholesky decomposition",
    "Whitening2d": "a Cholesky decomposition",
    "pair_nt_xent": "a number of positives",
    "self_labelling": "an error that says whether to go on",
}
CAPTURED = {name: case for name, case in LOSSES.items() if name.partition("/")[0] not in WAITING}
# All in float32; in bfloat16, too, those with nothing particular about them.
CALLS = [(name, torch.float32) for name in CAPTURED] + [(name, torch.bfloat16) for name in CAPTURED if "/" not in name]


class Held(Inputs):
    """Inputs that are the same tensors, and the same modules, each time a call asks for them in the same order."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(torch.device("cuda"), dtype, learn=True)
        self.things: list[Any] = []
        self.asked = 0

    def rewind(self) -> None:
        self.asked = 0

    def _held(self, make: Callable[[], Any]) -> Any:
        if self.asked == len(self.things):
            self.things.append(make())
        self.asked += 1
        return self.things[self.asked - 1]

    def z(self, *shape: int) -> Tensor:
        return self._held(lambda: super(Held, self).z(*shape))

    def fixed(self, *shape: int) -> Tensor:
        return self._held(lambda: super(Held, self).fixed(*shape))

    def number(self, value: float) -> Tensor:
        return self._held(lambda: super(Held, self).number(value))

    def labels(self, count: int = 24) -> Tensor:
        return self._held(lambda: super(Held, self).labels(count))

    def ids(self, *shape: int) -> Tensor:
        return self._held(lambda: super(Held, self).ids(*shape))

    def images(self, **options: Any) -> Tensor:
        return self._held(lambda: super(Held, self).images(**options))

    def pixels(self, side: int = 16) -> Tensor:
        return self._held(lambda: super(Held, self).pixels(side))

    def made(self, module: Callable[[], nn.Module]) -> Any:
        return self._held(lambda: super(Held, self).made(module))

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in self.things if isinstance(x, Tensor) and x.requires_grad]

    @property
    def states(self) -> list[Tensor]:
        return [t for x in self.things if isinstance(x, nn.Module) for t in (*x.buffers(), *x.parameters())]


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def step(case: Case, held: Held) -> list[Tensor]:
    """What the call returns, then the gradients of the sum of what of it has one."""
    held.rewind()
    outputs = list(tensors(case(held)))
    total = sum(out.float().sum() for out in outputs if out.requires_grad)
    if not isinstance(total, Tensor):
        return outputs
    grads = torch.autograd.grad(total, held.leaves, allow_unused=True)
    return [*(out.detach() for out in outputs), *(grad for grad in grads if grad is not None)]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype"), CALLS, ids=lambda value: str(value).replace("/", ", "))
def test_captured_and_replayed(name: str, dtype: torch.dtype) -> None:
    case, held = CAPTURED[name], Held(dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(case, held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(case, held)
    with torch.no_grad():  # new values at the same addresses
        for leaf in held.leaves:
            leaf.copy_(torch.randn_like(leaf) if leaf.dim() else leaf * 1.25)
    before = [state.clone() for state in held.states]
    graph.replay()
    replayed = [t.clone() for t in captured]
    with torch.no_grad():
        for state, value in zip(held.states, before, strict=True):
            state.copy_(value)
    expected = step(case, held)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    assert any(t.is_floating_point() and t.abs().sum() > 0 for t in expected)
    torch.testing.assert_close(replayed, expected, rtol=tolerance, atol=tolerance, equal_nan=False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(LOSSES.keys() - CAPTURED.keys()), ids=lambda name: name.replace("/", ", "))
def test_those_that_wait_say_so(name: str) -> None:
    """PyTorch's error, where they are captured all the same."""
    held = Held(torch.float32)
    step(LOSSES[name], held)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            step(LOSSES[name], held)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_page_names_those_that_wait() -> None:
    table = (DOCS / "cuda_graphs.md").read_text().partition("| loss | what waits |")[2].partition("\n\n")[0]
    rows = [row.split("|")[1] for row in table.splitlines()[2:]]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(WAITING)


def test_those_that_look_at_values_are_among_those_that_wait() -> None:
    """WAITS are what raised on tensors without values."""
    assert {name.partition("/")[0] for name in WAITS if name in LOSSES} <= set(WAITING)


def test_held_inputs_are_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a replay, and the call that it is compared with, see the same tensors and modules. On the CPU."""
    for name in ("barlow_twins", "TiCoLoss", "MoCoLoss", "sup_con_keys/keys"):
        held = Held(torch.float32)
        held.device = torch.device("cpu")
        first, states = step(CAPTURED[name], held), [state.clone() for state in held.states]
        count = len(held.things)
        second = step(CAPTURED[name], held)
        assert len(held.things) == count and len(held.leaves) >= 1
        if not states:
            torch.testing.assert_close(first, second)
