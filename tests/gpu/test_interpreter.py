"""The strict interpreter: each way in which a launch can depend on an order is an error, and nothing else is."""

from __future__ import annotations

import importlib.util
from random import Random

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("the kernels run on the GPU, not in the interpreter", allow_module_level=True)

import triton
import triton.language as tl

import sslfast
from interpreter import Launch, Race

PROGRAMS, BLOCK = 5, 8


@triton.jit
def copy_kernel(X, Y, N, READ: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    """Program p reads block p + READ and writes block p·WRITE."""
    program, lanes = tl.program_id(0), tl.arange(0, BLOCK)
    source = (program + READ) * BLOCK + lanes
    target = program * WRITE * BLOCK + lanes
    x = tl.load(X + source, mask=source < N, other=0.0)
    tl.store(Y + target, x, mask=target < N)


@triton.jit
def one_address_kernel(Y, LANES: tl.constexpr):
    lanes = tl.arange(0, LANES)
    tl.store(Y + lanes // 2, lanes.to(tl.float32))


@triton.jit
def write_and_read_kernel(Y, Z, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(Y + lanes, lanes.to(tl.float32))
    tl.store(Z + lanes, tl.load(Y + BLOCK - 1 - lanes))


@triton.jit
def add_kernel(Y):
    tl.atomic_add(Y, 1.0)


@triton.jit
def number_kernel(Y):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at = (x * tl.num_programs(1) + y) * tl.num_programs(2) + z
    tl.store(Y + at, at.to(tl.float32))


def copy(x: Tensor, y: Tensor, read: int = 0, write: int = 1) -> None:
    copy_kernel[(PROGRAMS,)](x, y, len(y), READ=read, WRITE=write, BLOCK=BLOCK)


def test_programs_that_share_nothing() -> None:
    """Ragged at the end; a launch may read what an earlier one has written."""
    x = torch.randn(PROGRAMS * BLOCK - 3)
    y, z = torch.zeros_like(x), torch.zeros_like(x)
    copy(x, y)
    copy(y, z)
    torch.testing.assert_close(z, x, rtol=0, atol=0)


def test_each_program_runs_once() -> None:
    y = torch.full((24,), -1.0)
    number_kernel[(2, 3, 4)](y)
    torch.testing.assert_close(y, torch.arange(24.0))


def test_the_order_is_random_and_by_the_seed() -> None:
    def order(seed: int) -> list[tuple[int, int, int]]:
        launch = Launch("kernel")
        launch.start((3, 5, 2), Random(seed))
        return [launch.next_program() for _ in range(30)]

    everything = [(x, y, z) for x in range(3) for y in range(5) for z in range(2)]
    assert sorted(order(0)) == everything and order(0) != everything
    assert order(0) == order(0) and order(0) != order(1)


def test_an_address_written_by_two_programs() -> None:
    with pytest.raises(Race, match=r"copy_kernel\[5, 1, 1\]: programs \d and \d write one address"):
        copy(torch.ones(PROGRAMS * BLOCK), torch.zeros(PROGRAMS * BLOCK), write=0)


def test_an_address_read_by_one_program_and_written_by_another() -> None:
    x = torch.zeros(PROGRAMS * BLOCK)
    copy(x, x)  # each its own
    with pytest.raises(Race, match=r"program \d reads what program \d writes"):
        copy(x, x, read=1)


def test_an_address_written_twice_by_one_store() -> None:
    with pytest.raises(Race, match="program 0 writes one address twice in one store"):
        one_address_kernel[(1,)](torch.zeros(8), LANES=8)


def test_an_address_written_and_then_read_by_one_program() -> None:
    with pytest.raises(Race, match="program 0 reads what it has written"):
        write_and_read_kernel[(1,)](torch.zeros(8), torch.zeros(8), BLOCK=8)


def test_atomics_of_two_programs() -> None:
    add_kernel[(1,)](torch.zeros(1))
    with pytest.raises(Race, match=r"programs \d and \d write one address"):
        add_kernel[(2,)](torch.zeros(1))


def test_fresh_memory_is_nan_where_triton_is_used() -> None:
    z = torch.randn(4, 8)
    assert not torch.are_deterministic_algorithms_enabled()
    with sslfast.use_backend("triton"):
        sslfast.nt_xent(z, z)
    x = torch.zeros(3)
    for fresh in (torch.empty(3), x.new_empty(3), torch.empty_like(x), torch.empty_strided((3,), (2,))):
        assert fresh.isnan().all()


def test_errors_of_a_kernel_stay_what_they_are() -> None:
    with pytest.raises(Exception, match="out of bounds|nothing") as error:
        failing_kernel[(1,)](torch.zeros(1))
    assert not isinstance(error.value, Race)


@triton.jit
def failing_kernel(Y):
    tl.static_assert(False, "nothing")
