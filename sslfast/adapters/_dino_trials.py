"""What the losses of DINOv2 and DINOv3 are tried out with, and what of their classes is served."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._serve import Package, adapter_class
from ._trial import Trial, random_numbers_kept, seed, tried

K = 7  # prototypes

Made = tuple[Sequence[nn.Module], Mapping[str, Trial]]


class Of(NamedTuple):
    """A class of a package.

    Args:
        name: of the class.
        arguments: of its constructor, that sslfast knows.
        made: small modules of it, and the trials of its methods.
        own: methods that stay the package's own, and why.
        beside: the class in whose module it is, where the package itself does not export it.
    """

    name: str
    arguments: tuple[str, ...]
    made: Callable[[Any], Made]
    own: Mapping[str, str] = {}
    beside: str | None = None

    def found_in(self, package: ModuleType) -> Any:
        if self.beside is None:
            return getattr(package, self.name, None)
        neighbour = getattr(package, self.beside, None)
        return None if neighbour is None else getattr(sys.modules[neighbour.__module__], self.name, None)


def contents_of(package: ModuleType, classes: Sequence[Of], origin: str, adapter: str) -> Package:
    """What :func:`sslfast.patch` replaces in ``package``, a copy of the code of ``origin``.

    Raises:
        ImportError: it has none of the classes.
    """
    if all(of.found_in(package) is None for of in classes):
        raise ImportError(f"{package.__name__} has none of {', '.join(of.name for of in classes)}")
    adapters: list[type] = []
    unchanged: dict[str, str] = {}
    with random_numbers_kept():
        seed()
        for of in classes:
            cls = of.found_in(package)
            if cls is None:
                unchanged[of.name] = f"{package.__name__} has none"
                continue
            unknown = [name for name in _arguments(cls) if name not in of.arguments]
            if unknown:
                unchanged[of.name] = f"its constructor takes {', '.join(unknown)}, and sslfast cannot know what for"
                continue
            try:
                models, trials = of.made(cls)
            except Exception as error:
                unchanged[of.name] = f"a small one could not be built: {type(error).__name__}: {error}"
                continue
            methods, left = tried(cls, models, trials, K, origin)
            unchanged |= {f"{of.name}.{name}": reason for name, reason in {**of.own, **left}.items()}
            if methods:
                adapters.append(adapter_class(cls, methods, adapter))
    return Package(tuple(adapters), unchanged=unchanged)


def named(module: str, name: str, contents: Callable[[], Package]) -> Any:
    """The adapter class of that name, as an attribute of ``module``."""
    found = {} if name.startswith("_") else {cls.__name__: cls for cls in contents().classes}
    if name not in found:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return found[name]


def _arguments(cls: Any) -> list[str]:
    """Names that the constructor takes; a class without one of its own takes none."""
    if "__init__" not in vars(cls):
        return []
    return list(inspect.signature(cls.__init__).parameters)[1:]


def logits(*shape: int, learn: bool = False) -> Tensor:
    return (0.8 * torch.randn(*shape, dtype=torch.float64)).requires_grad_(learn)


def targets(*shape: int) -> Tensor:
    return logits(*shape).mul(2).softmax(-1)


def losses_with_center(cls: Any, center: tuple[int, ...]) -> list[nn.Module]:
    """With the defaults and without, and a center that is not 0.

    Raises:
        ValueError: the center has another shape.
    """
    models = []
    for options in ((), (0.3, 0.7)):
        model = cls(K, *options).double()
        if tuple(model.center.shape) != center:
            raise ValueError(f"its center has shape {tuple(model.center.shape)}")
        model.center.copy_(logits(*center))
        models.append(model)
    return models


def masked_calls() -> list[tuple[Any, ...]]:
    """Of ``forward_masked``: six masked tokens of three images, with rows behind them, and with weights."""
    masks = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 1]]).bool()
    weights = torch.linspace(0.2, 1.2, 6)
    six, eight = (logits(6, K, learn=True), targets(6, K)), (logits(8, K, learn=True), targets(8, K))
    return [(*six, masks), (*eight, masks, 6), (*eight, masks, 6, weights), (*six, masks, None, weights)]


def patch_calls() -> list[tuple[Any, ...]]:
    """Of ``forward``: images of which one has no masked patch."""
    masks = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 1]])
    return [(logits(3, 4, K, learn=True), targets(3, 4, K), masks.to(kind)) for kind in (torch.bool, torch.float32)]
