"""The Triton kernels compiled ahead of time for GPUs that need not be here.

For every row of the configuration tables: the kernel compiles, its shared memory fits, ptxas spills nothing, on Hopper
16-bit products use ``wgmma`` alone, and no multiplication was fused into a subtraction (the kernels rely on that).
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from triton_aot import compile_all
from triton_cases import FULL, KERNELS, QUICK, WITH_PRODUCTS, Case, row_of, table_of


def check(case: Case, result: dict[str, Any]) -> None:
    from sslfast.kernels._common import SHARED_MEMORY

    kernel = KERNELS[case.kernel]
    assert "error" not in result, result["error"]
    assert result["stack"] == 0, f"ptxas spills {result['stack']} bytes: {result}"
    assert result["shared"] <= SHARED_MEMORY[case.architecture], result
    if kernel.exact and not kernel.explicit_fma:
        assert result["fused"] == 0, f"{result['fused']} fused multiply-adds: {result}"
    if kernel.table and case.architecture == 90 and case.dtype != "fp32":
        assert result["wgmma"] > 0 and result["mma_sync"] == 0, result


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


def test_every_row_of_the_tables_is_compiled() -> None:
    """A row that a change adds must come under ``test_every_configuration``."""
    from sslfast.kernels import _nt_xent_configs
    from sslfast.kernels._common import INTERPRETER, SHARED_MEMORY
    from sslfast.kernels._tiles import MERGE_ROWS

    for kernel in WITH_PRODUCTS:
        table = table_of(kernel)
        reached = {row_of(case) for case in FULL if case.kernel == kernel}
        assert {row for row in table if row[0] != INTERPRETER} == reached
        assert {row[0] for row in table} == {*SHARED_MEMORY, INTERPRETER}
    forward = _nt_xent_configs.FORWARD.values()
    assert all(config.block_m % config.block_n == config.block_m % MERGE_ROWS == 0 for config in forward)


def test_tiles_of_second_moments_are_squares() -> None:
    """Tiles below the diagonal of a symmetric matrix are left out whole, and those on it hold both sides."""
    from sslfast.kernels._second_moment_configs import GRAM

    assert all(config.block_m == config.block_n for config in GRAM.values())


def test_forward_and_backward_of_similarity_lse_round_alike() -> None:
    from sslfast.kernels._common import INTERPRETER
    from sslfast.kernels._nt_xent_configs import NARROW
    from sslfast.kernels._similarity_lse_configs import FORWARD, OWNER

    for row, forward in FORWARD.items():
        architecture, size, wide = row
        owner = OWNER[row]
        if size == 4 or architecture == INTERPRETER:
            assert forward.block_k == owner.block_k
        if architecture == INTERPRETER:
            assert (forward.block_m, forward.block_n) == (owner.block_m, owner.block_n)
        if not wide:  # one product of all features, whose other factor is the rows of the second product
            assert forward.block_k == owner.block_k == owner.block_d == NARROW[size]


def test_products_of_the_sigmoid_loss_stay_finite() -> None:
    """One logarithm for the product of block_n factors of up to 2."""
    from sslfast.kernels._similarity_lse_configs import OWNER

    assert all(config.block_n <= 64 for config in OWNER.values())
