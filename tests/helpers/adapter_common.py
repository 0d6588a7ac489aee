"""What tests of the adapters share: a package's import, and the comparison of its own code with sslfast's in it."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import sslfast
from benchmarks import Unavailable, peers
from helpers import GRAD_LOSS, roundings, within_budget


def peer(module: str) -> Any:
    """A module of another package; the test is skipped, and counted, where it is absent.

    Several of these packages import torchvision, whose wheel needs help beside a CPU torch.
    """
    try:
        peers._import_torchvision()
    except Unavailable as error:
        pytest.skip(str(error))
    try:
        return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"{module.partition('.')[0]} is not importable: {error}")


Call = Callable[..., Any]


def values_and_gradients(call: Call, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Every tensor that ``call`` returns, and the gradients of a weighted sum of them in the floating-point inputs.

    An input that does not reach the result has a gradient of zeros.
    """
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    returned = call(*leaves)
    found = [t for t in _tensors(returned) if t.is_floating_point()]
    # Weights that differ from one another and from 1: a result that is put in another's place, or a backward that
    # forgets the gradient that reaches it, fails.
    total = sum((GRAD_LOSS + i) * t.double().sum() for i, t in enumerate(found))
    learned = [t for t in leaves if t.requires_grad]
    gradients = torch.autograd.grad(total, learned, allow_unused=True)
    zeros = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, learned, strict=True)]
    return [*(t.detach() for t in found), *zeros]


def _tensors(returned: Any) -> list[Tensor]:
    if isinstance(returned, Tensor):
        return [returned]
    if isinstance(returned, dict):
        return [t for key in sorted(returned) for t in _tensors(returned[key])]
    if isinstance(returned, (list, tuple)):
        return [t for item in returned for t in _tensors(item)]
    return []


def same_as_package(package: str, call: Call, *inputs: Tensor, floor: float = 1.0, patched: Call | None = None) -> None:
    """``call(*inputs)`` with ``package`` patched equals the package's own, values and gradients, by the error budget.

    Served, too: a warning that the package's own code computed it fails.

    Args:
        package: its name for :func:`sslfast.patch`.
        call: makes the loss with the package's own names, and calls it. It runs three times: unpatched in float64 (the
            truth) and in the inputs' dtype, and patched.
        inputs: float32 or float64 tensors, and integer ones (labels), which stay as they are.
        floor: the size of the value's terms before they cancel; a gradient's are that over the entries of an input.
        patched: what is called under the patch, if not the same ``call``.
    """
    from sslfast.adapters import _serve

    dtype = next(t.dtype for t in inputs if t.is_floating_point())
    widened = [t.double() if t.is_floating_point() else t for t in inputs]
    truth = values_and_gradients(call, widened)
    own = roundings(values_and_gradients, call, inputs)
    with sslfast.patch(package), warnings.catch_warnings():
        warnings.filterwarnings("error", message="sslfast does not serve")
        _serve._told.clear()  # a reason that another test was told is told again
        fast = values_and_gradients(patched or call, inputs)
    assert len(truth) == len(own) == len(fast)
    results = len(truth) - sum(t.is_floating_point() for t in inputs)
    entries = max(t.numel() for t in inputs if t.is_floating_point())
    for i, (mine, plain, true) in enumerate(zip(fast, own, truth, strict=True)):
        theirs = plain.draw(0).dtype
        assert mine.dtype == theirs, f"result {i}: dtype {mine.dtype}, the package's {theirs}"
        size = floor if i < results else GRAD_LOSS * floor / entries
        within_budget(f"result {i}" if i < results else f"gradient {i - results}", mine, plain, true, dtype, size)


def served_runs_agree(package: str, run: Callable[[], Sequence[Tensor]], rtol: float, atol: float) -> None:
    """The tensors of a run with ``package`` patched, which sslfast must serve, are close to those of one without."""
    own = run()
    with sslfast.patch(package), warnings.catch_warnings():
        warnings.filterwarnings("error", message="sslfast does not serve")
        mine = run()
    for fast, plain in zip(mine, own, strict=True):
        torch.testing.assert_close(fast, plain, rtol=rtol, atol=atol)


def left_to_package(package: str, call: Call, *inputs: Tensor, reason: str) -> None:
    """Under the patch the package's own code computes ``call`` bit for bit, and one warning gives the reason."""
    from sslfast.adapters import _serve

    own = values_and_gradients(call, inputs)
    with sslfast.patch(package):
        _serve._told.clear()
        with pytest.warns(UserWarning, match=reason):
            fast = values_and_gradients(call, inputs)
        with warnings.catch_warnings():  # said once
            warnings.filterwarnings("error", message="sslfast does not serve")
            values_and_gradients(call, inputs)
    for mine, plain in zip(fast, own, strict=True):
        assert torch.equal(mine, plain)
