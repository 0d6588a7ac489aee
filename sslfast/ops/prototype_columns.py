"""Column sums of a teacher's rows against K prototypes, from features: what an iteration of Sinkhorn–Knopp needs.

    L_k = log Σ_n exp(T_nk − r_n),   T = h·uᵀ/τ,   r_n = 0, or with a bias f:  r_n = log Σ_k exp(T_nk + f_k)

Each visit of the rows is one product of N·K·D, of which a part keeps its logits from the first visit for the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _backends, _library, _native, reference
from .._checks import accumulator, without_autocast
from .sinkhorn import column_sums
from .types import NormalizedPrototypes

__all__ = ["TeacherRows", "Visit", "visit"]

BACKENDS = ("cpu", "cuda", "reference")

# Plain PyTorch holds three matrices of N × K here (logits, exponents, exponentials): an eighth is about a third of one.
# The memory of the prototypes' gradient [K, D] comes on top: the loss that follows needs it and has not taken it yet.
PART_KEPT = 3
LEAST_KEPT, MOST_KEPT = 32 << 20, 96 << 20
MOST_OF_CHUNK = 32 << 20  # of that for logits that are computed in every visit
MOST_IN_TILE = 192  # kTile of csrc/cpu/engine/tile_gemm.h
LEAST_IN_CHUNK = 128  # rows: a product of fewer leaves a GPU idle


class TeacherRows(NamedTuple):
    """Rows and prototypes as the operator takes them, without a gradient; vectors in the accumulator's dtype."""

    teacher: Tensor  # [N, D]
    prototypes: Tensor  # [K, D]
    gain: Tensor | None  # [K]
    normalize: bool
    temperature: float
    taken: Tensor | None  # [N] bool

    @classmethod
    def of(
        cls, teacher: Tensor, prototypes: Tensor | NormalizedPrototypes, temperature: float, taken: Tensor | None
    ) -> TeacherRows:
        """Of arguments that have been checked."""
        direction, gain = prototypes if isinstance(prototypes, NormalizedPrototypes) else (prototypes, None)
        gain = None if gain is None else gain.detach().reshape(-1).to(accumulator(teacher))
        normalize = isinstance(prototypes, NormalizedPrototypes)
        return cls(teacher.detach(), direction.detach(), gain, normalize, float(temperature), taken)

    @property
    def kind(self) -> torch.dtype:
        """Of what is summed."""
        return accumulator(self.teacher)

    def matrix(self) -> Tensor:
        """The prototypes [K, D] in the accumulator's dtype."""
        rows = self.prototypes.to(self.kind)
        return reference.normalized_prototypes(rows, self.gain) if self.normalize else rows


class Visit(NamedTuple):
    """``entropy`` and ``best`` [N] are of each row's softmax, where asked for; of rows not taken 0 and −1."""

    column_lse: Tensor  # [K]
    entropy: Tensor | None
    best: Tensor | None
    kept: Tensor | None  # logits for the next visit


def _fake(teacher: Tensor, prototypes: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, keep, by_row = rest
    kind, rows = accumulator(teacher), len(teacher) if by_row else 0
    return (
        teacher.new_empty(len(prototypes), dtype=kind),
        teacher.new_empty(rows, dtype=kind),
        teacher.new_empty(rows, dtype=torch.int64),
        teacher.new_empty(keep, dtype=kind),
    )


_library.define(
    "prototype_columns(Tensor teacher, Tensor prototypes, Tensor? gain, bool normalize, Tensor? bias, Tensor? taken,"
    " float temperature, Tensor? kept, int keep, bool by_row)"
    " -> (Tensor column_lse, Tensor entropy, Tensor best, Tensor kept)",
    _fake,
)


def why_not(backend: str, teacher: Tensor) -> str | None:
    """The reason ``backend`` cannot serve rows like ``teacher``, or ``None`` if it can."""
    if backend == "cpu":
        return _native.why_no_cpu(teacher.device, "teacher")
    if backend == "cuda":
        return _native.why_no_cuda(teacher.device, "teacher")
    return None  # without a CUDA kernel the sums over the library's products are plain PyTorch


def numbers_to_keep(rows: TeacherRows) -> int:
    """Of how many logits the first visit keeps memory for the later ones."""
    (n, d), k = rows.teacher.shape, len(rows.prototypes)
    size = torch.finfo(rows.kind).bits // 8
    whole = n * k * size
    budget = min(max(whole // PART_KEPT, LEAST_KEPT), MOST_KEPT) + k * d * size
    if whole <= budget:
        return _rounded(n) * _rounded(k)
    return max(budget - MOST_OF_CHUNK, 0) // size


def _rounded(rows: int) -> int:
    return (rows + MOST_IN_TILE - 1) // MOST_IN_TILE * MOST_IN_TILE


def visit(
    rows: TeacherRows, bias: Tensor | None = None, *, kept: Tensor | None = None, keep: int = 0, by_row: bool = False
) -> Visit:
    """L [K] of the rows, in float32 (float64 for float64), without a gradient.

    Args:
        bias: f [K] in that dtype; ``None``: no row's softmax is taken.
        keep: of a visit without a bias: memory for how many logits.
        kept: of a visit with a bias: what the visit without it kept.
        by_row: entropy and arg max of each row too; with a bias.
    """
    teacher = rows.teacher
    preferred = "cuda" if why_not("cuda", teacher) is None else "triton"
    backend = _backends.serve("prototype_columns", teacher, preferred, why_not)
    if backend == "cpu":
        of_rows = rows.prototypes, rows.gain, rows.normalize, bias, rows.taken, rows.temperature
        column_lse, entropy, best, logits = _library.call("prototype_columns", teacher, *of_rows, kept, keep, by_row)
        return Visit(column_lse, entropy if by_row else None, best if by_row else None, logits if keep else None)
    with without_autocast(teacher):
        if backend == "reference":
            return _by_reference(rows, bias, by_row)
        return _by_chunks(rows, bias, kept, keep, by_row, column_sums if backend == "cuda" else reference.sinkhorn_sums)


def _by_reference(rows: TeacherRows, bias: Tensor | None, by_row: bool) -> Visit:
    h, u, rest = rows.teacher.to(rows.kind), rows.matrix(), (rows.temperature, rows.taken)
    entropy, best = reference.prototype_rows(h, u, bias, *rest) if by_row and bias is not None else (None, None)
    return Visit(reference.prototype_columns(h, u, bias, *rest), entropy, best, None)


Sums = Callable[[Tensor, Tensor | None, float, Tensor | None], tuple[Tensor, Tensor]]


def _by_chunks(
    rows: TeacherRows, bias: Tensor | None, kept: Tensor | None, keep: int, by_row: bool, sums: Sums
) -> Visit:
    """The library's products, a chunk of rows at a time in one buffer, and sums over each."""
    kind = rows.kind
    h, k, size = rows.teacher, len(rows.prototypes), torch.finfo(kind).bits // 8
    u = rows.matrix().T
    n, at_once = len(h), max(MOST_OF_CHUNK // (k * size), LEAST_IN_CHUNK)
    order = count = None
    if rows.taken is not None:  # those that take part first, whose number is not read by the host
        order, count = torch.argsort((~rows.taken).to(torch.uint8), stable=True), rows.taken.sum()
        h = h[order]
    if bias is None:
        kept = h.new_empty(keep, dtype=kind)
    stored = h.new_empty(0, dtype=kind) if kept is None else kept
    whole = min(len(stored) // (k * at_once) * at_once, n) if len(stored) < n * k else n
    buffer = h.new_empty(0 if whole == n else at_once, k, dtype=kind)
    total: Tensor = h.new_full((k,), -torch.inf if bias is None else 0.0, dtype=kind)
    found = []
    for first in range(0, n, at_once):
        last = min(first + at_once, n)
        known = last <= whole
        logits = stored[first * k : last * k].view(-1, k) if known else buffer[: last - first]
        if bias is None or not known:
            torch.mm(h[first:last].to(kind), u, out=logits)
        counted = None if count is None else (count - first).clamp(0, last - first)
        largest, part = sums(logits.unsqueeze(1), None if bias is None else bias[None], rows.temperature, counted)
        total = torch.logaddexp(total, largest[0] + part[0].log()) if bias is None else total + part[0]
        if by_row and bias is not None:
            x = logits / rows.temperature + bias
            found.append((torch.special.entr(torch.softmax(x, 1)).sum(1), x.argmax(1)))
    column_lse = total if bias is None else total.log() - bias
    if not by_row:
        return Visit(column_lse, None, None, kept if bias is None else None)
    entropy, best = (torch.cat(parts) for parts in zip(*found, strict=True))
    if order is not None and rows.taken is not None:
        back = torch.argsort(order)
        entropy = torch.where(rows.taken, entropy[back], 0.0)
        best = torch.where(rows.taken, best[back], -1)
    return Visit(column_lse, entropy, best, None)
