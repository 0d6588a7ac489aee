"""Cases of softmaxes over prototypes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from sslfast.ops.distillation_cross_entropy import distillation_cross_entropy as cross_entropy_of_rows
from sslfast.ops.mean_assignment import mean_assignment
from sslfast.ops.sinkhorn import assigned, bias_of, column_sums

from .case import FLOATS, Case, case, given, name_of

# Rows, positions, prototypes: several pieces, ragged tiles, one of everything, no row.
LOGITS = ((70, 1, 33), (5, 3, 300), (1, 1, 1), (0, 1, 7))


def sinkhorns() -> Iterator[Case]:
    def bias(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
        return (lambda x: bias_of(x, 0.3, 3, False)), torch.randn(shape).to(dtype)

    def started_by_rows(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
        return (lambda x, rows: bias_of(x, 0.3, 2, True, rows)), torch.randn(shape).to(dtype), torch.tensor(3)

    def sums(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
        def call(x: torch.Tensor, f: torch.Tensor, rows: torch.Tensor) -> list[torch.Tensor]:
            first = column_sums(x, None, 0.3, rows)
            return [*(first if len(x) else first[1:]), column_sums(x, f, 0.3)[1]]

        f = torch.randn(shape[1:], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        return call, torch.randn(shape).to(dtype), f, torch.tensor(4)

    def written(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
        f = torch.randn(shape[1:], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        call = lambda x, f, rows: [assigned(x, f, 0.3), assigned(x, f, 0.3, rows)]  # noqa: E731
        return call, torch.randn(shape).to(dtype), f, torch.tensor(2)

    makers = {
        "sinkhorn_bias": (bias, started_by_rows),
        "sinkhorn_sums": (sums,),
        "sinkhorn_assign": (written,),
    }
    for operator, calls in makers.items():
        for make, shape, dtype in itertools.product(calls, LOGITS, FLOATS):
            name = f"{operator}, {make.__name__.replace('_', ' ')} {shape} {name_of(dtype)}"
            yield case(name, (operator,), partial(make, shape, dtype), floor=10.0)


# Views of the student and of the teacher, rows, prototypes.
VIEWS = ((5, 2, 3, 40), (2, 2, 2, 1301), (1, 1, 1, 1), (1, 3, 4, 257), (2, 1, 0, 5))


def cross_entropies() -> Iterator[Case]:
    operators = ("distillation_cross_entropy", "distillation_cross_entropy_backward")

    def make(
        views: tuple[int, ...], dtype: torch.dtype, assigned: bool, diagonal: bool, count: bool
    ) -> tuple[Any, ...]:
        students, teachers, batch, prototypes = views
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        teacher = torch.randn(teachers, batch, prototypes)
        bias = None if assigned else torch.randn(teachers, 2, prototypes).to(wide)

        def call(student: list[torch.Tensor], teacher: torch.Tensor, bias: Any, rows: Any) -> torch.Tensor:
            return cross_entropy_of_rows(
                student, [teacher], bias, (0.3, 0.2), ignore_diagonal=diagonal, assigned=assigned, rows=rows
            )

        student = [given(1, batch, prototypes, dtype=dtype) for _ in range(students)]
        target = (teacher.softmax(-1) if assigned else teacher).to(dtype)
        return call, student, target, bias, torch.tensor(2) if count else None

    for views, dtype in itertools.product(VIEWS, FLOATS):
        for given_targets, diagonal, count in ((False, False, False), (False, True, True), (True, True, False)):
            if diagonal and views[0] == views[1] == 1:
                continue
            name = f"distillation_cross_entropy {views} {name_of(dtype)} {given_targets} {diagonal} {count}"
            yield case(name, operators, partial(make, views, dtype, given_targets, diagonal, count), floor=1.0)

    def chosen(dtype: torch.dtype, assigned: bool) -> tuple[Any, ...]:
        """Of five rows of two teachers, three rows of the students meet two, each with the bias of where it lies."""
        _, _, target, bias, _ = make((0, 2, 5, 301), dtype, assigned, False, False)

        def call(student: torch.Tensor, target: torch.Tensor, bias: Any, meets: torch.Tensor) -> torch.Tensor:
            return cross_entropy_of_rows([student], [target], bias, (0.3, 0.2), assigned=assigned, teacher_rows=meets)

        return call, given(3, 3, 301, dtype=dtype), target, bias, torch.tensor([4, 1, 4])

    for dtype, given_targets in itertools.product(FLOATS, (False, True)):
        name = f"distillation_cross_entropy, chosen rows {name_of(dtype)} {given_targets}"
        yield case(name, operators, partial(chosen, dtype, given_targets), floor=1.0)


# Rows, prototypes, targets: several pieces, ragged tiles, one of everything, no row.
ASSIGNED = ((70, 33, 7), (5, 600, 5), (1, 1, 1), (9, 257, 1), (0, 7, 1))


def assignments() -> Iterator[Case]:
    operators = ("mean_assignment", "mean_assignment_backward")

    def make(sizes: tuple[int, ...], dtype: torch.dtype, whole: bool) -> tuple[Any, ...]:
        batch, prototypes, count = sizes
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        targets = torch.randn(count, prototypes).softmax(-1).to(wide) if whole else None
        weights = torch.rand(batch).to(wide) if whole else None

        def call(x: torch.Tensor, targets: Any, weights: Any, rows: Any) -> list[torch.Tensor]:
            found = mean_assignment(x, targets, weights, 0.3, rows)
            return list(found if whole else found[:1])

        return call, given(batch, prototypes, dtype=dtype), targets, weights, None if whole else torch.tensor(3)

    for sizes, dtype, whole in itertools.product(ASSIGNED, FLOATS, (True, False)):
        name = f"mean_assignment {sizes} {name_of(dtype)} {'targets' if whole else 'rows'}"
        yield case(name, operators, partial(make, sizes, dtype, whole), floor=10.0)
