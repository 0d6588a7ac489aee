"""What the benchmarks of ``sslfast.patch`` share: a package's own loss, and the same class with sslfast in it."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from sslfast import reference
from sslfast.adapters import _serve

from . import (
    Failed,
    Unavailable,
    bench_barlow_twins,
    bench_clip,
    bench_det_con,
    bench_nt_xent,
    bench_vicreg,
    contrastive,
    peers,
    redundancy,
)
from .harness import Case, Work, require_backend, work
from .machine import available_bytes

Loss = Callable[..., Tensor]
T = TypeVar("T")
TEMPERATURE = 0.5
TINY = {"N": 16, "D": 24}
# The package's own code, the formula in plain PyTorch, and the package's class with sslfast in it.
UNPATCHED, EAGER, PATCHED = "unpatched", "eager", "sslfast"


@dataclass(frozen=True)
class Theirs:
    """One loss of a package.

    Args:
        distribution: what is installed.
        module: where the package has it; ``sslfast.adapters`` has it too, under the package's name.
        name: of the class or function, in both.
        make: from the class or function and the case to a loss of ``inputs(case)``.
        inputs: leaves that learn.
        like: the benchmark of the same arithmetic, which counts operations and bytes.
        plain: the formula in plain PyTorch, where that is measured.
    """

    distribution: str
    module: str
    name: str
    make: Callable[[Any, Case], Loss]
    inputs: Callable[[Case], tuple[Tensor, ...]]
    like: ModuleType
    plain: Callable[[Case], Loss] | None = None

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    @property
    def versioned(self) -> str:
        """``lightly 1.6.0``; the name alone where it is not installed."""
        try:
            return f"{self.distribution} {importlib.metadata.version(self.distribution)}"
        except importlib.metadata.PackageNotFoundError:
            return self.distribution

    def own(self, case: Case) -> Loss:
        """What the package computes.

        Raises:
            Unavailable: it is not importable.
        """
        absent = _absent(self.module)
        if absent:
            raise Unavailable(absent)
        return self.make(getattr(importlib.import_module(self.module), self.name), case)

    def patched(self, case: Case) -> Loss:
        """What it computes after ``sslfast.patch``: the adapter's class has the very method that a patch puts in place.

        Raises:
            Unavailable: the package is not importable, or this machine lacks the kernels.
        """
        self.own(case)
        adapter = getattr(importlib.import_module(f"sslfast.adapters.{self.package}"), self.name)
        tiny = replace(case, shape={**case.shape, **TINY})
        backend = "triton" if case.device == "cuda" else "cpu"
        require_backend(lambda: self.make(adapter, tiny)(*self.inputs(tiny)), backend)
        return self.make(adapter, case)


def served(call: Callable[[], T]) -> T:
    """``call()``, in which the package's own code must not step in for sslfast's.

    Raises:
        Failed: it did.
    """
    _serve._told.clear()  # what was said once must be said again here
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="sslfast does not serve")
        try:
            return call()
        except UserWarning as left:
            raise Failed(str(left)) from left


@functools.cache
def _absent(module: str) -> str | None:
    """Why ``module`` is not importable. Asked once: of a package half of which was imported the rest may be found."""
    try:
        peers._import_torchvision()  # most of them import it
        peers._import(module)
    except Unavailable as error:
        return str(error)
    return None


def _nt_xent(criterion: Any, case: Case) -> Loss:
    return criterion(temperature=TEMPERATURE)


def _classes_of_two(criterion: Any, case: Case) -> Loss:
    """pytorch-metric-learning's call: 2N embeddings, of which each pair is a class."""
    loss = criterion(temperature=TEMPERATURE)
    labels = torch.arange(case.shape["N"], device=case.device).repeat(2)
    return lambda z0, z1: loss(torch.cat([z0, z1]), labels)


def _solo_simclr(function: Any, case: Case) -> Loss:
    """1.0.2 takes two views; later versions take one tensor of both, and the images' numbers."""
    if "indexes" not in inspect.signature(function).parameters:
        return lambda z0, z1: function(z0, z1, temperature=TEMPERATURE)
    numbers = torch.arange(case.shape["N"], device=case.device).repeat(2)
    return lambda z0, z1: function(torch.cat([z0, z1]), numbers, temperature=TEMPERATURE)


def _det_con_s(criterion: Any, case: Case) -> Loss:
    loss, masks = criterion(gather_distributed=False), bench_det_con.masks(case)
    return lambda z0, z1: loss(z0, z1, *masks)


def _det_con_b(criterion: Any, case: Case) -> Loss:
    """Targets without gradient: the other view's features, as a momentum encoder would give something like them."""
    loss, masks = criterion(gather_distributed=False), bench_det_con.masks(case)
    targets = [z.detach() for z in reversed(bench_det_con.regions(case))]
    return lambda z0, z1: loss(z0, z1, *targets, *masks)


def _defaults(criterion: Any, case: Case) -> Loss:
    return criterion()


def _itself(function: Any, case: Case) -> Loss:
    return function


def _nt_xent_plain(case: Case) -> Loss:
    return lambda z0, z1: reference.nt_xent(z0, z1, TEMPERATURE)


_two, _columns, _clip = contrastive.views, redundancy.views, bench_clip.BENCHMARK.inputs
_metric_learning = ("pytorch-metric-learning", "pytorch_metric_learning.losses")
LIGHTLY_NT_XENT = Theirs("lightly", "lightly.loss", "NTXentLoss", _nt_xent, _two, bench_nt_xent, _nt_xent_plain)
LIGHTLY_MACL = Theirs("lightly", "lightly.loss", "MACLLoss", _nt_xent, _two, bench_nt_xent)
LIGHTLY_DET_CON_S = Theirs("lightly", "lightly.loss", "DetConSLoss", _det_con_s, bench_det_con.regions, bench_det_con)
LIGHTLY_DET_CON_B = Theirs("lightly", "lightly.loss", "DetConBLoss", _det_con_b, bench_det_con.regions, bench_det_con)
LIGHTLY_VICREG = Theirs(
    "lightly", "lightly.loss", "VICRegLoss", _defaults, _columns, bench_vicreg, bench_vicreg.BENCHMARK.plain
)
LIGHTLY_BARLOW_TWINS = Theirs("lightly", "lightly.loss", "BarlowTwinsLoss", _defaults, _columns, bench_barlow_twins)
METRIC_LEARNING_NT_XENT = Theirs(*_metric_learning, "NTXentLoss", _classes_of_two, _two, bench_nt_xent)
OPEN_CLIP = Theirs("open_clip_torch", "open_clip", "ClipLoss", _defaults, _clip, bench_clip, bench_clip.BENCHMARK.plain)
SOLO_SIMCLR = Theirs("solo-learn", "solo.losses", "simclr_loss_func", _solo_simclr, _two, bench_nt_xent)
SOLO_VICREG = Theirs("solo-learn", "solo.losses", "vicreg_loss_func", _itself, _columns, bench_vicreg)
ALL = (
    *(LIGHTLY_MACL, LIGHTLY_DET_CON_S, LIGHTLY_DET_CON_B),
    *(LIGHTLY_NT_XENT, LIGHTLY_VICREG, LIGHTLY_BARLOW_TWINS, METRIC_LEARNING_NT_XENT, OPEN_CLIP),
    *(SOLO_SIMCLR, SOLO_VICREG),
)


@dataclass(frozen=True)
class Patched:
    """A benchmark of several losses of several packages.

    Args:
        op: its name.
        providers: of ``UNPATCHED``, ``EAGER`` and ``PATCHED``.
        sweep: (loss, N, D); N counts pairs.
        quick: how many of them ``--quick`` runs.
    """

    op: str
    providers: tuple[str, ...]
    sweep: Sequence[tuple[Theirs, int, int]]
    quick: int = 2

    def cases(self, device: str, quick: bool) -> list[Case]:
        """float32, forward and backward; the package's version is part of its name."""
        chosen = self.sweep[: self.quick if quick else None]
        return [
            Case(self.op, {"package": theirs.versioned, "loss": theirs.name, "N": n, "D": d}, device=device)
            for theirs, n, d in chosen
        ]

    def setup(self, case: Case, provider: str) -> Work:
        """The closure of one provider."""
        theirs = self._theirs(case)
        if provider == EAGER:
            assert theirs.plain is not None, f"{case}: no plain formula"
            loss = theirs.plain(case)
        else:
            loss = theirs.patched(case) if provider == PATCHED else theirs.own(case)
        found = work(loss, theirs.inputs(case), case.mode)
        return replace(found, proof=functools.partial(served, found)) if provider == PATCHED else found

    def truth(self, case: Case) -> tuple[Tensor, ...]:
        """What the package itself computes in float64."""
        theirs = self._theirs(case)
        exact = Case(case.op, case.shape, "float64", case.mode, case.device)
        learn = tuple(x.detach().double().requires_grad_() for x in theirs.inputs(case))
        return work(theirs.own(exact), learn, case.mode)()

    def cost(self, case: Case) -> tuple[float, float]:
        """As the operation of the same arithmetic."""
        return self._theirs(case).like.cost(case)

    def why_skip(self, case: Case, provider: str, metric: str) -> str | None:
        """Where the package is absent, or its arrays do not fit into memory."""
        absent, n = _absent(self._theirs(case).module), case.shape["N"]
        if absent:
            return absent
        if self._theirs(case) is METRIC_LEARNING_NT_XENT and provider == UNPATCHED:
            cubic = bench_nt_xent.CUBIC_ARRAYS * (2 * n) ** 2 * (2 * n - 2) * case.torch_dtype.itemsize
            if case.device == "cpu" and cubic > 0.7 * available_bytes():
                return f"its memory grows as N³, here about {cubic / 2**30:.1f} GiB, more than is free"
        return None

    def _theirs(self, case: Case) -> Theirs:
        named = (case.shape["package"].partition(" ")[0], case.shape["loss"])
        return next(theirs for theirs in ALL if (theirs.distribution, theirs.name) == named)
