"""The benchmark of augmentation on tiny problems: what is timed on each side is the same function."""

from __future__ import annotations

import json
import types
from dataclasses import replace

import pytest
import torch

import sslfast
from bench_common import MACHINE, NO_TIME, PEAKS
from benchmarks import (
    Unavailable,
    augmentation,
    bench_augment_views as bench,
    equality,
    harness,
    memory,
    peers,
    plot,
    rows,
    runner,
)
from sslfast.augment import IMAGENET_MEAN, IMAGENET_STD, ViewSpec

SIZES = {"images": 4, "batch": 4, "source": 56, "size": 40, "views": 1, "threads": 1, "pil": 0}
# (provider, a case it is measured in); DINO's local views are 24 pixels wide where its global ones are 56.
PLACES = [
    ("torchvision", {"batch": 1}),
    ("torchvision", {"batch": 1, "size": 56, "views": 4}),
    ("pillow", {"batch": 1, "pil": 1}),
    ("kornia", {}),
    ("kornia", {"size": 32}),
]


def tiny(**sizes: int) -> harness.Case:
    return harness.Case("augment_views", {**SIZES, **sizes}, mode=harness.CALL)


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> object:
    """The benchmark's own part does not depend on what is built here."""
    monkeypatch.setattr(bench, "require_backend", lambda call, name: call())
    with sslfast.use_backend("reference"):
        yield


def available(provider: str) -> None:
    try:
        peers.kornia_pipeline(ViewSpec(8)) if provider == "kornia" else peers.torchvision_v2()
    except Unavailable as reason:
        pytest.skip(str(reason))


# ------------------------------------------------------------------------------------------------- equality before time


@pytest.mark.parametrize(("provider", "sizes"), [*PLACES, *(("sslfast", sizes) for _, sizes in PLACES)])
def test_what_each_provider_proves(provider: str, sizes: dict[str, int]) -> None:
    available(provider)
    case = tiny(**sizes)
    assert bench.why_skip(case, provider, "time_ms") is None
    work, truth = bench.setup(case, provider), bench.truth(case)
    assert len(truth) == case.shape["views"] and all(view.dtype == torch.float64 for view in truth)
    # sslfast's own is that of float32, which the kernel keeps and PyTorch's interpolation does not.
    assert equality.disagreement(work.proof(), truth) <= (work.tolerance or bench.ROUNDED)


# Column and what is added: flip (not kornia's: its crop and flip are the reference's), saturation, hue, grey, blur.
CHANGES = [(4, 1.0), (7, 0.5), (8, -0.2), (13, 1.0), (14, 1.5)]


@pytest.mark.parametrize(
    ("provider", "sizes", "column", "change"),
    [(*place, *change) for place in PLACES for change in CHANGES if place[0] != "kornia" or change[0] != 4],
)
def test_a_step_done_otherwise_is_not_taken_for_equal(
    provider: str, sizes: dict[str, int], column: int, change: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    available(provider)
    case = tiny(**sizes)
    truth, table = bench.truth(case), bench.choices(case, 4).table.clone()
    table[0, :, column] = 1 - table[0, :, column] if column in (4, 13) else table[0, :, column] + change
    monkeypatch.setattr(bench, "choices", lambda case, count: types.SimpleNamespace(table=table))
    work = bench.setup(case, provider)
    assert equality.disagreement(work.proof(), truth) > work.tolerance


FIXED = ViewSpec(40, scale=(1, 1), ratio=(1, 1), flip_p=1, mean=IMAGENET_MEAN, std=IMAGENET_STD)
STEPS = [
    {"brightness": (1.4, 1.4)},
    {"contrast": (0.6, 0.6)},
    {"saturation": (1.7, 1.7)},
    {"hue": (0.2, 0.2)},
    {"grey_p": 1},
    {"blur_p": 1, "blur_kernel": 9, "sigma": (1.5, 1.5)},
    {"solarize_p": 1},
    {"brightness": (1.4, 1.4), "jitter_p": 0, "flip_p": 0},
]


@pytest.mark.parametrize(
    ("provider", "step"),
    # No view measured beside kornia is solarized: its own solarize is another function.
    [(p, s) for p in ("torchvision", "pillow", "kornia") for s in STEPS if p != "kornia" or "solarize_p" not in s],
)
def test_the_timed_pipelines_do_each_step_of_the_spec(
    provider: str, step: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is left to chance, the pipeline that is timed gives what the reference gives."""
    available(provider)
    spec = replace(FIXED, **step, semantics="pil" if provider == "pillow" else "torchvision")
    kornia = provider == "kornia"  # which does not antialias: a view of the source's own size
    case = tiny(source=40 if kornia else 56, pil=int(provider == "pillow"), batch=4 if kornia else 1)
    monkeypatch.setattr(augmentation, "views", lambda case: [spec])
    monkeypatch.setattr(bench, "views", lambda case: [spec])
    work = bench.setup(case, provider)
    (made,) = work()
    truth = bench.truth(case)[0] if kornia else bench.truth(case)[0][-1]
    assert equality.disagreement([made], [truth]) <= 4e-2


# --------------------------------------------------------------------------------------------------- what a run is like


@pytest.mark.parametrize(("provider", "sizes"), [*PLACES, ("sslfast", {}), ("sslfast", {"batch": 1, "pil": 1})])
def test_every_run_draws_anew_on_the_threads_of_the_case(
    provider: str, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    available(provider)
    case = tiny(**sizes, threads=3)
    seen, before = [], torch.get_num_threads()
    spy = augmentation.torch.set_num_threads
    monkeypatch.setattr(augmentation.torch, "set_num_threads", lambda n: (seen.append(n), spy(n)))
    work = bench.setup(case, provider)
    first, second = work(), work()
    assert seen == [3, before] * 2 and torch.get_num_threads() == before
    assert len(first) == case.shape["views"]
    for a, b, spec in zip(first, second, bench.views(case), strict=True):
        assert a.shape[-3:] == (3, *spec.height_width) and a.dtype == torch.float32
        assert a.isfinite().all() and not torch.equal(a, b)


def test_sslfast_makes_each_image_once_under_its_own_number() -> None:
    """Batches of two and image by image give the same views, so ids count through the batches."""

    def seen(batch: int) -> list[tuple[int, int]]:
        made: list[tuple[int, int]] = []
        work = bench._work(tiny(batch=batch), range(4 // batch), lambda _, *place: made.append(place) or ())
        work()
        work()
        return made

    assert seen(1) == [(i, e) for e in (0, 1) for i in range(4)]
    assert seen(2) == [(i, e) for e in (0, 1) for i in (0, 2)]
    one, two = (bench.setup(tiny(batch=batch), "sslfast")()[0] for batch in (1, 2))
    torch.testing.assert_close(two[1], one)


def test_the_photographs_are_distinct() -> None:
    images = augmentation.photographs(8, 32)
    assert images.shape == (8, 3, 32, 32) and images.dtype == torch.uint8
    assert len({bytes(image.numpy()) for image in images}) == 8 and images.float().std() > 40


def test_the_bound_counts_each_crop_once_and_each_view_once() -> None:
    case = tiny(views=4, size=56)
    box = bench.choices(case, 4).box
    crops = sum(int(h) * int(w) for h, w in box[..., 2:].reshape(-1, 2).tolist())
    written = 4 * 3 * 4 * (2 * 56**2 + 2 * 24**2)
    assert bench.cost(case) == (0.0, 3 * crops + written)
    assert bench.cost(replace(case, dtype="bfloat16"))[1] == 3 * crops + written / 2


@pytest.mark.parametrize(
    ("provider", "sizes", "measured"),
    [
        ("torchvision", {"batch": 1}, True),
        ("torchvision", {}, False),
        ("torchvision", {"batch": 1, "pil": 1}, False),
        ("pillow", {"batch": 1, "pil": 1}, True),
        ("pillow", {"batch": 1}, False),
        ("kornia", {}, True),
        ("kornia", {"batch": 1}, False),
        ("sslfast", {"batch": 1, "pil": 1}, True),
    ],
)
def test_who_is_measured_where(provider: str, sizes: dict[str, int], measured: bool) -> None:
    assert (bench.why_skip(tiny(**sizes), provider, "time_ms") is None) == measured


# ------------------------------------------------------------------------------------- harness and tables: mode "call"


def random_bench(proof: float) -> types.SimpleNamespace:
    """A benchmark whose runs are random numbers, so that only the proof can be compared."""
    exact = torch.ones(3, dtype=torch.float64)
    work = harness.Work(
        lambda: None, lambda _: (torch.rand(3),), lambda: (torch.full((3,), proof),), tolerance=1e-3
    )  # fmt: skip
    return types.SimpleNamespace(
        PROVIDERS=("pillow", "kornia", "sslfast"),
        BASELINES=("pillow", "kornia"),
        setup=lambda case, provider: work,
        truth=lambda case: (exact,),
        cost=lambda case: (0.0, 5e6),
        why_skip=lambda case, provider, metric: None,
    )


def run(fake: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> runner.Report:
    monkeypatch.setattr(memory, "peak_mib", lambda case, provider: 1.5)
    made = runner.Runner(MACHINE, PEAKS, NO_TIME)
    made.run_case(fake, tiny())
    return made.report


def test_a_run_that_draws_is_judged_by_its_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    report = run(random_bench(1.0005), monkeypatch)
    assert not report.errors
    metrics = [(row["provider"].partition("-")[0], row["metric"]) for row in report.rows if row["op"] != "machine"]
    assert sorted(metrics) == [(p, m) for p in ("kornia", "pillow", "sslfast") for m in ("peak_mib", "time_ms")]
    assert all(set(row) == set(rows.COLUMNS) for row in report.rows)
    timed = {row["provider"].partition("-")[0]: row for row in report.rows if row["metric"] == "time_ms"}
    ratios = {name: float(row["speedup_over_best_of_eager_compile"]) for name, row in timed.items()}
    assert 1.0 in (ratios["pillow"], ratios["kornia"]) and ratios["sslfast"] > 0  # over the better of BASELINES
    for wrong in (1.002, float("nan")):
        errors = run(random_bench(wrong), monkeypatch).errors
        assert len(errors) == 3 and all("allowed 1e-03" in line for line in errors)


def test_the_table_has_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    made = runner.Runner(MACHINE, PEAKS, NO_TIME)
    case = tiny(batch=1, images=64, views=10)
    for provider, scale, ratio in (("torchvision", 8.0, 1.0), ("sslfast", 0.5, 16.0)):
        made.report.rows.append(made._row(case, provider, "time_ms", [80 * scale] * 3, 0.25, ratio))
        made.report.rows.append(made._row(case, provider, "peak_mib", [3.0], None, None))
    rows = [{key: str(value) for key, value in row.items()} for row in made.report.rows]
    text = plot.markdown("augment_views", rows)
    label = plot.provider_text(peers.label("torchvision"))
    sizes = " | ".join(case.shape)
    assert f"| {sizes} | {label} [views/s] | sslfast [views/s] | speed-up | share of bound |" in text
    # 640 views in 640 ms and in 40 ms
    assert "| 1000 (1000–1000) | 16000 (16000–16000) | 16.0× | 25% | 3 | 3 |" in text
    assert "views a second" in text and "backward" not in text
    assert json.loads(rows[-1]["shape"]) == case.shape


def test_rates_say_their_spread_low_to_high() -> None:
    row = {"shape": json.dumps(tiny().shape), "p20": "4", "p50": "5", "p80": "8"}
    assert plot._rate_text(row) == "800 (500–1000)" and plot._rate_text(None) == ""


def test_the_whole_way_on_a_tiny_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    available("torchvision")
    monkeypatch.setattr(harness, "MIN_ROUNDS", 1)
    monkeypatch.setattr(memory, "peak_mib", lambda case, provider: 1.5)
    made = runner.Runner(MACHINE, PEAKS, NO_TIME)
    for case in (tiny(batch=1), tiny(batch=1, pil=1), tiny()):
        made.run_case(bench, case)
    assert not made.report.errors
    timed = {
        (row["provider"].partition("-")[0], row["shape"]) for row in made.report.rows if row["metric"] == "time_ms"
    }
    assert {provider for provider, _ in timed} >= {"torchvision", "pillow", "sslfast"}
    shares = [row["share_of_bound"] for row in made.report.rows if row["provider"] == "sslfast"]
    assert all(0 < float(share) < 1 for share in shares if share)
