"""DINO's and iBOT's losses from the bottleneck's features: student and prototypes learn, the teacher is given.

``V`` crops of ``B`` images of which the teacher sees two (DINO), or ``V = 1``: ``B`` masked tokens, student against
teacher row by row (iBOT). ``S`` iterations of Sinkhorn–Knopp balance the teacher; 0: DINO's centre. What is timed
begins at the last layer, which belongs to the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from sslfast.ops.prototype_columns import TeacherRows, numbers_to_keep

from .contrastive import Benchmark as Contrastive, Loss, generator
from .harness import Case

STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04
TARGETS = 2  # global crops


def _targets(case: Case) -> int:
    return min(TARGETS, case.shape["V"])


def _unit(case: Case, *shape: int) -> Tensor:
    x = F.normalize(torch.randn(*shape, generator=generator()), dim=-1)
    return x.to(case.device, case.torch_dtype)


def _inputs(case: Case) -> tuple[Tensor, Tensor]:
    v, b, k, d = (case.shape[name] for name in ("V", "B", "K", "D"))
    return _unit(case, v, b, d).requires_grad_(), _unit(case, k, d).requires_grad_()


def _teacher(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's features, prototypes and centre: the student's, a little apart."""
    v, b, k, d = (case.shape[name] for name in ("V", "B", "K", "D"))
    student, w = (x.detach() for x in _inputs(case))
    draw = generator()
    features = student[: _targets(case)] + 0.05 * torch.randn(_targets(case), b, d, generator=draw).to(student)
    prototypes = w + 0.01 * torch.randn(k, d, generator=draw).to(w)
    return F.normalize(features, dim=-1), prototypes, 0.01 * torch.randn(k, generator=draw).to(w)


def _plain(case: Case) -> Loss:
    """facebookresearch/dino's loss on logits of the last layer."""
    features, prototypes, center = _teacher(case)
    crops, targets, iterations = case.shape["V"], _targets(case), case.shape["S"]

    def assignments() -> Tensor:
        logits = F.linear(features.flatten(0, 1), prototypes)
        if iterations:
            return sinkhorn_knopp(logits, TEACHER_TEMPERATURE, iterations)
        return F.softmax((logits - center) / TEACHER_TEMPERATURE, dim=-1)

    def function(student: Tensor, w: Tensor) -> Tensor:
        student_out = (F.linear(student.flatten(0, 1), w) / STUDENT_TEMPERATURE).chunk(crops)
        with torch.no_grad():
            teacher_out = assignments().chunk(targets)
        total, terms = torch.zeros((), dtype=student.dtype, device=student.device), 0
        for t, q in enumerate(teacher_out):
            for v in range(crops):
                if v != t or crops == 1:
                    loss = torch.sum(-q * F.log_softmax(student_out[v], dim=-1), dim=-1)
                    total, terms = total + loss.mean(), terms + 1
        return total / terms

    return function


def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """facebookresearch/dinov2's on one process: assignments [N, K]."""
    q = torch.exp(logits / temperature).t()  # [K, N]
    k, n = q.shape
    q /= torch.sum(q)
    for _ in range(iterations):
        q /= torch.sum(q, dim=1, keepdim=True)
        q /= k
        q /= torch.sum(q, dim=0, keepdim=True)
        q /= n
    q *= n
    return q.t()


def _fused(case: Case) -> Loss:
    features, prototypes, center = _teacher(case)
    iterations = case.shape["S"]
    pairs = [(0, 0)] if case.shape["V"] == 1 else None

    def function(student: Tensor, w: Tensor) -> Tensor:
        if iterations:
            bias = sslfast.prototype_sinkhorn(features.flatten(0, 1), prototypes, TEACHER_TEMPERATURE, iterations)
        else:
            bias = -center / TEACHER_TEMPERATURE
        return sslfast.prototype_cross_entropy(
            student,
            features,
            w,
            prototypes,
            student_temperature=STUDENT_TEMPERATURE,
            teacher_temperature=TEACHER_TEMPERATURE,
            pairs=pairs,
            teacher_bias=bias,
        )

    return function


def _visits(case: Case) -> float:
    """Products of the teacher's rows with the prototypes that Sinkhorn makes."""
    b, k, d, iterations = (case.shape[name] for name in ("B", "K", "D", "S"))
    rows = torch.empty(_targets(case) * b, d, dtype=case.torch_dtype, device="meta")
    teacher = TeacherRows.of(rows, rows.new_empty(k, d), TEACHER_TEMPERATURE, None)
    again = 1 - min(1.0, numbers_to_keep(teacher) / (len(rows) * k))
    return 1 + (iterations - 1) * again if iterations else 0.0


class Benchmark(Contrastive):
    """Operations: three products of the student's rows with the prototypes, one of the teacher's, and Sinkhorn's."""

    def units(self, case: Case) -> float:
        """In units of the student's product."""
        teacher = (1 + _visits(case)) * _targets(case) / case.shape["V"]
        return {"forward": 1.0 + teacher, "backward": 2.0}.get(case.mode, 3.0 + teacher)


BENCHMARK = Benchmark(
    op="prototype_cross_entropy",
    sweep=[
        {"B": 64, "V": 10, "K": 65536, "D": 256, "S": 0},
        {"B": 1024, "V": 1, "K": 65536, "D": 256, "S": 0},
        {"B": 1024, "V": 1, "K": 65536, "D": 256, "S": 3},
        {"B": 64, "V": 10, "K": 4096, "D": 256, "S": 0},
        {"B": 32, "V": 10, "K": 1024, "D": 256, "S": 0},
    ],
    inputs=_inputs,
    plain=_plain,
    fused=_fused,
    pairs=lambda shape: (shape["V"] * shape["B"], shape["K"]),
    share=4.0,
    forward=2.0,
    tiny={"B": 4, "V": 3, "K": 64, "D": 16, "S": 3},
)
PROVIDERS, TINY = BENCHMARK.providers, BENCHMARK.tiny
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip
