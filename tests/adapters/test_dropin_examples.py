"""The training scripts of other packages, with and without ``--sslfast``: the same curve, by sslfast's kernels."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

import sslfast
from adapter_common import peer
from benchmarks import scripts
from examples.common.measure import operators_of
from examples.dropin import common

STEPS, BATCH = 3, 48


@pytest.fixture(params=scripts.SCRIPTS)
def script(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any]]:
    """Its name and its ``main``; what it patches is taken back."""
    package = scripts.SCRIPTS[request.param].module
    peer(package)
    module = importlib.import_module(f"examples.dropin.{scripts.SCRIPTS[request.param].script}")
    yield request.param, module.main
    if package in sslfast.adapters._patch._active:
        sslfast.unpatch(package)


def flags(name: str) -> list[str]:
    return ["--steps", str(STEPS), "--batch-size", str(BATCH), *scripts.SCRIPTS[name].flags("digits")]


def test_the_line_changes_who_computes_and_nothing_else(
    script: tuple[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    name, main = script
    found: list[dict[str, Any]] = []
    without = operators_of(lambda: found.append(main(flags(name))))
    assert not any(op.startswith("sslfast::") for op in without)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="sslfast does not serve")
        served = operators_of(lambda: found.append(main([*flags(name), "--sslfast"])))
    assert any(op.startswith("sslfast::") for op in served)

    told = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert told == found
    before, after = found
    assert before["sslfast"] is False and after["sslfast"] is True
    assert before["script"] == name and before["batch_size"] == BATCH
    assert len(before["losses"]) == STEPS and len(set(before["losses"])) == STEPS  # it learns: no two steps alike
    first, whole = scripts.disagreement({"without": [before], "with": [after]})
    assert first <= scripts.FIRST_AGREES and whole <= scripts.CURVE_AGREES
    for each in found:
        assert 0 < each["loss_share"] < 1 and 0 < each["loss_seconds_per_step"] < each["seconds_per_step"]
        assert each["peak_memory_mib"] >= each["peak_memory_before_training_mib"] > 50


def test_the_same_seed_is_the_same_run() -> None:
    peer("lightly")
    main = importlib.import_module("examples.dropin.lightly_views").main
    run = [main([*flags("lightly_simclr"), "--seed", seed])["losses"] for seed in ("0", "0", "1")]
    assert run[0] == run[1] != run[2]


def test_a_flag_that_makes_no_sense_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, told in (
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--batch-size", "1"], "least 2"),
    ):
        with pytest.raises(SystemExit, match="2"):
            common.parse(arguments, "text", batch_size=8)
        assert told in capsys.readouterr().err
    options = common.parse(["--batch-size", "5000", "--data", "digits"], "text", batch_size=8)
    with pytest.raises(SystemExit, match="digits has 1198 training images"):
        common.images(options)


def test_each_method_has_its_batch_size() -> None:
    sizes = {"one": 8, "other": 2}
    for arguments, expected in (([], 8), (["--method", "other"], 2), (["--method", "other", "--batch-size", "5"], 5)):
        assert common.parse(arguments, "text", sizes).batch_size == expected
    with pytest.raises(SystemExit, match="2"):
        common.parse(["--batch-size", "0"], "text", sizes)


def test_batches_cover_each_epoch_once() -> None:
    options = common.parse(["--steps", "7", "--batch-size", "4"], "text", batch_size=8)
    chosen = list(common.batches(13, options))
    assert [len(batch) for batch in chosen] == [4] * 7
    for epoch in (chosen[:3], chosen[3:6]):
        assert len(set(torch.cat(epoch).tolist())) == 12
    assert not torch.equal(chosen[0], chosen[3])


def test_views_are_of_the_same_image_and_differ() -> None:
    images = torch.zeros(6, 1, 20, 20)
    images[:, :, 8:12, 8:12] = torch.linspace(0.3, 0.8, 6).view(6, 1, 1, 1)  # the brighter, the later
    z0, z1 = common.two_views(images).chunk(2)
    assert z0.shape == images.shape and not torch.allclose(z0, z1) and z0.min() >= 0 and z0.max() <= 1
    for view in (z0, z1):
        inside = view.flatten(1).amax(1) - view.flatten(1).amin(1)  # light cancels, contrast stays: 0.6 to 1.4
        assert ((inside > 0.3 * 0.4) & (inside <= 0.8 * 1.4)).all()


def test_the_clock_of_the_loss_leaves_the_encoder_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that counts calls of itself and of a slow encoder's backward."""
    now = [0.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
            ctx.seconds = seconds
            now[0] += seconds
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
            now[0] += ctx.seconds
            return grad, None

    options = common.parse(["--steps", "2", "--batch-size", "2"], "text", batch_size=8)
    meter = common.Meter("x", options)
    weight = torch.ones(4, requires_grad=True)
    for _ in meter.steps(range(2)):
        z0, z1 = Slow.apply(weight, 10.0).chunk(2)  # the encoder: 20 s
        meter.loss_begins(z0, z1)
        loss = Slow.apply(z0 * z1, 1.0).sum()  # the loss: 2 s
        loss.backward()
        meter.losses.append(loss.item())
    found = meter.report()
    assert found["loss_seconds_per_step"] == 2 and found["seconds_per_step"] == 22 and found["seconds_total"] == 44
    assert found["loss_share"] == pytest.approx(2 / 22)


def test_a_script_is_a_command() -> None:
    peer("lightly")
    command = [sys.executable, "-m", "examples.dropin.lightly_views", *flags("lightly_simclr"), "--sslfast"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "sslfast.patch: lightly" in done.stderr
    assert len(json.loads(done.stdout.splitlines()[-1])["losses"]) == STEPS
