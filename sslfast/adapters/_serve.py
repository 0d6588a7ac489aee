"""How an adapter puts sslfast in front of a package's own method or function, and gets out of its way again."""

from __future__ import annotations

import functools
import inspect
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.modules.module as every  # its hooks are those of every module
from torch import Tensor, nn
from torch.autograd import forward_ad

from .._checks import FLOATS
from .._warn import warn_user

DEVICES = ("cpu", "cuda")
# Distributed tensors and other subclasses have rules for PyTorch's operators, and none for sslfast's.
PLAIN = (Tensor, nn.Parameter)


class Unserved(NamedTuple):
    """What the fast form of a call returns where the package's own code has to compute it."""

    reason: str


@dataclass(frozen=True)
class Package:
    """What an adapter module's ``contents()`` offers to :func:`sslfast.patch`.

    Args:
        classes: adapter classes, each a subclass of the package's class of that name; their ``served`` methods are what
            is replaced.
        functions: ``served`` functions.
        through: what else is fast, and through which of them.
        unchanged: what sslfast does not replace, and why.
    """

    classes: tuple[type, ...] = ()
    functions: tuple[Callable[..., Any], ...] = ()
    through: Mapping[str, str] = field(default_factory=dict)
    unchanged: Mapping[str, str] = field(default_factory=dict)


def served(original: Callable[..., Any], fast: Callable[..., Any], name: str | None = None) -> Callable[..., Any]:
    """``original``, computed by ``fast``; where that returns :class:`Unserved`, by ``original``, which is said once.

    Name, signature, defaults and docstring are the original's. Whatever the original raises is raised here too:
    ``fast`` returns ``Unserved`` for arguments that it does not understand, and does not judge them. ``name``: what the
    warning calls it (default: :func:`name_of`, which for an inherited method names the class that defines it).
    """

    name = name or name_of(original)
    parameters = inspect.signature(fast).parameters
    known = frozenset(parameters)
    least = sum(p.default is p.empty for p in parameters.values())
    places = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _other_derivatives():
            result = Unserved("inside torch.func or forward-mode differentiation, for which sslfast has no rules")
        elif len(args) <= places and least <= len(args) + len(kwargs) and known.issuperset(kwargs):
            result = fast(*args, **kwargs)
        else:  # too few, too many, or one that only another version of the package knows
            result = Unserved("its arguments")
        if not isinstance(result, Unserved):
            return result
        return _by_the_package(original, name, result.reason, args, kwargs)

    call.__sslfast__ = True  # type: ignore[attr-defined]
    return call


_nested = threading.local()


def _by_the_package(
    original: Callable[..., Any], name: str, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The package's own result, and a warning with the reason; none for what it calls in turn, for the same reason."""
    if torch.compiler.is_compiling() or getattr(_nested, "on", False):
        return original(*args, **kwargs)
    _nested.on = True
    try:
        result = original(*args, **kwargs)
    finally:
        _nested.on = False
    _tell(name, reason)  # after the call: an error of its own says enough
    return result


def _other_derivatives() -> bool:
    """A transform of ``torch.func``, or a level of ``torch.autograd.forward_ad``, is on: tangents would be lost."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def is_served(value: object) -> bool:
    """``value`` was made by :func:`served`."""
    return callable(value) and getattr(value, "__sslfast__", False) is True


def own_method(cls: type, name: str) -> Any:
    """The method that ``cls`` itself, not a base, defines, also while sslfast serves it; or ``None``."""
    method: Any = vars(cls).get(name)
    return method.__wrapped__ if is_served(method) else method


def parameters(function: Callable[..., Any]) -> list[tuple[str, object]]:
    """Names and defaults."""
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


def adapter_class(cls: type, methods: Mapping[str, Any], module: str) -> type:
    """A subclass of ``cls`` with these served methods, as if ``module`` had defined it."""
    return type(cls.__name__, (cls,), {"__doc__": cls.__doc__, "__module__": module, **methods})


def name_of(original: Callable[..., Any]) -> str:
    """``lightly.NTXentLoss`` of that class's ``forward``; ``solo.barlow_loss_func`` of the function."""
    name = original.__qualname__.removesuffix(".forward")
    return f"{original.__module__.partition('.')[0]}.{name}"


_told: set[tuple[str, str]] = set()


def _tell(name: str, reason: str) -> None:
    if (name, reason) in _told:
        return
    _told.add((name, reason))
    package = name.partition(".")[0]
    warn_user(f"sslfast does not serve this use of {name}: {reason}; the package's own code computes it", package)


def unserved_matrices(*matrices: object) -> Unserved | None:
    """Why these are not matrices [N, D] of one shape, dtype and device; ``None``: they are."""
    return unserved_tensors(*matrices, dim=2, same_shape=True)


def unserved_tensors(
    *tensors: object, dim: int, same_shape: bool = False, without_rows: bool = False
) -> Unserved | None:
    """Why these are not non-empty floating-point tensors of ``dim`` dimensions, one dtype and device, in order.

    ``without_rows``: they may be empty, but for the last dimension of a matrix.
    """
    first = tensors[0]
    for x in tensors:
        if not isinstance(x, Tensor) or not isinstance(first, Tensor):
            return Unserved(f"an argument is no tensor but {type(x).__name__}")
        if type(x) not in PLAIN:
            return Unserved(f"a {type(x).__name__}, a tensor of a kind of its own")
        if x.dim() != dim:
            return Unserved(f"a tensor of {x.dim()} dimensions")
        if (x.numel() == 0 and not without_rows) or (dim > 1 and x.shape[-1] == 0):
            return Unserved("an empty tensor")
        if x.layout != torch.strided:
            return Unserved("a sparse tensor")
        if x.dtype not in FLOATS:
            return Unserved(f"dtype {x.dtype}")
        if x.device.type not in DEVICES:
            return Unserved(f"device {x.device.type}")
        if x.device != first.device:
            return Unserved("tensors on several devices")
        if x.dtype != first.dtype and not torch.is_autocast_enabled(x.device.type):
            return Unserved(f"tensors of several dtypes, {first.dtype} and {x.dtype}")
        if same_shape and x.shape != first.shape:
            return Unserved("tensors of several shapes")
    return None


def overridden(instance: object, base: type, *names: str) -> Unserved | None:
    """Whether a subclass of ``base``, or the instance itself, has code of its own where the fast form would skip it.

    A served method is sslfast's own replacement and does not count.
    """
    for name in names:
        mine, theirs = getattr(type(instance), name, None), getattr(base, name, None)
        if name in vars(instance):
            return Unserved(f"an instance with a {name} of its own")
        if mine is not theirs and getattr(mine, "__wrapped__", mine) is not getattr(theirs, "__wrapped__", theirs):
            return Unserved(f"{type(instance).__name__} has a {name} of its own")
    return None


def is_number(value: object) -> bool:
    """A float or an int that is finite."""
    return isinstance(value, (float, int)) and not isinstance(value, bool) and math.isfinite(value)


def unserved_temperatures(*temperatures: object) -> Unserved | None:
    """Why these are not numbers that a kernel can divide by."""
    if all(is_number(t) and 1e-8 <= abs(t) <= 1e8 for t in temperatures):  # type: ignore[arg-type]
        return None
    return Unserved("a temperature that is no number from 1e-8 to 1e8 in size")


def is_unhooked(module: nn.Module) -> bool:
    """Calling ``module`` does no more than its ``forward``."""
    return not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or every._global_forward_pre_hooks
        or every._global_forward_hooks
        or every._global_backward_pre_hooks
        or every._global_backward_hooks
    )


def unserved_distance(distance: object, eps: object) -> Unserved | None:
    """Why KoLeo's ``distance`` is not the Euclidean one with this ``eps``, a positive number."""
    plain = type(distance) is nn.PairwiseDistance and not distance.keepdim and is_unhooked(distance)
    if not plain or distance.norm != 2:  # type: ignore[attr-defined]
        return Unserved("a distance that is not Euclidean")
    if not (is_number(eps) and eps > 0 and distance.eps == eps):  # type: ignore[operator,attr-defined]
        return Unserved("eps that is no positive number, or two of them")
    return None
