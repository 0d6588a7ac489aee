"""The demos run end to end on small settings, and their parts do what they say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Generator

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from PIL import Image
from rich.console import Console
from sklearn.datasets import load_sample_images

import sslfast
from example_common import numbers
from examples.common import augment, evaluate, measure, ranks
from examples.common.data import FASHION_DIR, Dataset, load
from examples.pretrain import __main__ as demo
from examples.pretrain.distillation import ema_update
from examples.pretrain.learners import Learner
from examples.pretrain.methods import BARLOW, LEJEPA, METHODS, SIMCLR, VICREG, Method
from examples.pretrain.model import build
from examples.pretrain.train import Schedule, embedded_views, train
from sslfast.augment import MultiViewTransform, recipe

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of 16 crops each of scikit-learn's two photographs, in two sizes, and one damaged file."""
    root = tmp_path / "photos"
    random = np.random.default_rng(0)
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        (root / name).mkdir(parents=True)
        for i in range(16):
            top, left = random.integers(0, 427 - 96), random.integers(0, 640 - 96)
            Image.fromarray(photo[top : top + 96, left : left + 64 + 32 * (i % 2)]).save(root / name / f"{i:02}.png")
    whole = (root / "china" / "00.png").read_bytes()
    (root / "china" / "broken.png").write_bytes(whole[: len(whole) // 2])
    (root / "china" / "notes.txt").write_text("no image, and not meant to be one")
    return root


@every_method
def test_digits_end_to_end(method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROUNDS_SECONDS", 1.0)
    data = load("digits")
    data = replace(data, train=data.train[:512], train_labels=data.train_labels[:512])
    size = (1024, 128) if method in (SIMCLR, LEJEPA) else (128, 2048)
    settings = demo.Settings(replace(method, large=(size,)), tmp_path, epochs=6, batch_size=128)
    console = Console(record=True, width=120, file=open(tmp_path / "terminal.txt", "w"))  # noqa: SIM115
    result = demo.run(settings, data, console)

    fused, plain = result.curves["fused"], result.curves["plain"]
    assert len(fused) == len(plain) == 6 * 4
    for curve in (fused, plain):
        if method.name == "dino":  # whose targets sharpen first: of so few steps it learns to be above chance
            assert np.mean(curve[-4:]) < 1.05 * math.log(method.measured_width)
        else:
            assert np.mean(curve[-4:]) < np.mean(curve[:4]) - 0.05 * abs(np.mean(curve[:4]))
    # Same weights, batches and views: one rounding apart at first. Training then magnifies it, a little a step.
    assert fused[0] == pytest.approx(plain[0], rel=1e-5)
    # A predictor or a teacher is one more thing that magnifies.
    assert fused == pytest.approx(plain, rel=5e-3 if method in (SIMCLR, BARLOW, VICREG) else 5e-2)

    content = json.loads((tmp_path / f"{method.name}_digits.json").read_text())
    assert content["curves"] == {"fused": fused, "plain": plain}
    assert content["backend"] == content["backend_alone"] in ("cpu", "reference")
    width = method.measured_width or method.width
    assert [(cost["pairs"], cost["width"]) for cost in content["costs"]] == [(128, width), size]
    assert all(math.isfinite(number) for number in numbers(content))
    for cost in content["costs"]:
        assert cost["gradient_difference"] <= measure.AGREEMENT
        assert all(cost["seconds"][name] > 0 for name in ("fused", "plain"))
    several = Path("/proc/self/clear_refs").exists() and method in (SIMCLR, BARLOW, VICREG)
    if several:  # Linux tells: plain PyTorch holds a few matrices of 2048 × 2048 at once
        assert 2 * 2048**2 * 4 < content["costs"][1]["peak_bytes"]["plain"] < 16 * 2048**2 * 4
    assert set(content["accuracies"]["knn"]) == {"fused", "plain", "untrained", "raw pixels"}
    assert all(0.5 < accuracy <= 1 for kind in content["accuracies"].values() for accuracy in kind.values())

    with Image.open(tmp_path / f"{method.name}_digits.png") as image:
        assert image.width > 1000 and len(np.unique(np.asarray(image.convert("L")))) > 50
    shown = console.export_text()
    assert method.title in shown and f"backend '{result.backend}'" in shown and "raw pixels" in shown


def test_training_is_reproducible() -> None:
    data = load("digits")
    data = replace(data, train=data.train[:256])
    views = augment.views_for(data)

    def curve(seed: int) -> list[float]:
        model = build(data, SIMCLR.hidden, SIMCLR.width, seed)
        learner = Learner(model, SIMCLR.fused, ema_update)
        return train(learner, data, views, Schedule(1, 64, SIMCLR.learning_rate, seed), "test")[0]

    before = torch.get_rng_state()
    first = curve(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert curve(0) == first
    assert curve(1) != first


def test_projector_of_another_width() -> None:
    data = load("digits")
    before = torch.get_rng_state()
    model = build(data, (32,), 16, seed=0)
    wide = model.of_width((32,), 48, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert wide.encoder is model.encoder and wide.embed(data.test[:8]).shape == (8, 48)


@every_method
def test_serving_backend_is_what_ran(method: Method) -> None:
    z0, z1 = torch.randn(2, 16, 8, generator=Generator().manual_seed(0))
    fused, plain = method.alone().values()
    with sslfast.use_backend("reference"):
        assert measure.serving_backend(fused, method.operators, z0, z1) == "reference"
    assert measure.serving_backend(plain, method.operators, z0, z1) == "reference"
    with sslfast.use_backend(None):
        seen = measure.serving_backend(fused, method.operators, z0, z1)
    try:
        with sslfast.use_backend("cpu"):
            fused(z0, z1)
    except RuntimeError:
        assert seen == "reference"
    else:
        assert seen == "cpu"


def _on_a_rank(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    data = load("digits")
    data = replace(data, train=data.train[:33])
    generator = Generator().manual_seed(0)
    z0 = torch.randn(11, 8, generator=generator)
    z1 = z0 + 0.5 * torch.randn(11, 8, generator=generator)
    mine = z0.split((7, 4))[rank], z1.split((7, 4))[rank]
    for method in (SIMCLR, BARLOW, VICREG):
        wanted = [grad.split((7, 4))[rank] for grad in measure.step(method.plain, z0, z1)]
        for loss in method.losses(world=2).values():
            value = ranks.mean(loss(*mine))
            torch.testing.assert_close(value, method.plain(z0, z1), rtol=1e-5, atol=0)
            for found, expected in zip(measure.step(loss, *mine), wanted, strict=True):
                torch.testing.assert_close(found / 2, expected, rtol=1e-4, atol=1e-6)  # DDP averages over the ranks
        backend = measure.serving_backend(method.fused_over_ranks, method.operators_over_ranks, *mine)
        assert backend in (("cpu", "reference") if method is SIMCLR else ("torch",))
        curves = []
        for loss in method.losses(world=2).values():  # a batch of 11 a step: 6 here, 5 there
            model = build(data, (16,), 12, seed=0)
            schedule = Schedule(epochs=1, batch_size=11, learning_rate=1e-3, seed=0)
            learner = Learner(model, loss, ema_update)
            curves.append(train(learner, data, augment.views_for(data), schedule, "test")[0])
        assert len(curves[0]) == 3 and curves[0] == pytest.approx(curves[1], rel=1e-4)
    dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")
def test_two_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_on_a_rank, (str(tmp_path / "meeting"),), nprocs=2)


def _another_loss(z0: torch.Tensor, z1: torch.Tensor) -> torch.Tensor:
    return 1.01 * SIMCLR.plain(z0, z1)


def test_losses_that_differ_are_not_compared() -> None:
    z0, z1 = torch.randn(2, 16, 8, generator=Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match="other, plain disagree"):
        measure.cost({"other": _another_loss, "plain": SIMCLR.plain}, z0, z1)


def test_a_loss_that_may_need_too_much_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def cost(losses: dict[str, measure.Loss], z0: torch.Tensor, z1: torch.Tensor) -> measure.Cost:
        asked.append((*z0.shape, *losses))
        return measure.Cost(*z0.shape, {}, {}, {name: {"fused": 10, "plain": 100}[name] for name in losses}, None)

    monkeypatch.setattr(demo, "cost", cost)
    monkeypatch.setattr(demo, "MEMORY_MOST", 500)
    data = load("digits")
    method = replace(SIMCLR, hidden=(8,), width=32, large=((16, 32), (16, 64), (32, 64), (32, 192), (64, 512)))
    model = build(data, method.hidden, method.width, seed=0)
    demo._costs(method, 16, model, data, augment.views_for(data), 0, Console(quiet=True))
    both = ("fused", "plain")
    assert asked == [(16, 32, *both), (16, 64, *both), (32, 64, *both), (32, 192, "fused"), (64, 512, "fused")]


def _images(count: int, channels: int) -> Dataset:
    images = torch.rand(count, channels, 20, 20, generator=Generator().manual_seed(0))
    return Dataset("x", images, images, None, None, (), view_size=16, mirror=channels == 3, photos=channels == 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_views(channels: int) -> None:
    data = _images(64, channels)
    specs = augment.views_for(data)
    assert len(specs) == 2 and specs[0] == specs[1]
    assert specs == recipe("simclr", 16) if channels == 3 else all(spec.flip_p == 0 for spec in specs)
    transform = MultiViewTransform(specs, seed=1)
    first, second = transform(data.train, range(64))
    assert first.shape == second.shape == (64, channels, 16, 16) and first.isfinite().all()
    assert (first - second).abs().flatten(1).amax(1).min() > 0.01
    assert torch.equal(first[5:9], transform(data.train[5:9], range(5, 9))[0])


def test_training_names_its_images_and_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views are those of the images' indices and the epoch: the same for both losses, and in every run."""
    data = replace(_images(50, 1), name="y")
    seen: list[tuple[int, list[int], torch.Tensor]] = []
    make = MultiViewTransform.__call__

    def recorded(self: MultiViewTransform, images: torch.Tensor, ids: torch.Tensor, *, epoch: int) -> Any:
        assert self.seed == 7 and torch.equal(images, data.train[ids])
        views = make(self, images, ids, epoch=epoch)
        seen.append((epoch, ids.tolist(), views))
        return views

    monkeypatch.setattr(MultiViewTransform, "__call__", recorded)
    for loss in (SIMCLR.fused, SIMCLR.plain):
        model = build(data, (16,), 12, seed=0)
        train(Learner(model, loss, ema_update), data, augment.views_for(data), Schedule(3, 16, 1e-3, seed=7), "test")
    assert [epoch for epoch, _, _ in seen] == [0, 0, 0, 1, 1, 1, 2, 2, 2] * 2
    for begin in range(0, 18, 3):
        ids = [i for _, batch, _ in seen[begin : begin + 3] for i in batch]
        assert len(set(ids)) == len(ids) == 48
    assert all(a[1] == b[1] and torch.equal(a[2], b[2]) for a, b in zip(seen[:9], seen[9:], strict=True))
    assert seen[0][1] != seen[3][1]  # shuffled anew in each epoch


def test_embedded_views_are_all_new() -> None:
    data = _images(600, 1)
    model = build(data, (16,), 12, seed=0)
    specs = augment.views_for(data)
    first, second = embedded_views(model, data, specs, 1300, seed=0)
    assert first.shape == second.shape == (1300, 12)
    for a, b in ((first, second), (first[:600], first[600:1200]), (first[:100], first[1200:])):
        assert ((a - b).abs().amax(1) > 0).double().mean() > 0.99  # two views are seldom alike
    again = embedded_views(model, data, specs, 700, seed=0)[1]
    torch.testing.assert_close(again, second[:700], rtol=1e-4, atol=1e-6)  # other parts, rounded otherwise
    assert not torch.allclose(embedded_views(model, data, specs, 700, seed=1)[1], again, atol=1e-3)


def test_folder_with_classes(photos: Path) -> None:
    data = load(str(photos))
    assert data.class_names == ("china", "flower")
    assert data.train.shape[1:] == (3, 32, 32) and len(data.train) + len(data.test) == 32
    assert data.train.min() >= 0 and data.train.max() <= 1
    assert sorted(np.bincount(data.train_labels)) == [10, 11] and sorted(np.bincount(data.test_labels)) == [5, 6]
    assert len(data.notes) == 1 and "1 unreadable" in data.notes[0] and "broken.png" in data.notes[0]
    again = load(str(photos))
    assert torch.equal(again.train, data.train) and np.array_equal(again.test_labels, data.test_labels)


def test_flat_folder_has_no_accuracies(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = tmp_path / "flat folder"
    flat.mkdir()
    for i, file in enumerate(sorted(photos.rglob("*.png"))):
        file.rename(flat / f"{i}.png")
    data = load(str(flat))
    assert data.train_labels is None and evaluate.accuracies({"raw": evaluate.raw_pixels(data)}, data) is None
    monkeypatch.setattr(measure, "peak_memory", lambda *_: None)  # as on a system that does not tell
    console = Console(record=True, width=120, quiet=False, file=open(tmp_path / "terminal.txt", "w"))  # noqa: SIM115
    demo.run(demo.Settings(replace(SIMCLR, large=()), tmp_path, epochs=2), data, console)
    shown = console.export_text()
    assert "no labels" in shown and "1 unreadable" in shown and "a batch of 21" in shown
    content = json.loads((tmp_path / "simclr_flat_folder.json").read_text())
    assert content["accuracies"] is None and content["costs"][0]["peak_bytes"] == {"fused": None, "plain": None}
    assert (tmp_path / "simclr_flat_folder.png").stat().st_size > 10_000


def test_bad_data_is_told(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(str(tmp_path / "absent"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no image files"):
        load(str(empty))
    (empty / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="0 readable images.*broken.png"):
        load(str(empty))
    with pytest.raises(NotADirectoryError, match="expected a folder"):
        load(str(empty / "broken.png"))
    (photos / "lone").mkdir()
    (photos / "china" / "00.png").rename(photos / "lone" / "00.png")
    with pytest.raises(ValueError, match="these have one: lone"):
        load(str(photos))
    (photos / "lone" / "00.png").rename(photos / "00.png")
    with pytest.raises(ValueError, match="both in it"):
        load(str(photos))
    for arguments, told in (
        (["--data", str(tmp_path / "absent")], "no such folder"),
        (["--method", "moco"], "invalid choice: 'moco'"),
        (["--batch-size", "1"], "must be at least 2, got 1"),
        (["--epochs", "ten"], "invalid integer value: 'ten'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            demo.main(arguments)
        assert told in capsys.readouterr().err


@pytest.mark.skipif(not FASHION_DIR.exists(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_fashion_mnist() -> None:
    data = load("fashion-mnist")
    assert data.train.shape == (6000, 1, 28, 28) and data.test.shape == (2000, 1, 28, 28)
    assert np.bincount(data.train_labels).tolist() == [600] * 10
    # A trouser's column of pixels is empty between its legs' outsides and the border; a bag fills the width.
    width = (data.train.mean(dim=(1, 2)) > 0.2).sum(dim=1).numpy()
    assert width[data.train_labels == 1].mean() < width[data.train_labels == 8].mean()


def test_absent_fashion_mnist_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("examples.common.data.FASHION_DIR", tmp_path)
    with pytest.raises(FileNotFoundError, match="Debian's package dataset-fashion-mnist"):
        load("fashion-mnist")
