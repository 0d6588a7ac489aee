"""SIGReg: the Epps–Pulley statistic of embeddings on random directions, without an array rows × slices × knots."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import _library
from ..._checks import FLOATS, accumulator, check_matrix, is_real, is_whole, without_autocast
from ..._random.key import seed_of
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...distributed.scope import Scope, Shard
from ...ops.characteristic_sums import characteristic_sums
from ...ops.unit_slices import MOST_FEATURES, unit_slices
from .._inputs import check_gather

CONVENTIONS = ("lejepa", "eb_jepa")


class Knots(NamedTuple):
    """Where the characteristic functions are compared: at multiples of ``step``, the first ``len(weight)`` of them."""

    step: float
    weight: tuple[float, ...]  # of t_k = k·step, k = 1 …: that of the quadrature times φ(t_k), 0 where there is no knot
    times_rows: bool


def knots_of(knots: int, t_max: float, convention: str) -> Knots:
    """The quadrature that the arguments of :func:`sigreg` name; both signs of t are folded into one."""
    if not is_whole(knots) or knots < 2:
        raise ValueError(f"knots must be a whole number of at least 2, got {knots!r}")
    if not is_real(t_max) or not 0 < t_max < math.inf:
        raise ValueError(f"t_max must be a positive number, got {t_max!r}")
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(map(repr, CONVENTIONS))}, got {convention!r}")
    whole = convention == "eb_jepa"  # knots on [−t_max, t_max]
    interval = (2 if whole else 1) * t_max / (knots - 1)
    # An even number of knots on both sides of 0 stands at odd multiples of half the interval.
    halves = whole and knots % 2 == 0
    step = interval / 2 if halves else interval
    last = knots - 1 if halves or not whole else (knots - 1) // 2

    def weight(k: int) -> float:
        if halves and k % 2 == 0:
            return 0.0
        return (1 if k == last else 2) * interval * math.exp(-((k * step) ** 2) / 2)

    return Knots(step, tuple(weight(k) for k in range(1, last + 1)), not whole)


@_library.kept_on_device
def _quadrature(
    step: float, weights: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """``−φ_k`` for cosines and 0 for sines [2, 1, K, 1], and the weights [K, 1]."""
    t = step * torch.arange(1, len(weights) + 1, dtype=torch.float64)
    target = torch.stack([-torch.exp(-t.square() / 2), torch.zeros_like(t)])
    weight = torch.tensor(weights, dtype=torch.float64)
    return target.view(2, 1, -1, 1).to(device, dtype), weight.view(-1, 1).to(device, dtype)


def _weighted_difference(sums: Tensor, target: Tensor, weight: Tensor, share: float) -> tuple[Tensor, Tensor]:
    difference = torch.add(target, sums, alpha=share)  # C_k − φ_k, S_k
    return difference, difference * weight


class _Statistic(torch.autograd.Function):
    """``Σ w_k ((C_k − φ_k)² + S_k²)`` of all slices and views; the weighted difference is half of its gradient."""

    @staticmethod
    def forward(sums: Tensor, target: Tensor, weight: Tensor, share: float) -> tuple[Tensor, Tensor]:
        difference, weighted = _weighted_difference(sums, target, weight, share)
        return torch.dot(difference.flatten(), weighted.flatten()), weighted

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        sums, target, weight, ctx.share = inputs
        ctx.save_for_backward(sums, target, weight, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if grad is None:
            return None, None, None, None
        sums, target, weight, weighted = ctx.saved_tensors
        if torch.is_grad_enabled() and sums.requires_grad:  # create_graph=True
            weighted = _weighted_difference(sums, target, weight, ctx.share)[1]
        return 2 * ctx.share * grad * weighted, None, None, None


def check_views(name: str, z: Tensor) -> Tensor:
    """``z`` [N, D] or [V, N, D], floating point and not empty, as [V, N, D]."""
    if isinstance(z, Tensor) and z.dim() == 3:
        if z.numel() == 0:
            raise ValueError(f"{name} must have at least one view, row and feature, got shape {tuple(z.shape)}")
        check_matrix(name, z[0])
        return z
    if isinstance(z, Tensor) and z.dim() != 2:
        raise ValueError(f"{name} must have shape [rows, features] or [views, rows, features], got {tuple(z.shape)}")
    check_matrix(name, z)
    return z.unsqueeze(0)


def check_slices(slices: Tensor, z: Tensor, name: str = "z") -> None:
    """``slices`` [D, S] are constants for the features of ``z`` [V, N, D]."""
    if not isinstance(slices, Tensor):
        raise TypeError(f"slices must be a torch.Tensor, got {type(slices).__name__}")
    if slices.dtype not in FLOATS:
        raise TypeError(f"slices must be float32, float64, bfloat16 or float16, got {slices.dtype}")
    if slices.dim() != 2 or slices.shape[0] != z.shape[2] or slices.shape[1] == 0:
        raise ValueError(
            f"slices must have shape [{z.shape[2]}, slices] for {name}'s features, got {tuple(slices.shape)}"
        )
    if slices.device != z.device:
        raise ValueError(f"slices must be on {name}'s device {z.device}, got {slices.device}")
    if slices.requires_grad:
        raise ValueError("slices must not require a gradient: directions are constants of the statistic")


def check_count(count: int, name: str = "num_vectors") -> None:
    """There is a slice."""
    if not is_whole(count) or count < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}")


def step_tensor(step: int | Tensor, device: torch.device) -> Tensor:
    """``step`` as a [] int64 on ``device``; one that is a tensor is not read."""
    if isinstance(step, Tensor):
        if step.numel() != 1 or step.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"step must be one whole number, got shape {tuple(step.shape)}, dtype {step.dtype}")
        if step.device != device and not step.is_cpu:
            raise ValueError(f"step must be on z's device {device} or on the CPU, got {step.device}")
        return step.detach().reshape(()).to(device, torch.int64, non_blocking=True)
    if not is_whole(step) or not 0 <= step < 2**63:
        raise ValueError(f"step must be a whole number from 0 to 2^63 − 1, got {step!r}")
    return torch.full((), step, dtype=torch.int64, device=device)


def slices_of(
    z: Tensor, slices: Tensor | None, step: int | Tensor, seed: int, num_vectors: int, scope: Scope
) -> Tensor:
    """[D, S] in the accumulator's dtype of ``z`` [V, N, D]: those given, or those of seed and step.

    Over ranks the step is the largest of all, so that a rank that has skipped a batch still draws the same ones.
    """
    kind = accumulator(z)
    if slices is not None:
        return slices.detach().to(kind)
    step = scope.gather(step_tensor(step, z.device).reshape(1)).amax()
    return unit_slices(step, seed, z.shape[2], num_vectors).to(kind)


class Sketch(NamedTuple):
    """The arguments of :func:`sigreg` beside embeddings and scope, checked."""

    knots: Knots
    slices: Tensor | None
    step: int | Tensor
    seed: int
    num_vectors: int

    def traits(self, z: Tensor) -> Mapping[str, bool | int | float | str]:
        """What ranks must agree on."""
        count = self.num_vectors if self.slices is None else self.slices.shape[1]
        return {
            "whether slices are given": self.slices is not None,
            "how many slices": count,
            "how many knots": len(self.knots.weight),
            "the distance of the knots": self.knots.step,
            "the seed": self.seed,
            "whether z needs a gradient": z.requires_grad and torch.is_grad_enabled(),
        }


def sketch_of(
    z: Tensor,
    slices: Tensor | None,
    step: int | Tensor,
    seed: int,
    knots: int,
    t_max: float,
    num_vectors: int,
    convention: str,
) -> Sketch:
    """The arguments of :func:`sigreg`, checked against ``z`` [V, N, D]."""
    check_count(num_vectors)
    if slices is not None:
        check_slices(slices, z)
    elif z.shape[2] > MOST_FEATURES:
        raise ValueError(f"z may have up to 2^18 features unless slices are given, got {z.shape[2]}")
    return Sketch(knots_of(knots, t_max, convention), slices, step, seed_of(seed), num_vectors)


def distance(sums: Tensor, target: Tensor, weight: Tensor, rows: int) -> Tensor:
    """``Σ w_k ((C_k − φ_k)² + S_k²)`` over everything, where C and S are ``sums`` [2, V, K, S] divided by ``rows``.

    ``target`` is −φ_k for the cosines and 0 for the sines, [2, 1, K, 1]; ``weight`` [K, 1]; both constants.
    """
    if _library.in_forward_mode():
        difference, weighted = _weighted_difference(sums, target, weight, 1 / rows)
        return (difference * weighted).sum()
    total: Tensor = _Statistic.apply(sums, target, weight, 1 / rows)[0]  # type: ignore[no-untyped-call]
    return total


def statistic(scope: Scope, shard: Shard, z: Tensor, sketch: Sketch) -> Tensor:
    """SIGReg of ``z`` [V, n, D], rows of a scope: the same number on every rank."""
    rows = shard.total
    slices = slices_of(z, sketch.slices, sketch.step, sketch.seed, sketch.num_vectors, scope)
    with without_autocast(z):
        sums = scope.total(characteristic_sums(z, slices, len(sketch.knots.weight), sketch.knots.step))
        total = distance(sums, *_quadrature(*sketch.knots[:2], accumulator(z), z.device), rows)
        scale: float = (rows if sketch.knots.times_rows else 1) / (z.shape[0] * slices.shape[1])
        return total * scale


@over_ranks()
def sigreg(
    z: Tensor,
    *,
    slices: Tensor | None = None,
    step: int | Tensor = 0,
    seed: int = 0,
    knots: int = 17,
    t_max: float = 3.0,
    num_vectors: int = 1024,
    convention: str = "lejepa",
    gather_distributed: bool = False,
) -> Tensor:
    """Distance of the embeddings' distribution from a standard normal one, on random directions.

        p_i = z_i·a,   C(t) = mean_i cos(t p_i),   S(t) = mean_i sin(t p_i),   φ(t) = exp(−t²/2)
        T_a = N ∫ φ(t) [(C(t) − φ(t))² + S(t)²] dt      over −t_max … t_max, by trapezia
        loss = mean of T_a over directions a and views

    Args:
        z: [N, D] or [V, N, D], each view a sample of its own; float32, float64, bfloat16 or float16.
        slices: [D, S] the directions a, of length 1; on every rank the same. ``None``: ``num_vectors`` random ones.
        step: a whole number, or a one-element integer tensor, best on ``z``'s device: the host does not read it. Other
            steps have other random directions. Over ranks the largest counts.
        seed: any 64 bits. The same seed and step give the same directions on every rank and device.
        knots: how many t of the quadrature (default 17), at least 2.
        t_max: the last of them (default 3).
        num_vectors: S, how many random directions (default 1024).
        convention: ``"lejepa"`` (default), as lejepa's ``SlicingUnivariateTest(EppsPulley())`` and lightly's class: the
            knots are on [0, t_max]; ``"eb_jepa"``, as its ``BCS`` (there knots=10, num_vectors=256): on
            [−t_max, t_max], and without the factor N.
        gather_distributed: of the rows of all ranks; ``False``: of this rank's alone.

    Returns:
        [] float32 (float64 for float64 inputs). Over several ranks every rank returns the global value.

    Raises:
        TypeError: z or slices are no floating-point tensors.
        ValueError: a shape or device does not fit; slices require a gradient; a number is out of its range;
            ``convention`` is neither of the two; the ranks disagree.

    Source: Balestriero and LeCun 2025, "LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics",
    section 4; Epps and Pulley 1983.

    Example:
        >>> z = torch.randn(4, 256, 64, generator=torch.Generator().manual_seed(0))
        >>> 0.5 < sslfast.sigreg(z, step=7).item() < 2.0  # Gaussian already
        True
        >>> round(sslfast.sigreg(torch.zeros(8, 2)).item(), 3)  # collapsed
        3.216
    """
    views = check_views("z", z)
    sketch = sketch_of(views, slices, step, seed, knots, t_max, num_vectors, convention)
    scope = scope_of(gather_distributed)
    shard = scope.shard(views.transpose(0, 1), sketch.traits(views))
    return statistic(scope, shard, views, sketch)


class SIGReg(nn.Module):
    """:func:`sigreg` with a counter of its steps, and the constructor of lightly 1.6.0's class.

    The counter ``global_step`` [] is a buffer, as lejepa's: it is part of the ``state_dict``, so that training goes on
    with the next directions after a restart. Every call counts, and nothing waits for the device.

    Args:
        knots, t_max, num_vectors, gather_distributed, seed, convention: as :func:`sigreg`.

    Shapes:
        ``proj``: [..., N, D], every matrix a sample of its own; output: [].

    Raises:
        As :func:`sigreg`.

    Example:
        >>> criterion = sslfast.SIGReg(num_vectors=256)
        >>> loss = criterion(torch.zeros(8, 2))
        >>> criterion.global_step.item()
        1
    """

    global_step: Tensor

    def __init__(
        self,
        *,
        knots: int = 17,
        t_max: float = 3.0,
        num_vectors: int = 1024,
        gather_distributed: bool = False,
        seed: int = 0,
        convention: str = "lejepa",
    ) -> None:
        super().__init__()
        check_gather(gather_distributed)
        knots_of(knots, t_max, convention)
        check_count(num_vectors)
        self.knots = knots
        self.t_max = t_max
        self.num_vectors = num_vectors
        self.gather_distributed = gather_distributed
        self.seed = seed_of(seed)
        self.convention = convention
        self.register_buffer("global_step", torch.zeros((), dtype=torch.int64))

    def options(self) -> dict[str, Any]:
        """The keyword arguments of :func:`sigreg` for the present step."""
        return {
            "step": self.global_step,
            "seed": self.seed,
            "knots": self.knots,
            "t_max": self.t_max,
            "num_vectors": self.num_vectors,
            "convention": self.convention,
            "gather_distributed": self.gather_distributed,
        }

    def forward(self, proj: Tensor) -> Tensor:
        """The statistic of ``proj`` [..., N, D]."""
        views = proj.flatten(0, -3) if isinstance(proj, Tensor) and proj.dim() > 3 else proj
        loss = sigreg(views, **self.options())
        self.advance()
        return loss

    def advance(self) -> None:
        """The next call draws other directions."""
        with torch.no_grad():
            self.global_step.add_(1)

    def extra_repr(self) -> str:
        return (
            f"knots={self.knots}, t_max={self.t_max}, num_vectors={self.num_vectors}, "
            f"gather_distributed={self.gather_distributed}, seed={self.seed}, convention={self.convention!r}"
        )
