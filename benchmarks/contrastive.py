"""What the benchmarks of the contrastive family share: each is one formula in plain PyTorch beside one fused loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

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
    ``peers[name](case)`` make a loss. ``share``: operations of forward and backward together in units of
    ``U = 2·rows·columns·D``, with nothing stored; ``pairs(shape)`` = (rows, columns).
    """

    op: str
    sweep: Sequence[dict[str, int]]
    inputs: Callable[[Case], tuple[Tensor, ...]]
    plain: Callable[[Case], Loss]
    fused: Callable[[Case], Loss]
    pairs: Callable[[dict[str, int]], tuple[int, int]]
    share: float
    tiny: dict[str, int]
    peers: Mapping[str, Callable[[Case], Loss]] = field(default_factory=dict)
    gpu_sweep: Sequence[dict[str, int]] = ()

    @property
    def providers(self) -> tuple[str, ...]:
        return (*self.peers, "eager", "compile", "sslfast")

    def cases(self, device: str, quick: bool) -> list[Case]:
        """The sweep in float32; on a GPU in bfloat16 and float32."""
        if device == "cuda":
            return [Case(self.op, dict(s), dtype, "both", device) for dtype in ("bfloat16", "float32")
                    for s in (self.gpu_sweep or self.sweep)[-1 if quick else 0 :]]  # fmt: skip
        return [Case(self.op, dict(s), "float32", "both", device) for s in self.sweep[: 1 if quick else None]]

    def setup(self, case: Case, provider: str) -> Work:
        """The closure of one provider."""
        if provider == "sslfast":
            small = Case(case.op, self.tiny, case.dtype, "both", case.device)
            backend = "triton" if case.device == "cuda" else "cpu"
            require_backend(lambda: self.fused(small)(*self.inputs(small)), backend)
            loss = self.fused(case)
        elif provider in self.peers:
            loss = self.peers[provider](case)
        else:
            loss = self.plain(case)
            if provider == "compile":
                loss = torch.compile(loss, fullgraph=True, dynamic=False)
        return work(loss, self.inputs(case), case.mode)

    def truth(self, case: Case) -> tuple[Tensor, ...]:
        """The plain formula in float64 on the same inputs."""
        exact = Case(case.op, case.shape, "float64", case.mode, case.device)
        learn = tuple(x.detach().double().requires_grad_() for x in self.inputs(case))
        return work(self.plain(exact), learn, case.mode)()

    def cost(self, case: Case) -> tuple[float, float]:
        """Operations with nothing stored; bytes: each input read and its gradient written once."""
        rows, columns = self.pairs(case.shape)
        d = case.shape["D"]
        return self.share * 2.0 * rows * columns * d, 2.0 * (rows + columns) * d * case.torch_dtype.itemsize

    def why_skip(self, case: Case, provider: str, metric: str) -> str | None:
        """Where the plain formulas' matrices do not fit, or take minutes."""
        if provider == "sslfast":
            return None
        rows, columns = self.pairs(case.shape)
        stored = MATRICES * rows * columns * case.torch_dtype.itemsize
        size = f"its matrices take about {stored / 2**30:.1f} GiB"
        if case.device == "cpu" and metric == "time_ms" and stored > MATRIX_BYTES_TIMED:
            return f"{size}; timed up to {MATRIX_BYTES_TIMED / 2**30:.1f} GiB"
        if case.device == "cpu" and stored > 0.5 * available_bytes():
            return f"{size}, more than is free"
        return None


def generator() -> torch.Generator:
    """Every provider draws the same numbers."""
    return torch.Generator().manual_seed(0)


def views(case: Case) -> tuple[Tensor, Tensor]:
    """Two unit-norm views [N, D] that learn: the second is the first plus thrice the noise (cosine about 0.3).

    With closer views most softmaxes are decided, and what is left of the scale's gradient is rounding.
    """
    draw = generator()
    x, noise = (torch.randn(case.shape["N"], case.shape["D"], generator=draw) for _ in range(2))
    pair = (F.normalize(z, dim=1).to(case.device, case.torch_dtype) for z in (x, x + 3 * noise))
    z0, z1 = (z.requires_grad_() for z in pair)
    return z0, z1


def number(case: Case, value: float) -> Tensor:
    """A learnable scalar: float32 beside 16-bit rows."""
    kind = torch.float64 if case.dtype == "float64" else torch.float32
    return torch.tensor(value, dtype=kind, device=case.device, requires_grad=True)
