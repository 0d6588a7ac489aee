"""The Triton kernels compiled ahead of time for GPUs that need not be here.

For every row of the configuration tables: the kernel compiles, its shared memory fits, ptxas spills nothing, on Hopper
products use ``wgmma`` alone and nothing overwrites the registers of one that runs, no multiplication was fused into a
subtraction (the kernels rely on that), and sums over lanes are the same number in each.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from triton_aot import compile_all, contracted_shuffles
from triton_cases import EVERY_LAUNCH, FULL, KERNELS, QUICK, WITH_PRODUCTS, Case, row_of, table_of

# Beside the installed one, in folders that the Makefile fills.
OTHER_TRITONS = ("3.6.0",)


def check(case: Case, result: dict[str, Any]) -> None:
    from sslfast.kernels._common import SHARED_MEMORY

    kernel = KERNELS[case.kernel]
    assert "error" not in result, result["error"]
    assert result["stack"] == 0, f"ptxas spills {result['stack']} bytes: {result}"
    assert result["shared"] <= SHARED_MEMORY[case.architecture], result
    if kernel.exact and not kernel.explicit_fma:
        assert result["fused"] == 0, f"{result['fused']} fused multiply-adds: {result}"
    assert result["contracted"] == [], result
    if kernel.exact and kernel.table and case.architecture < 100:  # whose products all take 32 bytes of a row
        assert result["depths"] == [8 if case.dtype == "fp32" else 16], result
    if kernel.table and case.architecture == 90:
        assert result["wgmma"] > 0 and result["mma_sync"] == 0, result
        assert not result["overwritten"], result


@pytest.fixture(scope="module")
def quick() -> dict[Case, dict[str, Any]]:
    return compile_all(QUICK)


@functools.cache
def compiled_for(architecture: int) -> dict[Case, dict[str, Any]]:
    return compile_all([case for case in FULL if case.architecture == architecture])


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_hopper(case: Case, quick: dict[Case, dict[str, Any]]) -> None:
    check(case, quick[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL, ids=str)
def test_every_configuration(case: Case) -> None:
    check(case, compiled_for(case.architecture)[case])


@functools.cache
def compiled_by(version: str) -> dict[Case, dict[str, Any]]:
    folder = Path(__file__).parents[2] / f"build/triton-{version}"
    if not folder.exists():
        pytest.skip(f"{folder.name} is not in {folder.parent.name}/")
    return compile_all(EVERY_LAUNCH, folder)


@pytest.mark.slow
@pytest.mark.parametrize("version", OTHER_TRITONS)
@pytest.mark.parametrize("case", EVERY_LAUNCH, ids=str)
def test_another_triton(case: Case, version: str) -> None:
    result = compiled_by(version)[case]
    check(case, result)
    assert result["triton"] == version


def test_every_row_of_the_tables_is_compiled() -> None:
    """A row that a change adds must come under ``test_every_configuration``."""
    from sslfast.kernels import _configs
    from sslfast.kernels._common import INTERPRETER, SHARED_MEMORY
    from sslfast.kernels._tiles import MERGE_ROWS

    for kernel in WITH_PRODUCTS:
        table = table_of(kernel)
        reached = {row_of(case) for case in (*QUICK, *FULL) if case.kernel == kernel}
        assert {row for row in table if row[0] != INTERPRETER} == reached
        assert {row[0] for row in table} == {*SHARED_MEMORY, INTERPRETER}
    forward = _configs.NT_XENT_FORWARD.values()
    assert all(config.block_m % config.block_n == config.block_m % MERGE_ROWS == 0 for config in forward)


def test_tiles_of_second_moments_are_squares() -> None:
    """Tiles below the diagonal of a symmetric matrix are left out whole, and those on it hold both sides."""
    from sslfast.kernels._configs import MOMENT_GRAM

    assert all(config.block_m == config.block_n for config in MOMENT_GRAM.values())


def test_forward_and_backward_round_alike() -> None:
    """A logit is one number in the forward and in the backward, though their tiles differ.

    Its products are summed by one chain of instructions, each of which adds the products of ``depths`` features to the
    sum. As far as is known, neither the rows and columns beside them in a tile change it, nor which of the two vectors
    is the left factor; so for 16 bits the number of features a step (block_k) is free. In float32 a step has three
    passes, over all its features each, so block_k has to be the same. The first two are small·big and big·small, in
    this order: of z with itself, s_ij and s_ji may differ in the last bit. The sum of a column then holds the one and
    its gradient takes the other, an error of 1e-7 where a probability is near 1, which no training notices.
    """
    from sslfast.kernels import _configs
    from sslfast.kernels._common import INTERPRETER
    from sslfast.kernels._configs import NARROW

    for row, forward in _configs.NT_XENT_FORWARD.items():
        if row[1] == 4:
            assert forward.block_k == _configs.NT_XENT_BACKWARD[row].block_k
    for row, forward in _configs.SIMILARITY_FORWARD.items():
        architecture, size, wide = row
        owner = _configs.SIMILARITY_OWNER[row]
        if size == 4 or architecture == INTERPRETER:
            assert forward.block_k == owner.block_k
        if architecture == INTERPRETER:
            assert (forward.block_m, forward.block_n) == (owner.block_m, owner.block_n)
        if not wide:  # one product of all features, whose other factor is the rows of the second product
            assert forward.block_k == owner.block_k == owner.block_d == NARROW[size]


def test_products_of_the_sigmoid_loss_stay_finite() -> None:
    """One logarithm for the product of block_n factors of up to 2."""
    from sslfast.kernels._configs import SIMILARITY_OWNER

    assert all(config.block_n <= 64 for config in SIMILARITY_OWNER.values())


SHUFFLE = """
    mul.f32     %r2, %r1, %r1;
    add.f32     %r3, %r2, %r2;
    shfl.sync.bfly.b32  %r4, %r3, 16, 31, -1;
    shfl.sync.bfly.b32  %r5|%p1, %r2, 16, 31, -1;
    mov.b32     %r6, %r5;
"""


@pytest.mark.parametrize(
    ("line", "contracted"),
    [
        ("add.f32 %r9, %r3, %r4;", False),  # the sum of two products
        ("add.f32 %r9, %r2, %r5;", True),  # one product, whose rounding ptxas may leave out
        ("add.f32 %r9, %r6, %r2;", True),
        ("@%p2 fma.rn.f32 %r9, %r1, %r1, %r5;", True),
        ("add.f32 %r8, %r4, %r3;\n fma.rn.f32 %r9, %r3, %r4, %r8;", False),
        ("add.f32 %r8, %r4, %r1;\n fma.rn.f32 %r9, %r3, %r4, %r8;", True),
        ("max.f32 %r9, %r2, %r5;", False),
    ],
)
def test_sums_over_lanes_that_round_unlike_are_found(line: str, contracted: bool) -> None:
    assert len(contracted_shuffles(SHUFFLE + "    " + line)) == contracted
