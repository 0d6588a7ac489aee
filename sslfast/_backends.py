"""Which implementation serves a call: ``cpu``, ``cuda``, ``triton`` or ``reference``.

The choice is made once per call from the tensors' device. ``SSLFAST_BACKEND`` (read at import) or
``with sslfast.use_backend(...)`` forces it; a forced backend that cannot serve is an error, an unforced one that is
missing falls back to ``reference``, which computes the same function, and says so once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import _library
from ._warn import warn_user

NAMES = ("cpu", "cuda", "triton", "reference")
GRADIENT_FORMS = ("streamed", "banded")


def _checked(name: str | None, source: str, what: str = "a backend", allowed: tuple[str, ...] = NAMES) -> str | None:
    if name is not None and name not in allowed:
        raise ValueError(f"{source}={name!r} is not {what}; allowed: {', '.join(allowed)}")
    return name


def _checked_form(name: str | None, source: str) -> str | None:
    return _checked(name, source, "a form of the gradient", GRADIENT_FORMS)


_forced: str | None = _checked(os.environ.get("SSLFAST_BACKEND") or None, "SSLFAST_BACKEND")
_forced_form: str | None = _checked_form(os.environ.get("SSLFAST_GRADIENT_FORM") or None, "SSLFAST_GRADIENT_FORM")
_told: set[tuple[str, str]] = set()


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one backend inside the block; ``None`` restores the automatic choice.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"triton"``, ``"reference"`` or ``None``.

    The setting belongs to the process, not to the thread.

    Raises:
        ValueError: ``name`` is none of these.

    Example:
        >>> with sslfast.use_backend("reference"):
        ...     loss = sslfast.nt_xent(torch.eye(4), torch.eye(4))
        >>> round(loss.item(), 4)
        0.5944
    """
    global _forced
    before = _forced
    _forced = _checked(name, "name")
    try:
        yield
    finally:
        _forced = before


@contextlib.contextmanager
def use_gradient_form(name: str | None) -> Iterator[None]:
    """Force one way to make a GPU's gradients over all pairs inside the block; ``None`` restores the automatic choice.

    The two forms are the same function; ``SSLFAST_GRADIENT_FORM`` (read at import) forces one as well. The choice is a
    cost model's, by width and dtype: see *Two forms of the gradient* in ``docs/similarity_lse.md``.

    Args:
        name: ``"streamed"`` (tiles of weights are recomputed for every gradient; nothing of size rows × columns is ever
            stored), ``"banded"`` (the weights of a band of rows are formed once, in at most 256 MiB or one block of
            rows, and multiplied by the library), or ``None``.

    The setting belongs to the process, not to the thread, and counts when a gradient is computed: in ``backward`` for
    the softmax losses, in the forward for the pairwise sigmoid loss and for :func:`sslfast.prototype_cross_entropy`.

    Raises:
        ValueError: ``name`` is none of these.

    Example:
        >>> z = torch.eye(4, requires_grad=True)
        >>> with sslfast.use_gradient_form("banded"):
        ...     sslfast.nt_xent(z, z.detach()).backward()
        >>> z.grad.shape
        torch.Size([4, 4])
    """
    global _forced_form
    before = _forced_form
    _forced_form = _checked_form(name, "name")
    try:
        yield
    finally:
        _forced_form = before


def forced_gradient_form() -> str | None:
    return _forced_form


def select(op: str, preferred: str, why_not: Callable[[str], str | None]) -> str:
    """The backend for one call of ``op``.

    Args:
        op: the operation's name, for messages.
        preferred: the backend that the tensors' device and dtype call for.
        why_not: maps a backend's name to the reason it cannot serve this call, or ``None`` if it can.

    Raises:
        RuntimeError: the forced backend cannot serve this call.
    """
    if _forced is not None:
        reason = None if _forced == "reference" else why_not(_forced)
        if reason is not None:
            raise RuntimeError(f"sslfast.{op}: backend {_forced!r} was forced but cannot serve this call: {reason}")
        return _forced
    if op in _library.functions and _library.in_forward_mode():
        return "reference"  # the kernels have derivatives of reverse mode alone
    reason = why_not(preferred)
    if reason is None:
        return preferred
    tell_fallback(op, preferred, reason)
    return "reference"


def serve(op: str, x: Tensor, gpu: str, why_not: Callable[[str, Tensor], str | None]) -> str:
    """:func:`select` for the device of ``x``: ``gpu`` ("cuda" or "triton") on a GPU, else "cpu"."""
    return select(op, gpu if x.device.type == "cuda" else "cpu", lambda name: why_not(name, x))


def tell_fallback(op: str, preferred: str, reason: str) -> None:
    """Warn, once for each operation and reason, that the reference serves in place of ``preferred``."""
    if torch.compiler.is_compiling() or (op, reason) in _told:
        return
    _told.add((op, reason))
    warn_user(
        f"sslfast.{op}: backend {preferred!r} cannot serve this call ({reason}); "
        "using 'reference', which computes the same function in plain PyTorch"
    )
