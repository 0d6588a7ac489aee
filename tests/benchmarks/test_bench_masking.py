"""The benchmarks of masking on tiny problems: each side computes the published function, of all that is given."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sslfast
from bench_common import MACHINE, NO_TIME, PEAKS
from benchmarks import (
    bench_block_mask,
    bench_embed_patches,
    bench_gather_patches,
    bench_gather_tokens,
    bench_mask_tokens,
    bench_masked_feature_loss,
    bench_masked_patch_loss,
    bench_scatter_tokens,
    equality,
    harness,
    masking,
    memory,
    plot,
    runner,
)

BENCHES = (
    bench_embed_patches,
    bench_gather_patches,
    bench_gather_tokens,
    bench_masked_feature_loss,
    bench_masked_patch_loss,
    bench_scatter_tokens,
)
LEARNED = (bench_gather_tokens, bench_scatter_tokens)
PLACES = [*((bench, {}) for bench in BENCHES), *((bench, {"learned": 1}) for bench in LEARNED)]


def name(value: object) -> str | None:
    return value.__name__.partition("bench_")[2] if isinstance(value, ModuleType) else None


def tiny(bench: ModuleType, **sizes: int) -> harness.Case:
    return harness.Case(bench.BENCHMARK.op, {**bench.TINY, **sizes}, mode=bench.BENCHMARK.mode)


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The benchmarks' own part does not depend on what is built here."""
    for module in (masking, bench_block_mask, bench_mask_tokens):
        monkeypatch.setattr(module, "require_backend", lambda call, name: call())
    with sslfast.use_backend("reference"):
        yield


# ------------------------------------------------------------------------------------------------- equality before time


@pytest.mark.parametrize(("bench", "sizes"), PLACES, ids=name)
def test_both_sides_compute_the_published_function(bench: ModuleType, sizes: dict[str, int]) -> None:
    case = tiny(bench, **sizes)
    truth = bench.truth(case)
    assert all(result.dtype == torch.float64 and result.isfinite().all() for result in truth)
    for provider in (bench.BENCHMARK.own, "sslfast"):
        assert bench.why_skip(case, provider, "time_ms") is None
        work = bench.setup(case, provider)
        # Twice what a timing asks: tiny problems average out less.
        allowed = 2 * (work.tolerance or equality.AGREEMENT["float32"])
        assert equality.disagreement(work(), truth) < allowed, provider


@pytest.mark.parametrize(("bench", "sizes"), PLACES, ids=name)
def test_whatever_sslfast_leaves_out_is_seen(bench: ModuleType, sizes: dict[str, int]) -> None:
    """Each input and each mask counts: with any of them reversed on our side alone, the case is not timed."""
    case, benchmark = tiny(bench, **sizes), bench.BENCHMARK
    truth, problem = bench.truth(case), benchmark.problem(case)
    constants = {"mean", "std"}  # which our side takes as numbers
    for key in {*problem.given} - constants:
        given = {**problem.given, key: reverse(problem.given[key])}
        got = benchmark._work(benchmark.fused(case), replace(problem, given=given))()
        assert equality.disagreement(got, truth) > 1e-3, key
    for index in range(len(problem.learn)):
        learn = [masking.leaf(reverse(x)) if i == index else x for i, x in enumerate(problem.learn)]
        got = benchmark._work(benchmark.fused(case), replace(problem, learn=tuple(learn)))()
        assert equality.disagreement(got, truth) > 1e-3, index


@pytest.mark.parametrize("bench", BENCHES, ids=name)
def test_forward_and_backward_apart_are_the_parts_of_both(bench: ModuleType) -> None:
    for provider in (bench.BENCHMARK.own, "sslfast"):
        work = bench.setup(tiny(bench), provider)
        parts = [result for mode in ("forward", "backward") for result in work.apart(mode)()]
        assert all(torch.equal(a, b) for a, b in zip(work(), parts, strict=True))


def reverse(x: torch.Tensor) -> torch.Tensor:
    return x.flip(tuple(range(x.dim())))


def test_a_wrong_provider_is_an_error_and_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "peak_mib", lambda case, provider: 1.5)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(harness, "MIN_ROUNDS", 1)

    def run(benchmark: masking.Benchmark) -> runner.Report:
        for member in ("setup", "truth", "cost", "why_skip"):
            monkeypatch.setattr(bench_scatter_tokens, member, getattr(benchmark, member))
        made = runner.Runner(MACHINE, PEAKS, NO_TIME)
        made.run_case(bench_scatter_tokens, tiny(bench_scatter_tokens))
        return made.report

    right = bench_scatter_tokens.BENCHMARK

    def wrong(case: harness.Case) -> masking.Function:
        return lambda given, x, token: right.fused(case)(given, x, 1.001 * token)

    report = run(right)
    assert not report.errors
    timed = {row["provider"]: row for row in report.rows if row["metric"] == "time_ms"}
    assert set(timed) == {"mae", "compile", "sslfast"}  # the speed-up is over the better of the first two
    assert 1.0 in (float(timed[name]["speedup_over_best_of_eager_compile"]) for name in ("mae", "compile"))
    report = run(replace(right, fused=wrong))
    assert len(report.errors) == 1 and "sslfast" in report.errors[0] and "differ" in report.errors[0]
    assert {row["provider"] for row in report.rows if row["metric"] == "time_ms"} == {"mae", "compile"}


# ------------------------------------------------------------------------------------------------ masks that are drawn

BLOCKS = harness.Case("block_mask", bench_block_mask.TINY, "bool", harness.CALL)
SPREAD = replace(BLOCKS, shape={**BLOCKS.shape, "masked": 98, "least": 4, "spread": 1})
WORDS = harness.Case("mask_tokens", bench_mask_tokens.TINY, "int64", harness.CALL)
DRAWN = [
    (bench_block_mask, BLOCKS, "beit"),
    (bench_block_mask, BLOCKS, "sslfast"),
    (bench_block_mask, SPREAD, "dinov2"),
    (bench_block_mask, SPREAD, "sslfast"),
    (bench_mask_tokens, WORDS, "transformers"),
    (bench_mask_tokens, WORDS, "sslfast"),
]


@pytest.mark.parametrize(("bench", "case", "provider"), DRAWN, ids=lambda value: name(value) or str(value))
def test_what_is_drawn_is_as_frequent_as_it_should_be(bench: ModuleType, case: harness.Case, provider: str) -> None:
    assert bench.why_skip(case, provider, "time_ms") is None
    work, torch_state, python_state = bench.setup(case, provider), torch.get_rng_state(), random.getstate()
    assert equality.disagreement(work.proof(), bench.truth(case)) <= work.tolerance
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    first, second = work(), work()
    assert [x.shape for x in first] == [x.shape for x in second]
    assert not torch.equal(first[0], second[0])  # every run draws anew


def test_each_generator_is_measured_in_its_own_recipe() -> None:
    assert bench_block_mask.why_skip(BLOCKS, "dinov2", "time_ms") and bench_block_mask.why_skip(SPREAD, "beit", "x")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda masks: np.roll(masks, 1, 1),  # one row off
        lambda masks: np.roll(masks, 1, 2),
        lambda masks: masks & (np.arange(14) < 13),  # never in the last column
        lambda masks: masks & (np.arange(196).reshape(14, 14) % 4 > 0),  # a quarter less
    ],
)
def test_blocks_elsewhere_are_not_taken_for_equal(wrong: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_block_mask.beit_masks
    monkeypatch.setattr(bench_block_mask, "beit_masks", lambda *arguments: wrong(right(*arguments)))
    work = bench_block_mask.setup(BLOCKS, "beit")
    assert equality.disagreement(work.proof(), bench_block_mask.truth(BLOCKS)) > work.tolerance


def _specials_too(inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    inputs[0, 0], labels[0, 0] = bench_mask_tokens.MASK_ID, inputs[0, 0]
    return inputs, labels


@pytest.mark.parametrize(
    "wrong",
    [
        _specials_too,
        lambda inputs, labels: (inputs, labels.roll(1, 1)),
        lambda inputs, labels: (inputs.where(labels < 0, bench_mask_tokens.MASK_ID), labels),  # nothing but masks
        lambda inputs, labels: (inputs, torch.full_like(labels, -100)),
    ],
)
def test_words_masked_otherwise_are_not_taken_for_equal(wrong: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_mask_tokens.hf_mask_tokens
    monkeypatch.setattr(bench_mask_tokens, "hf_mask_tokens", lambda *arguments: wrong(*right(*arguments)))
    work = bench_mask_tokens.setup(WORDS, "transformers")
    assert equality.disagreement(work.proof(), bench_mask_tokens.truth(WORDS)) > work.tolerance


# --------------------------------------------------------------------------------------------------------------- cases


@pytest.mark.parametrize("length", [1, 11, 196, 197])
def test_the_ratio_keeps_what_the_case_says(length: int) -> None:
    for kept in range(1, length + 1):
        case = harness.Case("gather_tokens", {"L": length, "K": kept})
        assert int(length * (1 - masking.ratio(case))) == kept


def test_noise_has_no_ties_and_both_sides_keep_the_same() -> None:
    case = harness.Case("gather_tokens", {"B": 64, "L": 196, "K": 49, "D": 8, "learned": 0})
    noise = masking.noise(case)
    assert all(len(row.unique()) == 196 for row in noise)
    keep, restore, mask = masking.shuffle(case)
    made = masking.masks(case)(noise)
    assert torch.equal(made.ids_keep, keep) and torch.equal(made.ids_restore, restore)
    assert torch.equal(made.mask.float(), mask) and mask.sum(1).eq(147).all()


def test_the_operations_counted_are_the_published_ones_of_kept_patches() -> None:
    case = tiny(bench_embed_patches, K=9)  # all of them
    with FlopCounterMode(display=False) as counter:
        bench_embed_patches.setup(case, "mae")()
    assert bench_embed_patches.cost(case)[0] == counter.get_total_flops()
    assert bench_embed_patches.cost(tiny(bench_embed_patches, K=3))[0] == counter.get_total_flops() / 3


def test_the_bytes_counted_are_those_of_the_tensors() -> None:
    def size(*shapes: tuple[int, ...]) -> float:
        return 4.0 * sum(torch.Size(shape).numel() for shape in shapes)

    b, length, d, k = 3, 11, 20, 4
    kept, all_of_them = (b, 1 + k, d), (b, 1 + length, d)
    assert bench_scatter_tokens.cost(tiny(bench_scatter_tokens)) == (0, 2 * size(kept, all_of_them))
    expected = size((b, k, d), kept, kept, (b, length, d))
    assert bench_gather_tokens.cost(tiny(bench_gather_tokens)) == (0, expected)
    masked, whole = (2, 9 - 4, 768), (2, 9, 768)
    expected = size(*[masked] * 4, whole)
    assert bench_masked_patch_loss.cost(tiny(bench_masked_patch_loss)) == (0, expected)
    assert bench_masked_feature_loss.cost(tiny(bench_masked_feature_loss)) == (0, size(*[(2, b, k, d)] * 5))
    assert bench_gather_patches.cost(tiny(bench_gather_patches)) == (0, size((2, 4, 768)) * 5 / 4)


@pytest.mark.parametrize("bench", BENCHES, ids=name)
def test_a_gpu_runs_the_same_cases_in_batches_of_256(bench: ModuleType) -> None:
    cpu, gpu = (bench.cases(device, False) for device in ("cpu", "cuda"))
    assert {case.dtype for case in gpu} == {"bfloat16"} and {case.dtype for case in cpu} == {"float32"}
    assert [case.shape for case in gpu] == [{**case.shape, "B": 256} for case in cpu]


# -------------------------------------------------------------------------------------------------------------- tables


def rows(op: str, shape: dict[str, int], mode: str, times: dict[str, tuple[float, float]]) -> list[harness.Row]:
    """Rows of (milliseconds, ratio to the best baseline) by provider."""
    made, case = runner.Runner(MACHINE, PEAKS, NO_TIME), harness.Case(op, shape, mode=mode)
    for provider, (time, ratio) in times.items():
        made.report.rows.append(made._row(case, provider, "time_ms", [time] * 3, 0.25, ratio))
        made.report.rows.append(made._row(case, provider, "peak_mib", [time], None, None))
    return [{key: str(value) for key, value in row.items()} for row in made.report.rows]


def test_the_table_says_how_much_faster_than_the_published_code() -> None:
    shape = bench_scatter_tokens.TINY
    made = rows("scatter_tokens", shape, "both", {"mae": (80, 0.5), "compile": (40, 1.0), "sslfast": (10, 4.0)})
    text = plot.markdown("scatter_tokens", made)
    names = (
        "MAE as published [ms] | torch.compile [ms] | sslfast [ms] | speed-up | over MAE as published | share of bound"
    )
    assert f"| {' | '.join(shape)} | {names} |" in text
    assert "| 80 (80–80) | 40 (40–40) | 10 (10–10) | 4.0× | 8.0× | 25% | 40 | 10 |" in text
    assert "speed-up over the best of the others" in text and "forward and backward" in text


def test_one_published_baseline_needs_no_second_column() -> None:
    made = rows("block_mask", {"images": 8}, harness.CALL, {"beit": (80, 1.0), "sslfast": (1, 80.0)})
    text = plot.markdown("block_mask", made)
    assert "| images | BEiT as published [ms] | sslfast [ms] | speed-up | share of bound |" in text
    assert "| 8 | 80 (80–80) | 1 (1–1) | 80.0× | 25% | 80 | 1 |" in text
    assert "one call" in text and "a second" not in text


def test_the_sweep_over_the_kept_patches_makes_a_picture() -> None:
    made = []
    for case in bench_embed_patches.cases("cpu", False):
        made += [{"shape": json.dumps(case.shape), "op": case.op}]
    found = plot.sweep(made)
    assert found is not None and found[0] == "K" and len(found[2]) >= plot.MIN_POINTS
