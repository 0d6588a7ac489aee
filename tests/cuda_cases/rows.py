"""Cases of rows and of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sslfast
from sslfast import masking
from sslfast.ops.ema_update import ema_update
from sslfast.ops.gather_tokens import gather_tokens
from sslfast.ops.scatter_tokens import scatter_tokens

from .case import FLOATS, Case, case, given, name_of, some_ids

# A warp a row with whole packs and without, a block a row likewise, one number, no row.
ROWS = ((5, 40), (3, 37), (2, 1504), (3, 1501), (1, 1), (0, 8))


def normalized_rows() -> Iterator[Case]:
    operators = ("l2_normalize", "l2_normalize_backward")

    def make(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Any, ...]:
        x = torch.randn(shape).to(dtype)
        if shape[0] > 1:
            x[0] = 0  # its norm is below eps
        return (lambda x: torch.ops.sslfast.l2_normalize(x, 1e-6)), x.requires_grad_()

    for shape, dtype in itertools.product(ROWS, FLOATS):
        # A row of one number: the gradient is 0, a difference of equal numbers.
        yield case(f"l2_normalize {shape} {name_of(dtype)}", operators, partial(make, shape, dtype), floor=1.0)
    transposed = lambda: ((lambda x: sslfast.l2_normalize(x.mT)), given(9, 6))  # noqa: E731
    yield case("l2_normalize, transposed", operators, transposed)


def cosines() -> Iterator[Case]:
    operators = ("negative_cosine", "negative_cosine_backward")

    def make(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Any, ...]:
        p, z = (torch.randn(shape).to(dtype) for _ in range(2))
        if shape[0] > 1:
            p[0] = 0  # its norm is below eps
        return (
            (lambda p, z: torch.ops.sslfast.negative_cosine(p, z, 1e-3, -0.3, 2.0)),
            p.requires_grad_(),
            z.requires_grad_(),
        )

    for shape, dtype in itertools.product((*ROWS, (600, 3)), FLOATS):
        # One number a row: the gradient is 0, a difference of equal numbers.
        yield case(f"negative_cosine {shape} {name_of(dtype)}", operators, partial(make, shape, dtype), floor=1.0)
    one = lambda: ((lambda p, z: sslfast.negative_cosine(p, z)), given(9, 48), torch.randn(9, 48))  # noqa: E731
    yield case("negative_cosine, a target", operators, one)
    shifted = lambda: ((lambda p, z: sslfast.negative_cosine(p[:, 1:], z.mT)), given(9, 7), given(6, 9))  # noqa: E731
    yield case("negative_cosine, strides", operators, shifted)


def averages() -> Iterator[Case]:
    """Over several launches, chunks and packs; with starts that no pack fits on; the momentum a number or a tensor."""
    shapes = [(5,), (0,), (3, 7), (1,), (2, 2, 2)] * 21 + [(16384,), (33001,)]

    def make(average: torch.dtype, student: torch.dtype, copy: torch.dtype | None, tensor: bool) -> tuple[Any, ...]:
        averages, students = ([torch.randn(s).to(dtype) for s in shapes] for dtype in (average, student))
        averages.append(torch.randn(40).to(average)[1:38])
        students.append(torch.randn(40).to(student)[3:])
        momentum = torch.tensor(0.9, dtype=torch.float64) if tensor else 0.9

        def function(averages: list[Tensor], students: list[Tensor], momentum: float | Tensor) -> list[Tensor]:
            moved = [t.clone() for t in averages]
            rounded = [torch.empty_like(t, dtype=copy) for t in moved] if copy is not None else []
            ema_update(moved, students, momentum, rounded)
            return [*moved, *rounded]

        return function, averages, students, momentum

    pairs = [*itertools.product(FLOATS, FLOATS, [None]), *itertools.product([torch.float32], FLOATS[::2], FLOATS[::2])]
    for i, (average, student, copy) in enumerate(pairs):
        name = f"ema_update, {name_of(average)} of {name_of(student)}{f' to {name_of(copy)}' if copy else ''}"
        yield case(name, ("ema_update_",), partial(make, average, student, copy, i % 2 == 0))


class Tokens:
    """Arguments of one case: B images, L tokens, K of them kept, D features."""

    def __init__(self, b: int, length: int, kept: int, d: int, dtype: torch.dtype) -> None:
        self.b, self.length, self.kept, self.d, self.dtype = b, length, kept, d, dtype

    def __str__(self) -> str:
        return f"{(self.b, self.length, self.kept, self.d)} {name_of(self.dtype)}"

    def given(self, *shape: int) -> Tensor:
        return given(*shape, self.d, dtype=self.dtype)

    def ids(self, *masks: int) -> Tensor:
        return some_ids(*masks, self.b, self.kept, length=self.length)

    def restore(self) -> Tensor:
        return some_ids(self.b, self.length, length=self.length, padded=False)


def tokens() -> Iterator[Tokens]:
    for dtype in FLOATS:
        yield Tokens(3, 13, 7, 48, dtype)  # whole packs
        yield Tokens(3, 11, 5, 21, dtype)
    for dtype in (torch.float32, torch.bfloat16):
        yield Tokens(1, 1, 1, 1, dtype)
    yield Tokens(300, 2, 1, 4, torch.float32)  # several images a piece of the sums
    yield Tokens(2, 3, 2, 260, torch.float32)  # several chunks of lanes a row
    yield Tokens(0, 4, 2, 8, torch.float32)
    yield Tokens(2, 4, 0, 8, torch.float32)


def gathered_tokens() -> Iterator[Case]:
    def alone(t: Tokens) -> tuple[Any, ...]:
        return gather_tokens, t.given(t.b, t.length), t.ids()

    def several_masks(t: Tokens) -> tuple[Any, ...]:
        call = lambda x, ids, at, first: gather_tokens(x, ids, position=at, prefix=first)  # noqa: E731
        return call, t.given(t.b, t.length), t.ids(2), t.given(t.length), t.given(2)

    def packed(t: Tokens) -> tuple[Any, ...]:
        call = lambda x, ids, at, first: gather_tokens(x, ids, position=at, prefix=first, packed=True)  # noqa: E731
        return call, t.given(t.b, t.kept), t.ids(), t.given(t.length), t.given(2)

    def one_token(t: Tokens) -> tuple[Any, ...]:
        call = lambda ids, at, token: gather_tokens(None, ids, position=at, token=token)  # noqa: E731
        return call, t.ids(2), t.given(t.length), t.given()

    def strided(t: Tokens) -> tuple[Any, ...]:
        call = lambda x, ids, at: gather_tokens(x[:, 1:], ids, position=at.mT.contiguous().mT)  # noqa: E731
        return call, t.given(t.b, t.length + 1), t.ids(), t.given(t.length)

    for t, make in itertools.product(tokens(), (alone, several_masks, packed, one_token, strided)):
        name = f"gather_tokens, {make.__name__.replace('_', ' ')} {t}"
        yield case(name, ("gather_tokens", "gather_tokens_backward"), partial(make, t))


def scattered_tokens() -> Iterator[Case]:
    def alone(t: Tokens) -> tuple[Any, ...]:
        return scatter_tokens, t.given(t.b, t.kept), t.restore(), t.given()

    def placed(t: Tokens, rows: int) -> tuple[Any, ...]:
        def call(x: Tensor, restore: Tensor, token: Tensor, position: Tensor, prefix: Tensor) -> Tensor:
            return scatter_tokens(x, restore, token, position=position, prefix=prefix, passed=1)

        return call, t.given(t.b, 1 + t.kept), t.restore(), t.given(), t.given(rows), t.given(2)

    def tokens_placed(t: Tokens) -> tuple[Any, ...]:
        return placed(t, t.length)

    def all_placed(t: Tokens) -> tuple[Any, ...]:
        return placed(t, 2 + 1 + t.length)

    def replaced(t: Tokens) -> tuple[Any, ...]:
        def call(x: Tensor, mask: Tensor, token: Tensor, position: Tensor, prefix: Tensor) -> Tensor:
            return masking.replace_tokens(x, mask, token, position=position, prefix=prefix)

        mask = torch.rand(t.b, t.length) < 0.4
        return call, t.given(t.b, t.length), mask, t.given(), t.given(t.length), t.given(2)

    makers: tuple[Callable[[Tokens], tuple[Any, ...]], ...] = (alone, tokens_placed, all_placed, replaced)
    for t, make in itertools.product(tokens(), makers):
        name = f"scatter_tokens, {make.__name__.replace('_', ' ')} {t}"
        yield case(name, ("scatter_tokens", "scatter_tokens_backward"), partial(make, t))
