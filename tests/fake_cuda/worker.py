"""Runs every call of sslfast's own, or of its adapters', on fake CUDA tensors, and more.

    python -m fake_cuda.worker <a library that makes the CUDA device known to a PyTorch without it> adapters

prints what went wrong in each as JSON.

A process of its own: that library, like what is made believe here of the compiled kernels, is for all of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from sslfast import _native

from . import CASES
from .inputs import Case, Inputs


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in a result: in tuples, lists, dictionaries and data classes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return [
        tensor
        for leaf in _pytree.tree_leaves(value)
        for tensor in ([leaf] if isinstance(leaf, Tensor) else tensors(leaf) if dataclasses.is_dataclass(leaf) else [])
    ]


# --------------------------------------------------------------------------------------------------------- the backward


def backward(outputs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Leaves and their gradients, by calling the graph's nodes one by one.

    PyTorch's engine asks the accelerator for its streams, and a fake one has none. What the engine makes right on the
    way, a gradient's dtype and a shape that broadcasts, is made right here; a gradient on another device is an error.
    """
    roots = [(o.grad_fn, o.output_nr, torch.ones_like(o)) for o in outputs if o.grad_fn is not None]
    waiting: dict[Any, int] = {}  # how many uses of a node's outputs have not been differentiated yet
    seen, stack = set(), [node for node, _, _ in roots]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            if following is not None:
                waiting[following] = waiting.get(following, 0) + 1
                stack.append(following)
    given: dict[Any, dict[int, Tensor]] = {}
    for node, place, grad in roots:
        _add(given.setdefault(node, {}), place, grad)
    ready = [node for node in dict.fromkeys(node for node, _, _ in roots) if not waiting.get(node)]
    leaves: list[tuple[Tensor, Tensor]] = []
    while ready:
        node = ready.pop()
        grads = given.pop(node, {})
        if hasattr(node, "variable"):
            leaves += [(node.variable, grad) for grad in grads.values()]
            continue
        found: Any = (None,) * len(node.next_functions)
        if grads:
            found = _called(node, [grads.get(place) for place in range(len(node._input_metadata))])
        for (following, place), grad in zip(node.next_functions, found, strict=True):
            if following is None:
                continue
            if grad is not None:
                wanted = following._input_metadata[place]
                if grad.device != wanted.device:
                    raise AssertionError(f"{node.name()} gives a gradient on {grad.device} to {wanted.device}")
                shaped = grad.sum_to_size(wanted.shape) if grad.shape != wanted.shape else grad
                _add(given.setdefault(following, {}), place, shaped.to(wanted.dtype))
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)
    return leaves


def _called(node: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """What a node gives to each of its edges."""
    with torch.no_grad():
        if callable(node):  # PyTorch's own
            found = node(*grads)
            return found if isinstance(found, tuple) else (found,)
        found = node.apply(*grads)  # written in Python: one for each argument of its forward, tensor or not
    found = iter(g for g, need in zip(found, node.needs_input_grad, strict=True) if need)
    return tuple(None if following is None else next(found) for following, _ in node.next_functions)


def _add(slots: dict[int, Tensor], place: int, grad: Tensor) -> None:
    slots[place] = slots[place] + grad if place in slots else grad


# ------------------------------------------------------------------------------------------------------------ the modes


class GeneratorsFit(TorchFunctionMode):
    """A generator is of the device that its numbers are made on: fake tensors let it pass."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        generator = (kwargs or {}).get("generator")
        result = function(*args, **(kwargs or {}))
        if generator is not None and isinstance(result, Tensor) and generator.device.type != result.device.type:
            raise AssertionError(f"a {generator.device.type} generator for numbers on {result.device}")
        return result


def on(device: str, dtype: torch.dtype, *, learn: bool, default: str | None = None) -> Callable[[Case], None]:
    """A call on tensors of ``device``, and its backward: every tensor that comes of it is there."""

    def run(case: Case) -> None:
        inputs = Inputs(torch.device(device), dtype, learn)
        with GeneratorsFit(), torch.device(default) if default else contextlib.nullcontext():
            found = tensors(case(inputs))
            gradients = backward(found)
        assert gradients or not any(t.requires_grad for t in found), "no gradient comes of it"
        for leaf, grad in gradients:
            if (grad.device, grad.shape, grad.dtype) != (leaf.device, leaf.shape, leaf.dtype):
                raise AssertionError(f"a gradient {grad.dtype} {tuple(grad.shape)} on {grad.device}")
        assert found, "no tensor comes of it"
        elsewhere = {str(t.device) for t in found if t.device.type != inputs.device.type}
        if elsewhere:
            raise AssertionError(f"a result is on {', '.join(elsewhere)}")

    return run


def faked(run: Callable[[Case], None]) -> Callable[[Case], None]:
    def fake(case: Case) -> None:
        with FakeTensorMode(allow_non_fake_inputs=False):
            run(case)

    return fake


def as_without(case: Case) -> None:
    """Real tensors on the CPU while another device is the default one: the same numbers in the same place."""
    results = []
    for default in ("cpu", "meta"):
        torch.manual_seed(0)
        with torch.device("cpu"):
            inputs = Inputs(torch.device("cpu"), torch.float32, learn=True)
        with torch.device(default):
            results.append(tensors(case(inputs)))
    for plain, other in zip(*results, strict=True):
        assert not isinstance(other, FakeTensor), "a fake tensor was left behind"
        if other.device.type != "cpu":
            raise AssertionError(f"a result is on {other.device}")
        torch.testing.assert_close(other, plain, rtol=0, atol=0, equal_nan=True)


MODES: dict[str, Callable[[Case], None]] = {
    "fake CUDA, bfloat16": faked(on("cuda", torch.bfloat16, learn=True)),
    "fake CUDA, nothing learns": faked(on("cuda", torch.float32, learn=False)),
    "fake CUDA, another default device": faked(on("cuda", torch.float32, learn=True, default="cpu")),
    "fake CUDA, the default device": faked(on("cuda", torch.float32, learn=True, default="cuda")),
    "fake CPU": faked(on("cpu", torch.float32, learn=True)),
    "meta": on("meta", torch.float32, learn=True),
    "real CPU, another default device": as_without,  # last: a fake tensor that a cache has kept would show
}


def what_is_wrong(run: Callable[[Case], None], case: Case) -> str | None:
    try:
        run(case)
        return None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "/sslfast/" in f.filename]
        where = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
        message = next(iter(str(error).strip().splitlines()), "")
        return f"{type(error).__name__}: {message[:200]}{where}"


def wrong_calls(run: Callable[[Case], None], cases: dict[str, Case]) -> dict[str, str]:
    return {name: wrong for name, case in cases.items() if (wrong := what_is_wrong(run, case)) is not None}


def of_adapters() -> dict[str, Any]:
    """For each package: what went wrong, and what no case calls; or why it cannot be imported."""
    from benchmarks import Unavailable
    from sslfast.adapters import _serve

    from .adapters import PACKAGES

    _serve.PLAIN = (*_serve.PLAIN, FakeTensor)
    warnings.filterwarnings("error", message="sslfast does not serve")
    found: dict[str, Any] = {}
    for package, prepare in PACKAGES.items():
        try:
            cases, contents = prepare()
        except (ImportError, Unavailable) as error:
            found[package] = {"absent": str(error)}
            continue
        names = [value.__name__ for value in (*contents.classes, *contents.functions)]
        called = {name.partition("/")[0] for name in cases}
        found[package] = {"no case": [name for name in names if name not in called]}
        for dtype in (torch.bfloat16, torch.float32):
            run = faked(on("cuda", dtype, learn=True))
            found[package][str(dtype)] = wrong_calls(run, cases)
    return found


def main(library: str, what: str) -> None:
    torch.ops.load_library(library)
    warnings.simplefilter("ignore")
    # As beside the CUDA library: of an operator its fake kernel is all that is called.
    _native.why_missing.pop("_C_cuda", None)
    found = of_adapters() if what == "adapters" else {mode: wrong_calls(run, CASES) for mode, run in MODES.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
