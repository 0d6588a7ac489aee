"""``sslfast.patch``: a package's own classes and functions, with sslfast's kernels in them."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .._version import __version__
from ._serve import Package, is_served


class _Known(NamedTuple):
    distribution: str | None  # whose version is checked; None: the code is not distributed as a package
    tested: tuple[str, ...]


PACKAGES: Mapping[str, _Known] = {
    "dinov2": _Known(None, ()),
    "dinov3": _Known(None, ()),
    "lightly": _Known("lightly", ("1.6.0",)),
    "mae": _Known(None, ()),
    "open_clip": _Known("open_clip_torch", ("3.3.0",)),
    "pytorch_metric_learning": _Known("pytorch-metric-learning", ("2.9.0",)),
    "sentence_transformers": _Known("sentence-transformers", ("6.2.0",)),
    "solo": _Known("solo-learn", ("1.0.2",)),
}


def _by_value(values: Mapping[str, str]) -> list[tuple[str, str]]:
    """Each value with its keys, joined."""
    return [(value, ", ".join(k for k, v in values.items() if v == value)) for value in dict.fromkeys(values.values())]


class Patch:
    """What :func:`patch` did; a context manager that takes it back when its block ends.

    Attributes:
        package: the name that was given to :func:`patch`.
        version: the package's version; empty for code that has none.
        replaced: the classes and functions that sslfast serves now, sorted.
        through: what else is fast, and through what of these.
        unchanged: what stays the package's own, and why.

    Example:
        >>> patched = sslfast.patch("lightly")
        >>> patched.package, "NTXentLoss" in patched.replaced
        ('lightly', True)
        >>> sslfast.unpatch("lightly")
    """

    def __init__(self, package: str, version: str, contents: Package) -> None:
        self.package = package
        self.version = version
        self.replaced = tuple(
            sorted([c.__name__ for c in contents.classes] + [f.__qualname__ for f in contents.functions])
        )
        self.through: Mapping[str, str] = types.MappingProxyType(dict(sorted(contents.through.items())))
        self.unchanged: Mapping[str, str] = types.MappingProxyType(dict(sorted(contents.unchanged.items())))
        self._contents = contents
        self._methods: list[tuple[type, str, Any, Any]] = []  # owner, name, original, replacement

    def __str__(self) -> str:
        lines = [f"sslfast.patch: {self.package} {self.version}".rstrip()]
        if self.replaced:
            lines.append(f"  fast: {', '.join(self.replaced)}")
        lines += [f"  fast through {of}: {names}" for of, names in _by_value(self.through)]
        lines += [f"  unchanged ({reason}): {names}" for reason, names in _by_value(self.unchanged)]
        return "\n".join(lines)

    __repr__ = __str__

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        if _active.get(self.package) is self:
            _active.pop(self.package)._undo(level=3)

    def _apply(self) -> None:
        for adapter in self._contents.classes:
            owner = adapter.__mro__[1]
            for name, value in vars(adapter).items():
                if is_served(value):
                    self._methods.append((owner, name, vars(owner).get(name), value))
                    setattr(owner, name, value)
        _rebind({function.__wrapped__: function for function in self._contents.functions})  # type: ignore[attr-defined]

    def _undo(self, level: int) -> None:
        for owner, name, original, replacement in self._methods:
            if vars(owner).get(name) is not replacement:
                warnings.warn(
                    f"sslfast.unpatch: {owner.__name__}.{name} was replaced again after sslfast.patch; it is left as "
                    "it is",
                    stacklevel=level,
                )
            elif original is None:  # it was inherited
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        _rebind({function: function.__wrapped__ for function in self._contents.functions})  # type: ignore[attr-defined]


_active: dict[str, Patch] = {}
_printed: set[str] = set()


def patch(package: str, *, allow_untested: bool = False, verbose: bool = True) -> Patch:
    """Let sslfast compute what ``package`` computes: the same classes and functions, faster and in less memory.

    The methods of the package's own classes are replaced, not the classes: names, signatures, defaults, ``isinstance``,
    pickles and ``state_dict`` stay, and instances, subclasses and imported names from before are served too. Functions
    are replaced in every loaded module that holds them under a name. What sslfast does not serve exactly, the
    package's own code computes, and a warning says so once. What was replaced and what not is printed on stderr (of
    rank 0), once in a process.

    Args:
        package: ``"lightly"``, ``"solo"``, ``"open_clip"``, ``"pytorch_metric_learning"``,
            ``"sentence_transformers"``, ``"dinov2"`` or ``"dinov3"`` (the losses of those repositories), or ``"mae"``
            (a ``MaskedAutoencoderViT`` as in facebookresearch/mae, in any loaded module).
        allow_untested: patch a version that the adapter was not tested with.
        verbose: print the list. Default true; ``print(patched)`` shows it at any time.

    Returns:
        :class:`Patch`, which lists what was replaced and what stays unchanged, and as a context manager undoes it.

    Raises:
        ValueError: ``package`` is not one of these names.
        ImportError: the package is not importable.
        RuntimeError: an untested version, without ``allow_untested``.

    A package that is patched already stays so, with a warning. The setting belongs to the process, not to the thread.

    Example:
        >>> with sslfast.patch("lightly") as patched:
        ...     "NTXentLoss" in patched.replaced
        True
    """
    known = PACKAGES.get(package) if isinstance(package, str) else None
    if known is None:
        raise ValueError(f"package={package!r} is not known to sslfast.patch; allowed: {', '.join(PACKAGES)}")
    if package in _active:
        warnings.warn(f"sslfast.patch: {package} is patched already; nothing was changed", stacklevel=2)
        here = _active[package]
        return Patch(here.package, here.version, here._contents)  # leaving its block undoes nothing
    version = _version(package, known, allow_untested)
    try:
        contents: Package = importlib.import_module(f"sslfast.adapters.{package}").contents()
    except (ImportError, AttributeError) as error:  # the latter: a version without something that is replaced
        what = f"{package} {version}".rstrip()
        raise ImportError(f"sslfast.patch: {what} is not importable, or not what the adapter knows: {error}") from error
    done = Patch(package, version, contents)
    done._apply()
    _active[package] = done
    if verbose and os.environ.get("RANK", "0") == "0" and str(done) not in _printed:
        _printed.add(str(done))
        print(done, file=sys.stderr)
    return done


def unpatch(package: str) -> None:
    """Take :func:`patch` of ``package`` back: its own code is what it was, for every instance.

    Raises:
        ValueError: ``package`` is not patched.

    Example:
        >>> patched = sslfast.patch("lightly")
        >>> sslfast.unpatch("lightly")
        >>> sslfast.unpatch("lightly")
        Traceback (most recent call last):
            ...
        ValueError: package='lightly' is not patched by sslfast; patched: none
    """
    if package not in _active:
        patched = ", ".join(_active) or "none"
        raise ValueError(f"package={package!r} is not patched by sslfast; patched: {patched}")
    _active.pop(package)._undo(level=3)


def _version(package: str, known: _Known, allow_untested: bool) -> str:
    """The version that is installed, checked; empty for code without one."""
    if known.distribution is None:
        return ""
    try:
        version = importlib.metadata.version(known.distribution)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            f"sslfast.patch: {package} is not installed (no distribution {known.distribution!r} was found)"
        ) from None
    if version not in known.tested and not allow_untested:
        raise RuntimeError(
            f"sslfast.patch: {package} {version} was not tested with sslfast {_own_version()}, which knows "
            f"{', '.join(known.tested)}; sslfast.patch({package!r}, allow_untested=True) patches it all the same: "
            "compare a few losses with and without"
        )
    return version


def _own_version() -> str:

    return __version__


def _rebind(new: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
    """Every name of a loaded module's that stands for a key of ``new`` stands for its value; one pass over them all."""
    replacements = {id(old): value for old, value in new.items()}
    for name, module in list(sys.modules.items()):
        if not isinstance(module, types.ModuleType) or name.startswith(__package__):
            continue
        for attribute, value in list(vars(module).items()):
            if id(value) in replacements:
                setattr(module, attribute, replacements[id(value)])
