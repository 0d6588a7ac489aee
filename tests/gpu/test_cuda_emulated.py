"""Every CUDA operator by its own source on the CPU (``cuda_emulator``): what the CPU's kernel gives, in the same bits
whatever the order in which threads and blocks run; and that the emulator sees what it is there to see.

The sources under AddressSanitizer and ThreadSanitizer: ``make sanitize-cuda``, and the slow tests here.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import cuda_emulator
from cuda_cases import cases
from cuda_cases.case import filled_memory
from cuda_emulator import RUNS, Emulated, fault_of, operators, selftest
from cuda_emulator.rewrite import rewritten
from cuda_emulator.sanitize import reports, run_under

pytestmark = pytest.mark.skipif(cuda_emulator.compiler() is None, reason="g++, which compiles the kernels, is missing")

CASES = tuple(cases())


def test_every_operator_has_a_case() -> None:
    called = {name for case in CASES for name in case.operators}
    assert called == operators(), "registered in csrc/cuda but in no case of tests/cuda_cases, or the other way round"
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("operator", sorted({case.operators[0] for case in CASES}))
def test_as_on_the_cpu_in_every_order(operator: str) -> None:
    chosen = [case for case in CASES if case.operators[0] == operator]
    faults = {case.name: fault for case in chosen if (fault := fault_of(case)) is not None}
    assert not faults, "\n".join(f"{name}: {fault}" for name, fault in faults.items())


# ------------------------------------------------------------------------- what only a GPU gives, where the CPU raises


def test_an_id_that_is_not_allowed_gives_nan() -> None:
    ids, x = torch.tensor([[4, -1, 0, -2]]), torch.zeros(1, 4, 8)
    images = torch.zeros(1, 3, 4, 4)
    with Emulated("random", 1):
        rows = torch.ops.sslfast.gather_tokens(x, ids, None, None, None, False)[0]
        patches = torch.ops.sslfast.gather_patches(images, ids, [1, 2, 2], [], [], False, torch.float32)[0]
    for found in (rows, patches):
        assert found.isnan().all(1).tolist() == [True, False, False, True] and not found[1:3].any()


def test_a_teachers_row_that_is_not_there_gives_nan() -> None:
    operator, views = torch.ops.sslfast.distillation_cross_entropy, torch.randn(2, 1, 4, 300)
    student, teacher, bias = views[:1, 0], views[1:, 0, :3], torch.randn(1, 3, 300)
    meets = torch.tensor([2, 3, 0, -1])
    for assigned in (False, True):
        options = (None if assigned else bias, 0.3, 0.2, False, assigned, None, meets)
        with Emulated("random", 1):
            of_row, *stats = operator([student], [teacher], *options)
            given = (torch.ones(4), [student], [teacher], options[0], *stats, *options[1:])
            (gradient,) = torch.ops.sslfast.distillation_cross_entropy_backward(*given)
        for found in (of_row[:, None], gradient[0]):
            assert found.isnan().all(1).tolist() == [False, True, False, True] and found[::2].isfinite().all()


def test_ids_that_repeat_give_nan_in_every_order() -> None:
    """Of the gradient of the token that is meant twice; with no permutation, of all of an image's tokens."""
    twice, grad, images = torch.tensor([[0, 3, 3, 1], [2, 0, 1, 3]]), torch.randn(2, 4, 40), torch.randn(2, 4, 4)
    gathered, scattered = torch.ops.sslfast.gather_tokens_backward, torch.ops.sslfast.scatter_tokens_backward
    for run in RUNS:
        with Emulated(*run):
            by_token = gathered(grad, twice, 4, False, [1, 0, 0, 0])[0]
            by_row = scattered(grad, twice, 3, 0, 0, [1, 0, 0, 0])[0]
            patches = torch.ops.sslfast.scatter_patches(images, twice, [1, 1, 4, 4], [1, 2, 2], [], False)
        assert by_token.isnan().all(2).tolist() == [[False, False, False, True], [False] * 4]
        assert by_row.isnan().all(2).tolist() == [[True] * 3, [False] * 3]
        patches = patches.unflatten(4, (2, 2)).unflatten(3, (2, 2))  # [B, 1, 1, 2, 2, 2, 2]
        assert patches.isnan().all(6).all(4).flatten(1).tolist() == [[False, False, False, True], [False] * 4]


def test_a_mask_that_keeps_another_number_than_it_says() -> None:
    mask = torch.tensor([[True, False, False, False, True], [True, True, True, True, False]])
    with Emulated("random", 1):
        keep, masked, restore = torch.ops.sslfast.partition_mask(mask, 2)
        rows, weights, count = torch.ops.sslfast.masked_rows(mask, 4)
    assert keep.tolist() == [[1, 2], [4, -1]] and masked.tolist() == [[0, 4, -1], [0, 1, 2]]
    assert restore.sort().values.tolist() == [list(range(5))] * 2
    assert weights.isnan().all() and count.item() == 6  # too short a list is never a silent partial sum
    assert rows.tolist() == [0, 4, 5, 6]


# ----------------------------------------------------------------------------------------------- what the emulator sees

X = torch.arange(1.0, 257.0)  # four blocks of 64 threads


def everywhere(name: str) -> list[Tensor]:
    """A kernel of selftest.cu in every order."""
    return [selftest(name, X, *run) for run in RUNS]


@pytest.mark.parametrize("name", ["reversed", "reversed_in_dynamic"])
def test_threads_meet_at_a_barrier(name: str) -> None:
    for found in everywhere(name):
        assert torch.equal(found, X.view(4, 64).flip(1).flatten())


def test_lanes_exchange() -> None:
    x = torch.where(torch.rand(256) < 0.5, X, -X)
    lane, warp = torch.arange(256) % 32, torch.arange(256) // 32 * 32
    positive = (x > 0).float()
    expected = x[warp + (lane ^ 5)] + 2 * x[warp + 7] + 4 * x[warp + (lane - 1) * (lane > 0)]
    expected += 8 * x[warp + torch.where(lane < 30, lane + 2, lane)]
    expected += 16 * positive.view(8, 32).sum(1).repeat_interleave(32) + 512
    expected += 1024 * positive.view(4, 64).sum(1).repeat_interleave(64) + 65536
    for run in RUNS:
        assert torch.equal(selftest("exchanged", x, *run), expected)


@pytest.mark.parametrize("name", ["no_barrier", "written_again_too_soon", "blocks_share_a_place"])
def test_a_race_gives_other_bits_in_other_orders(name: str) -> None:
    first, *others = everywhere(name)
    assert not all(torch.equal(found, first) for found in others)


@pytest.mark.parametrize("name", ["unwritten_shared", "unwritten_dynamic"])
def test_shared_memory_is_new_to_each_block(name: str) -> None:
    assert all(found.isnan().all() for found in everywhere(name))


def test_a_result_left_unwritten_is_nan() -> None:
    with filled_memory():
        found = selftest("unwritten_result", X)
    assert found[-1].isnan() and torch.equal(found[:-1], X[:-1])


WAITING = {
    "barriers_apart": r"different barriers: thread \(\d+, 0, 0\) waits in __syncthreads at .*selftest\.cu:\d+, thread",
    "thread_leaves": r"different barriers: .*thread \(5, 0, 0\) has left the kernel",
    "lane_leaves": r"waits in __shfl_xor_sync at .*thread \(5, 0, 0\) has left the kernel",
    "warp_waits_for_block": r"waits in __syncwarp at .*waits in __syncthreads at",
    "part_of_a_warp": r"__shfl_xor_sync at .*, not for a whole warp",
    "too_much_shared": r"49408 bytes of shared memory are too many",
    "no_blocks": r"a launch of \(0, 1, 1\) blocks of \(64, 1, 1\) threads is not allowed",
}


@pytest.mark.parametrize("name", WAITING)
def test_what_a_gpu_would_not_run_is_an_error(name: str) -> None:
    for run in RUNS:
        with pytest.raises(RuntimeError, match=WAITING[name]):
            selftest(name, X, *run)
    assert torch.equal(selftest("reversed", X), X.view(4, 64).flip(1).flatten())  # and the next launch is well


def test_sources_stay_on_their_lines() -> None:
    text = """// a comment: kernel<<<1, 2>>>(x)
template <typename T, int kSize>
__global__ void kernel(T* x) {
  __shared__ unsigned char first[kSize][2], second;
  extern __shared__ __align__(16) uint64_t third[];
}
void launch() {
  kernel<T, (2 > 1)>
      <<<blocks(1, 2), 64, sizeof(T),
         stream>>>(f(a, b), c);
  other<<<dim3(1, 2), 32>>>();
}
SSLFAST_REGISTER(CUDA, kernel, kernel_backward)
STABLE_TORCH_LIBRARY_IMPL(sslfast, CUDA, m) { m.impl("kernel", TORCH_BOX(&launch)); }
"""
    found = rewritten(Path("a/b.cu"), text).split("\n")
    assert found[0] == '#line 1 "a/b.cu"' and len(found) == len(text.split("\n")) + 1
    whole = " ".join("\n".join(found[1:]).split())
    for part in (
        "auto& first = ::emulator::shared<unsigned char[kSize][2]>(&first_owner);",
        "auto& second = ::emulator::shared<unsigned char>(&second_owner);",
        "auto* third = ::emulator::dynamic_shared<uint64_t>();",
        "::emulator::configured(blocks(1, 2), 64, sizeof(T), stream)",
        "[&](auto&... given) { kernel<T, (2 > 1)>(given...); }, f(a, b), c)",
        "::emulator::configured(dim3(1, 2), 32), [&](auto&... given) { other(given...); } );",
        "IMPL(sslfast_emulated, CPU, m) { SSLFAST_EACH(SSLFAST_IMPL_CUDA, kernel, kernel_backward) }",
        'STABLE_TORCH_LIBRARY_IMPL(sslfast_emulated, CPU, m) { m.impl("kernel"',
    ):
        assert part in whole, whole
    assert "comment" not in whole
    with pytest.raises(ValueError, match="asm"):
        rewritten(Path("a/b.cu"), 'void f() { asm("nop;"); }')


# ------------------------------------------------------------------------------------------------ under the sanitizers

SEEN = {
    "address": {
        "past_the_end": "ERROR: AddressSanitizer: heap-buffer-overflow",
        "past_shared": "ERROR: AddressSanitizer: heap-buffer-overflow",
        "past_dynamic": "ERROR: AddressSanitizer: heap-buffer-overflow",
        "off_its_multiple": "runtime error: member access within misaligned address",
    },
    "thread": {
        name: "WARNING: ThreadSanitizer: data race"
        for name in ("no_barrier", "written_again_too_soon", "blocks_share_a_place", "exchange_for_a_barrier")
    },
}
RIGHT = ["reversed", "reversed_in_dynamic", "exchanged"]


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SEEN)
def test_a_sanitizer_sees(sanitizer: str) -> None:
    done = run_under(sanitizer, "--selftest", *RIGHT, *SEEN[sanitizer])
    assert done.returncode in (0, 66), done.stdout  # 66: ThreadSanitizer has reported something
    said = dict(part.split("\n", 1) for part in re.split("^selftest ", done.stdout, flags=re.MULTILINE)[1:])
    assert list(said) == [*RIGHT, *SEEN[sanitizer]]
    for name, text in said.items():
        expected = SEEN[sanitizer].get(name)
        found = reports(text)
        assert not found if expected is None else any(line.startswith(expected) for line in found), f"{name}: {text}"


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SEEN)
def test_no_sanitizer_reports_anything(sanitizer: str) -> None:
    done = run_under(sanitizer, "--runs=2")
    assert done.returncode == 0 and not reports(done.stdout), done.stdout
