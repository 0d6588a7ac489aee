"""Column sums over rows against prototypes: every way to make them against the formula in float64; the contracts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from helpers import DTYPES, roundings, within_budget
from sslfast import NormalizedPrototypes, reference
from sslfast.ops import prototype_columns as op
from sslfast.ops.prototype_columns import TeacherRows, numbers_to_keep, visit

pytestmark = pytest.mark.sanitize
TEMPERATURE = 0.04

# (rows, features, prototypes): aligned, ragged, prime, one of everything, more rows than a tile, one prototype, several
# blocks of prototypes.
CASES = [(64, 32, 256), (33, 20, 500), (13, 31, 257), (1, 1, 1), (401, 16, 211), (7, 5, 1), (50, 40, 700)]
CHUNKED = (500, 12, 20011)  # two chunks of tiles where nothing is kept


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def inputs_of(case: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    n, d, k = case
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return unit(n, d).to(dtype), unit(k, d).to(dtype), torch.randn(k, dtype=torch.float64).to(wide)


def formulas(h: Tensor, u: Tensor, f: Tensor, taken: Tensor | None) -> tuple[Tensor, ...]:
    """Both visits' columns, and entropies."""
    first = reference.prototype_columns(h, u, None, TEMPERATURE, taken)
    later = reference.prototype_columns(h, u, f, TEMPERATURE, taken)
    return first, later, reference.prototype_rows(h, u, f, TEMPERATURE, taken)[0]


def check(rows: TeacherRows, f: Tensor, keep: int) -> None:
    """A visit without a bias, which keeps logits, and one with it against the formula."""
    first = visit(rows, keep=keep)
    later = visit(rows, f, kept=first.kept, by_row=True)
    assert later.entropy is not None and later.best is not None and not later.column_lse.requires_grad
    wide, taken = f.dtype, rows.taken
    h = rows.teacher if taken is None else torch.where(taken[:, None], rows.teacher, 0)
    u = rows.matrix()
    right = formulas(h.double(), u.double(), f.double(), taken)
    plain = roundings(formulas, h.to(wide), u, f, taken)
    found = first.column_lse, later.column_lse, later.entropy
    for name, x, own, truth in zip(("first", "later", "entropy"), found, plain, right, strict=True):
        assert x.dtype == wide
        # Logits of up to 25, whose roundings show in the logarithms.
        within_budget(name, x, own, truth, wide, floor=1 / TEMPERATURE)
    logits = h.double() @ u.double().T / TEMPERATURE + f.double()
    counted = slice(None) if taken is None else taken
    chosen = logits[counted].gather(1, later.best[counted][:, None])[:, 0]
    torch.testing.assert_close(chosen, logits[counted].amax(1), rtol=0, atol=1e-4)
    if taken is not None:
        assert (later.best[~taken] == -1).all() and (later.entropy[~taken] == 0).all()


def whole(rows: TeacherRows) -> int:
    return op._rounded(len(rows.teacher)) * op._rounded(len(rows.prototypes))


@pytest.mark.levels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_columns_and_rows(case: tuple[int, int, int], dtype: torch.dtype) -> None:
    h, u, f = inputs_of(case, dtype)
    rows = TeacherRows.of(h, u, TEMPERATURE, None)
    for keep in (0, whole(rows) // 2, whole(rows)):
        check(rows, f, keep)


@pytest.mark.levels
@pytest.mark.parametrize("part", [0.0, 0.4, 1.0])
def test_chunks_and_logits_that_are_kept(part: float) -> None:
    h, u, f = inputs_of(CHUNKED, torch.float32)
    rows = TeacherRows.of(h, u, TEMPERATURE, None)
    check(rows, f, int(part * whole(rows)))


@pytest.mark.levels
@pytest.mark.parametrize("kept", [False, True])
def test_rows_not_taken_and_normalised_prototypes(kept: bool) -> None:
    h, u, f = inputs_of((401, 16, 211), torch.float32)
    taken = torch.rand(401) < 0.6
    h[~taken] = float("nan")
    prototypes = NormalizedPrototypes(3 * u, torch.rand(211) + 0.5)
    rows = TeacherRows.of(h, prototypes, TEMPERATURE, taken)
    check(rows, f, whole(rows) if kept else 0)
    none = visit(rows._replace(taken=torch.zeros(401, dtype=torch.bool)), f)
    assert (none.column_lse == -torch.inf).all()
    assert (visit(rows._replace(teacher=h[:0], taken=None)).column_lse == -torch.inf).all()


@pytest.mark.parametrize("backend", ["chunks", "triton", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_backends(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of the library by chunks, which is what a GPU runs; here with the sums of the C++ kernels."""
    h, u, f = inputs_of((500, 16, 300), dtype)
    if backend == "chunks":
        monkeypatch.setattr(op._backends, "serve", lambda name, *_: "cuda" if name == "prototype_columns" else "cpu")
    taken = torch.rand(500) < 0.6
    for chosen in (None, taken):
        rows = TeacherRows.of(h, NormalizedPrototypes(u), TEMPERATURE, chosen)
        for keep in (0, 300 * 200, 500 * 300, whole(rows)):
            with sslfast.use_backend(None if backend == "chunks" else backend):
                check(rows._replace(prototypes=u.to(dtype)), f, keep)


def test_chunks_compute_again_what_was_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    products = []

    class Counted:
        def __getattr__(self, name: str) -> object:
            return counted if name == "mm" else getattr(torch, name)

    def counted(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        products.append(len(a))
        return torch.mm(a, b, out=out)

    monkeypatch.setattr(op, "torch", Counted())
    h, u, f = inputs_of((500, 16, 300), torch.float32)
    rows = TeacherRows.of(h, u, TEMPERATURE, None)
    monkeypatch.setattr(op, "MOST_OF_CHUNK", 1)
    with sslfast.use_backend("triton"):
        first = visit(rows, keep=300 * 300)
        assert products == [128, 128, 128, 116]
        visit(rows, f, kept=first.kept)
        assert products[4:] == [128, 116]  # two chunks of 128 rows fit


def test_memory_is_bounded() -> None:
    """All logits where they are few; else a third of them, at most 96 MiB, and the prototypes' gradient."""

    def mebibytes(n: int, k: int, d: int) -> float:
        with torch.device("meta"):
            return numbers_to_keep(TeacherRows.of(torch.empty(n, d), torch.empty(k, d), 1.0, None)) / 2**18

    assert mebibytes(128, 65536, 256) >= 32  # DINO's: all
    assert mebibytes(1024, 65536, 256) == pytest.approx(256 / 3 + 64 - 32, abs=0.1)
    assert mebibytes(8192, 65536, 256) == 96 + 64 - 32
    assert mebibytes(100_000, 1024, 64) == pytest.approx(96 + 0.25 - 32)


@pytest.mark.parametrize("where", ["h", "u"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_values_show(where: str, value: float) -> None:
    h, u, f = inputs_of((33, 20, 500), torch.float32)
    {"h": h, "u": u}[where][3, 2] = value
    rows = TeacherRows.of(h, u, TEMPERATURE, None)
    for bias in (None, f):
        mine = visit(rows, bias).column_lse
        right = reference.prototype_columns(h, u, bias, TEMPERATURE)
        shown = mine.isfinite()  # a row's softmax with an infinite logit is NaN everywhere, as PyTorch's
        assert not shown.all() and right[shown].isfinite().all()
        torch.testing.assert_close(mine[shown], right[shown])


def test_same_bits_strides_and_opcheck() -> None:
    h, u, f = inputs_of((401, 24, 700), torch.float32)
    rows = TeacherRows.of(h, u, TEMPERATURE, None)
    strided = rows._replace(teacher=h.T.contiguous().T, prototypes=u.T.contiguous().T)
    one, two = visit(rows, f, by_row=True), visit(strided, f, by_row=True)
    assert all(torch.equal(a, b) for a, b in zip(one[:3], two[:3], strict=True) if a is not None and b is not None)
    small, v, g = inputs_of((192, 8, 192), torch.float32)
    taken = torch.rand(192) < 0.5
    for arguments in (
        (small, v, None, False, g, taken, 0.1, None, 0, True),
        (small, v, g, True, None, None, 0.1, None, 192 * 192, False),
        (small, v, g, True, g, None, 0.1, visit(TeacherRows.of(small, v, 0.1, None), keep=192 * 192).kept, 0, False),
    ):
        torch.library.opcheck(torch.ops.sslfast.prototype_columns.default, arguments)
