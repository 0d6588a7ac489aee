"""Other packages' implementations as plain functions; a package that is absent raises ``Unavailable``."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import Unavailable

# Provider names that are distributions; their rows carry the version.
PEERS = ("lightly", "pytorch-metric-learning", "memeff")

_kept: list[torch.library.Library] = []  # a Library that is collected takes its operators with it


def label(provider: str) -> str:
    """The provider's name in the CSV: ``lightly`` becomes ``lightly-1.6.0``."""
    return f"{provider}-{importlib.metadata.version(provider)}" if provider in PEERS else provider


def nt_xent(provider: str, temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """NT-Xent of two views ([N, D] each) as ``provider`` computes it, mean over the 2N rows.

    Raises:
        Unavailable: the package, or what it needs, is not importable.
        ValueError: ``provider`` is not one of ``PEERS``.
    """
    builders = dict(zip(PEERS, (_lightly_nt_xent, _metric_learning_nt_xent, _memeff_nt_xent), strict=True))
    if provider not in builders:
        raise ValueError(f"provider={provider!r} has no NT-Xent; allowed: {', '.join(PEERS)}")
    return builders[provider](temperature)


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{module.partition('.')[0]} is not importable: {error}") from error


def _import_torchvision() -> None:
    """Import torchvision, also a wheel that was built against another torch than the one beside it.

    Such a wheel's library does not load, and the import then ends at the fake kernels that it registers for two of its
    operators. Declaring these two first is enough: a loss calls neither.
    """
    try:
        importlib.import_module("torchvision")
        return
    except ImportError as error:
        raise Unavailable(f"lightly needs torchvision: {error}") from error
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)
    importlib.import_module("torchvision")


def lightly_loss(module: str, name: str, **options: float) -> Callable[..., Tensor]:
    """``lightly.loss.<module>.<name>(**options)``.

    Raises:
        Unavailable: lightly, or the torchvision that it needs, is not importable.
    """
    _import("lightly")
    _import_torchvision()  # through lightly.loss.__init__, whatever loss one asks for
    return getattr(_import(f"lightly.loss.{module}"), name)(**options)


def _lightly_nt_xent(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lightly_loss("ntx_ent_loss", "NTXentLoss", temperature=temperature)


def _metric_learning_nt_xent(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    loss = _import("pytorch_metric_learning.losses").NTXentLoss(temperature=temperature)

    def function(z0: Tensor, z1: Tensor) -> Tensor:
        # Each image is a class of two: its loss leaves other positives out of the denominator, and here there are none.
        return loss(torch.cat([z0, z1]), torch.arange(len(z0), device=z0.device).repeat(2))

    return function


def _memeff_nt_xent(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """memeff has no NT-Xent, but its query-document loss with query-query negatives is NT-Xent's mean over one view.

    ``margin=2`` switches its mask for false negatives off; ``stable=False`` makes its gradient that of the value.
    """
    if not torch.cuda.is_available():
        raise Unavailable("memeff runs on a CUDA GPU only")
    os.environ.setdefault("MEMEFF_INPUT_PRECISION", "ieee")  # its default for float32 is TF32: not the same work
    memeff = _import("memeff")
    loss = memeff.MemoryEfficientQwen3Loss(temperature, margin=2.0, use_qq_negatives=True, stable=False)
    return lambda z0, z1: 0.5 * (loss(z0, z1) + loss(z1, z0))
