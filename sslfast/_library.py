"""The operator library ``torch.ops.sslfast``.

Schemas are defined here, from Python, so that fake kernels and autograd formulas exist without any binary; the compiled
libraries and the Triton launchers only add implementations.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.autograd import forward_ad

LIB = torch.library.Library("sslfast", "DEF")
functions: dict[str, type[torch.autograd.Function]] = {}  # of the operators with an autograd formula


Constant = TypeVar("Constant", bound=Callable[..., Any])


def constant_to_the_compiler(function: Constant) -> Constant:
    """``torch.compiler.assume_constant_result``, which would import the whole compiler: 0.9 s of ``import sslfast``."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def kept_on_device(function: Constant) -> Constant:
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


Gradients = tuple[Tensor | None, ...]  # what a backward returns: one for each of its operator's inputs


def gradients(inputs: Sequence[str], **found: Tensor | None) -> Gradients:
    """Gradients by the names of an operator's inputs, in their order; ``None`` for the inputs without one."""
    assert found.keys() <= set(inputs), (found.keys(), inputs)
    return tuple(found.get(name) for name in inputs)


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
    """Register the autograd formula of ``sslfast::<name>``: one of reverse mode, so that a tangent is an error."""

    def guarded(ctx: Any, *grads: Any) -> Any:
        refuse_tangents(name, grads)
        return with_memory_error(backward, ctx, *grads)

    lib: Any = _WithoutTangents()
    torch.library.register_autograd(f"sslfast::{name}", guarded, setup_context=setup_context, lib=lib)
    functions[name] = _function(name, guarded, setup_context)


def _function(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> type[torch.autograd.Function]:
    """The operator's autograd formula as a class, whose ``apply`` takes the operator's arguments.

    In place of arguments with a list of tensors, which autograd does not look into, it takes first the lists' lengths
    (``None`` for what is no such list) and then all tensors one by one.
    """
    operator = getattr(torch.ops.sslfast, name).default

    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            result = with_memory_error(operator, *args)
        setup_context(ctx, args, result)
        return result

    def forward_of_lists(ctx: Any, lengths: Lengths, *args: Any) -> Any:
        ctx.lengths = lengths
        return forward(ctx, *_gathered(args, lengths))

    def backward_of_lists(ctx: Any, *grads: Any) -> Any:
        needed = ctx.needs_input_grad
        ctx.needs_input_grad = _gathered(needed[1:], ctx.lengths)
        try:
            return None, *_spread(backward(ctx, *grads), ctx.lengths)
        finally:
            ctx.needs_input_grad = needed  # of the next backward through this node

    members: dict[str, Any] = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    if any(_lists_of(operator)):
        members = {"forward": staticmethod(forward_of_lists), "backward": staticmethod(backward_of_lists)}
    words = "".join(word.capitalize() for word in name.split("_"))  # autograd calls the node <words>Backward
    return type(words, (torch.autograd.Function,), members)


Lengths = tuple[int | None, ...]


@functools.cache
def _lists_of(operator: torch._ops.OpOverload) -> tuple[bool, ...]:
    """Which of its arguments are lists of tensors."""
    return tuple(str(argument.type) == "List[Tensor]" for argument in operator._schema.arguments)


def _spread(values: Sequence[Any], lengths: Lengths) -> list[Any]:
    """``values`` with the elements of its lists in their place."""
    flat: list[Any] = []
    for value, length in zip(values, lengths, strict=True):
        flat.extend((value,) if length is None else value)
    return flat


def _gathered(flat: Sequence[Any], lengths: Lengths) -> tuple[Any, ...]:
    """What :func:`_spread` undoes."""
    given = iter(flat)
    return tuple(next(given) if length is None else [next(given) for _ in range(length)] for length in lengths)


def run(name: str, *args: Any) -> Any:
    """``sslfast::<name>`` of these arguments, for operators that have a gradient.

    In eager mode, with plain tensors, the node of the graph is made here: by way of the dispatcher, which hands the
    arguments to Python and back twice, it takes 50 µs more.
    """
    operator = getattr(torch.ops.sslfast, name).default
    if torch.compiler.is_compiling() or _is_transformed():
        return operator(*args)
    lists = _lists_of(operator)
    if any(lists):
        lengths = tuple(len(x) if is_list else None for x, is_list in zip(args, lists, strict=True))
        flat: Sequence[Any] = _spread(args, lengths)
    else:
        lengths, flat = None, args
    learns = False
    for x in flat:
        if isinstance(x, Tensor):
            if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
                return operator(*args)
            learns |= x.requires_grad
    if learns and torch.is_grad_enabled():
        return functions[name].apply(*flat) if lengths is None else functions[name].apply(lengths, *flat)
    with torch._C._AutoDispatchBelowAutograd():
        return with_memory_error(operator, *args)


def _is_transformed() -> bool:
    """Whether something looks at the operators: a mode, a tracer, a transform of ``torch.func``, a tangent's level."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or in_forward_mode()
    )


def mutates(name: str, *places: int) -> None:
    """Say to autograd that ``sslfast::<name>`` writes into the tensors of these arguments, lists of tensors.

    What a graph has saved of them is then known to have changed, as by PyTorch's own in-place operators.
    """
    operator = getattr(torch.ops.sslfast, name).default

    def counted(keyset: Any, *args: Any) -> Any:
        for place in places:
            torch.autograd.graph.increment_version(args[place])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return operator.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    LIB.impl(name, counted, "ADInplaceOrView", with_keyset=True)


class _WithoutTangents:
    """``LIB`` as ``register_autograd`` uses it: PyTorch's kernel drops tangents, this one refuses them."""

    def impl(self, name: str, kernel: Callable[..., Any], dispatch_key: str, *, with_keyset: bool) -> None:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            refuse_tangents(name, (*args, *kwargs.values()))
            return with_memory_error(kernel, *args, **kwargs)

        LIB.impl(name, guarded, dispatch_key, with_keyset=with_keyset)


def with_memory_error(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(...)``, with PyTorch's class of the error that the CUDA library has words for alone: out of memory."""
    if torch.compiler.is_compiling():
        return function(*args, **kwargs)
    try:
        return function(*args, **kwargs)
    except RuntimeError as error:
        if "CUDA out of memory." in str(error) and not isinstance(error, torch.OutOfMemoryError):
            raise torch.OutOfMemoryError(str(error)) from None
        raise


def call(name: str, *args: Any) -> Any:
    """``sslfast::<name>`` of these arguments, for operators that have no gradient."""
    return with_memory_error(getattr(torch.ops.sslfast, name).default, *args)


def in_forward_mode() -> bool:
    """Whether the code runs inside ``torch.func.jvp``, ``jacfwd``, ``linearize`` or ``forward_ad.dual_level``."""
    return forward_ad._current_level >= 0


def refuse_tangents(name: str, values: Iterable[Any]) -> None:
    """An error if one of the values is a tensor with a tangent, which ``sslfast::<name>`` would lose."""
    if not in_forward_mode():
        return
    if any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in values):
        raise NotImplementedError(
            f"sslfast.{name} has no forward-mode derivative: call it inside sslfast.use_backend('reference'), "
            "or take reverse-mode derivatives"
        )


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
