"""The operator library ``torch.ops.sslfast``.

Schemas are defined here, from Python, so that fake kernels and autograd formulas exist without any binary; the compiled
libraries and the Triton launchers only add implementations.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

LIB = torch.library.Library("sslfast", "DEF")


Function = TypeVar("Function", bound=Callable[..., Any])


def constant_to_the_compiler(function: Function) -> Function:
    """``torch.compiler.assume_constant_result``, which would import the whole compiler: 0.9 s of ``import sslfast``."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def kept_on_device(function: Function) -> Function:
    """Constants on the device that is the last argument, made once for each: a copy to a GPU would wait for it.

    Where all tensors are fake they are made anew: such a one must not stay, nor a real one get in. To a compiler they
    are constants. They are to be read only.
    """

    @functools.lru_cache(maxsize=64)
    def kept(*arguments: Any) -> Any:
        with torch.inference_mode(False):
            return function(*arguments)

    @constant_to_the_compiler
    @functools.wraps(function)
    def constants(*arguments: Any) -> Any:
        return (function if isinstance(torch.empty(0), FakeTensor) else kept)(*arguments)

    return constants  # type: ignore[return-value]


@contextlib.contextmanager
def on_the_host() -> Iterator[None]:
    """PyTorch's operators give real numbers on the CPU: where all tensors are fake, and whatever the default device."""
    with unset_fake_temporarily(), torch.inference_mode(False), torch.device("cpu"):
        yield


def towards(x: Tensor, device: torch.device | str) -> Tensor:
    """``x`` on ``device``; the copy is waited for only where the host is to read it."""
    return x.to(device, non_blocking=torch.device(device).type != "cpu")


def define(schema: str, fake: Callable[..., Any]) -> None:
    """Define ``sslfast::<schema>`` with its fake kernel (shapes, dtypes and devices, no data)."""
    LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"sslfast::{schema.split('(')[0]}", fake, lib=LIB)


def implement(name: str, function: Callable[..., Any], *dispatch_keys: str) -> None:
    """Register a Python implementation (a Triton launcher) of ``sslfast::<name>``."""
    for key in dispatch_keys:
        LIB.impl(name, function, key)


def autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Register the autograd formula of ``sslfast::<name>``."""
    torch.library.register_autograd(f"sslfast::{name}", backward, setup_context=setup_context, lib=LIB)


def second_order(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad_outputs: Tensor | Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """First derivatives that carry a graph, from the reference: reached only under ``create_graph=True``.

    They are partial derivatives, so they are taken with respect to aliases: one input may depend on another (or be it),
    and that dependence is for the outer graph to follow.
    """
    aliases = tuple(None if t is None else t.view_as(t) for t in inputs)
    wanted = [t for t, asked in zip(aliases, needed, strict=True) if asked and t is not None]
    outputs = function(*aliases)
    outs: Sequence[Tensor] = (outputs,) if isinstance(outputs, Tensor) else outputs
    given: Sequence[Tensor] = (grad_outputs,) if isinstance(grad_outputs, Tensor) else grad_outputs
    graphs = [(out, grad) for out, grad in zip(outs, given, strict=True) if out.requires_grad]  # not the constants
    outs, given = [out for out, _ in graphs], [grad for _, grad in graphs]
    grads = iter(torch.autograd.grad(outs, wanted, given, create_graph=True, materialize_grads=True))
    return tuple(next(grads) if asked else None for asked in needed)
