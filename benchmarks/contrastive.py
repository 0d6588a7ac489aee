"""What the benchmarks of the contrastive family share: each is one formula in plain PyTorch beside one fused loss.

On a GPU a third form stands between them, ``chunked``: library products of a band of rows at a time. It is the truth
about large problems too, in float64, where the plain formula's matrices would not fit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast

from . import Unavailable
from .harness import Case, Work, require_backend, work
from .machine import available_bytes

Loss = Callable[..., Tensor]

# The plain formulas hold about four matrices of similarities at once; timed on a CPU while these take at most this.
MATRICES = 4
MATRIX_BYTES_TIMED = int(2.5 * 2**30)


@dataclass(frozen=True)
class Benchmark:
    """One loss: its inputs, its formula, and the arithmetic that it needs.

    ``inputs(case)`` returns the leaves that learn, from which ``plain(case)``, ``fused(case)`` and each of
    ``peers[name](case)`` make a loss; so does ``chunked(case)``, if given. ``share``: operations of forward and
    backward together in units of ``U = 2·rows·columns·D``, with nothing stored, and ``forward`` of the forward alone;
    ``pairs(shape)`` = (rows, columns). Packages in ``without_scale`` have no gradient of the inputs from the third on.
    """

    op: str
    sweep: Sequence[dict[str, int]]
    inputs: Callable[[Case], tuple[Tensor, ...]]
    plain: Callable[[Case], Loss]
    fused: Callable[[Case], Loss]
    pairs: Callable[[dict[str, int]], tuple[int, int]]
    share: float
    forward: float
    tiny: dict[str, int]
    chunked: Callable[[Case], Loss] | None = None
    without_scale: Sequence[str] = ()
    peers: Mapping[str, Callable[[Case], Loss]] = field(default_factory=dict)
    gpu_sweep: Sequence[dict[str, int]] = ()

    @property
    def providers(self) -> tuple[str, ...]:
        return (*self.peers, *(["chunked"] if self.chunked else []), "eager", "compile", "sslfast")

    def cases(self, device: str, quick: bool) -> list[Case]:
        """The sweep in float32; on a GPU in bfloat16 and float32."""
        if device == "cuda":
            return [Case(self.op, dict(s), dtype, "both", device) for dtype in ("bfloat16", "float32")
                    for s in (self.gpu_sweep or self.sweep)[-1 if quick else 0 :]]  # fmt: skip
        return [Case(self.op, dict(s), "float32", "both", device) for s in self.sweep[: 1 if quick else None]]

    def setup(self, case: Case, provider: str) -> Work:
        """The closure of one provider; ``sslfast-streamed`` and ``sslfast-banded`` force a form of the gradient."""
        if provider.startswith("sslfast"):
            small = Case(case.op, self.tiny, case.dtype, "both", case.device)
            backend = "triton" if case.device == "cuda" else "cpu"
            require_backend(lambda: self.fused(small)(*self.inputs(small)), backend)
            found = work(self.fused(case), self.inputs(case), case.mode)
            form = provider.partition("-")[2]
            return in_form(found, form) if form else found
        if provider in self.without_scale:
            found = work(self.peers[provider](case), self.inputs(case)[:2], case.mode)
            return replace(found, results={"forward": 1, "backward": 2}.get(case.mode, 3))
        if provider in self.peers:
            loss = self.peers[provider](case)
        elif provider == "chunked":
            assert self.chunked is not None
            loss = self.chunked(case)
        else:
            loss = self.plain(case)
            if provider == "compile":
                loss = torch.compile(loss, fullgraph=True, dynamic=False)
        return work(loss, self.inputs(case), case.mode)

    def truth(self, case: Case) -> tuple[Tensor, ...]:
        """The plain formula in float64 on the same inputs; the chunked form where its matrices take too much."""
        exact = replace(case, dtype="float64")
        learn = tuple(x.detach().double().requires_grad_() for x in self.inputs(case))
        rows, columns = self.pairs(case.shape)
        large = self.chunked is not None and MATRICES * 8 * rows * columns > MATRIX_BYTES_TIMED
        formula = self.chunked if large and self.chunked else self.plain
        return work(formula(exact), learn, case.mode)()

    def cost(self, case: Case) -> tuple[float, float]:
        """Operations with nothing stored; bytes: each input read and its gradient written once."""
        rows, columns = self.pairs(case.shape)
        d, passes = case.shape["D"], 1.0 if case.mode == "forward" else 2.0
        return self.units(case) * 2.0 * rows * columns * d, passes * (rows + columns) * d * case.torch_dtype.itemsize

    def units(self, case: Case) -> float:
        """Operations of the case's mode, in units of U."""
        return {"forward": self.forward, "backward": self.share - self.forward}.get(case.mode, self.share)

    def why_skip(self, case: Case, provider: str, metric: str) -> str | None:
        """Where the plain formulas' matrices do not fit, or take minutes."""
        if provider.startswith("sslfast"):
            return None
        if provider == "chunked":
            return "a baseline for GPUs" if case.device == "cpu" else None
        rows, columns = self.pairs(case.shape)
        return too_large(case, metric, rows * columns)


def too_large(case: Case, metric: str, entries: int) -> str | None:
    """Why a plain formula, whose matrices have so many entries each, is left out on a CPU."""
    stored = MATRICES * entries * case.torch_dtype.itemsize
    size = f"its matrices take about {stored / 2**30:.1f} GiB"
    if case.device == "cpu" and metric == "time_ms" and stored > MATRIX_BYTES_TIMED:
        return f"{size}; timed up to {MATRIX_BYTES_TIMED / 2**30:.1f} GiB"
    if case.device == "cpu" and stored > 0.5 * available_bytes():
        return f"{size}, more than is free"
    return None


def two_towers(op: str, **options: Any) -> Benchmark:
    """A loss of N images and their N texts, at the sizes of CLIP's trainings."""
    return Benchmark(
        op=op,
        sweep=[{"N": n, "D": d} for n, d in ((256, 512), (1024, 512), (4096, 512), (8192, 128))],
        gpu_sweep=[{"N": n, "D": d} for n, d in ((4096, 512), (32768, 512), (65536, 512), (65536, 768))],
        pairs=lambda shape: (shape["N"], shape["N"]),
        forward=1.0,
        tiny={"N": 64, "D": 32},
        **options,
    )


def in_form(found: Work, form: str) -> Work:
    """``found`` with sslfast's gradients in one form, in the forward and in the backward.

    Raises:
        Unavailable: this version of sslfast has one form alone.
    """
    use: Any = getattr(sslfast, "use_gradient_form", None)
    if use is None:
        raise Unavailable("this version of sslfast has one form of the gradient alone")

    def prepare() -> Any:
        with use(form):
            return found.prepare()

    def run(state: Any) -> tuple[Tensor, ...]:
        with use(form):
            return found.run(state)

    def in_mode(mode: str) -> Work:
        other = found.apart(mode)
        assert other is not None
        return in_form(other, form)

    return replace(found, prepare=prepare, run=run, in_mode=in_mode)


def generator() -> torch.Generator:
    """Every provider draws the same numbers."""
    return torch.Generator().manual_seed(0)


def views(case: Case) -> tuple[Tensor, Tensor]:
    """Two unit-norm views [N, D] that learn: the second is the first plus thrice the noise (cosine about 0.3).

    With closer views most softmaxes are decided, and what is left of the scale's gradient is rounding.
    """
    drawn = noisy_pair(case.shape["N"], case.shape["D"], 3.0)
    z0, z1 = (F.normalize(z, dim=1).to(case.device, case.torch_dtype).requires_grad_() for z in drawn)
    return z0, z1


@functools.lru_cache(maxsize=1)
def noisy_pair(n: int, d: int, noise: float) -> tuple[Tensor, Tensor]:
    """x and x + noise·ε, [N, D] float32 on the CPU, which takes longer to draw them than a GPU to compare them."""
    draw = generator()
    x, other = (torch.randn(n, d, generator=draw) for _ in range(2))
    return x, x + noise * other


def number(case: Case, value: float) -> Tensor:
    """A learnable scalar: float32 beside 16-bit rows."""
    kind = torch.float64 if case.dtype == "float64" else torch.float32
    return torch.tensor(value, dtype=kind, device=case.device, requires_grad=True)
