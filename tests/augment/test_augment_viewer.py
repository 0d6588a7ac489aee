"""``python -m sslfast.augment`` on real photographs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
pytest.importorskip("sklearn")

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from sklearn.datasets import load_sample_images

from sslfast.augment import MultiViewTransform, ViewSpec, __main__ as viewer, _grid, recipe


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two photographs of other sizes, one of them in a subfolder, a damaged file and one that is no image."""
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    china, flower = load_sample_images().images
    Image.fromarray(china).save(root / "china.png")
    Image.fromarray(flower[:200, :150]).save(root / "more" / "flower.png")
    (root / "broken.png").write_bytes((root / "china.png").read_bytes()[:5000])
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is written."""
    seen: list[Figure] = []
    save = Figure.savefig

    def saved(figure: Figure, *args: object, **kwargs: object) -> None:
        seen.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", saved)
    return seen


def test_folder(photos: Path, figures: list[Figure], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "views.png"
    viewer.main([str(photos), "--recipe", "dino", "--out", str(out), "--seed", "3", "--size", "56"])
    with Image.open(out) as picture:
        assert picture.width > 1500 and picture.height > 400
        assert len(np.unique(np.asarray(picture.convert("L")))) > 200
    shown = capsys.readouterr()
    assert "10 views of 2 image(s)" in shown.out and str(out) in shown.out
    assert "skipped, not readable: broken.png" in shown.err

    (figure,) = figures
    panels = [figure.axes[row * 11 : (row + 1) * 11] for row in range(2)]
    views = recipe("dino", 56, 24)
    transform = MultiViewTransform(views, seed=3)
    images = []
    for file in ("china.png", "more/flower.png"):
        with Image.open(photos / file) as image:
            images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    params = transform.sample_params(images, range(2))
    made = transform.apply(images, params)
    for b, (original, *others) in enumerate(panels):
        assert np.array_equal(original.images[0].get_array(), images[b].permute(1, 2, 0))
        boxes = [(p.get_y(), p.get_x(), p.get_height(), p.get_width()) for p in original.patches]
        assert all(isinstance(p, Rectangle) for p in original.patches)
        np.testing.assert_allclose(boxes, params.box[:, b] - torch.tensor([0.5, 0.5, 0, 0]))
        colours = [p.get_edgecolor() for p in original.patches]
        assert len(set(colours)) == 10  # a box and its view share one
        for v, axes in enumerate(others):
            assert axes.get_title() == f"view {v + 1}\n{'56 × 56' if v < 2 else '24 × 24'}"
            assert axes.spines["top"].get_edgecolor() == colours[v]
            drawn = np.asarray(axes.images[0].get_array(), dtype=np.float64)
            mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
            expected = made[v][b].permute(1, 2, 0).double().numpy() * std + mean
            np.testing.assert_allclose(drawn, expected.clip(0, 1), atol=1e-6)
    assert panels[0][0].get_title().startswith("china.png") and panels[1][0].get_title().startswith("flower.png")


def test_what_happened_is_told_in_order() -> None:
    params = MultiViewTransform(recipe("barlow_twins", 8)).sample_params(torch.zeros(1, 3, 9, 9), [0])
    row = params.table[1, 0]
    row[4:] = torch.tensor([1, 1.2, 0.8, 1.1, -0.05, 3, 1, 0, 2, 1, 1.26, 1])
    expected = ["flip", "hue −0.05", "contrast 0.80", "brightness 1.20", "saturation 1.10", "grey", "blur σ 1.3"]
    assert _grid.told(params, 1, 0).split("\n") == [*expected, "solarize"]
    row[4], row[9:] = 0, torch.tensor([-1, -1, -1, -1, 0, 0, 0])
    assert _grid.told(params, 1, 0) == ""


def test_one_file_at_several_settings(photos: Path, figures: list[Figure], tmp_path: Path) -> None:
    out = tmp_path / "views.pdf"
    for options in ([], ["--recipe", "mae", "--images", "1"], ["--recipe", "simclr", "--seed", "1", "--size", "8"]):
        viewer.main([str(photos / "china.png"), "--out", str(out), "--size", "32", *options])
    assert [len(figure.axes) for figure in figures] == [3, 2, 3]
    assert out.read_bytes().startswith(b"%PDF")
    viewer.main([str(photos), "--out", str(out), "--recipe", "mae", "--size", "8", "--images", "1"])
    assert len(figures[-1].axes) == 2


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_rotated_and_grey_files(tmp_path: Path, suffix: str) -> None:
    """The orientation that EXIF asks for is applied neither here nor by a transform: both take what is stored."""
    pixels = np.arange(6 * 4, dtype=np.uint8).reshape(6, 4) * 10
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was turned: show a quarter turn clockwise
    Image.fromarray(pixels).save(tmp_path / f"turned.{suffix}", exif=turned)
    (image,), names, unreadable = _grid.read_images(tmp_path, 4)
    assert names == [f"turned.{suffix}"] and not unreadable and image.shape == (3, 6, 4)
    assert suffix == "jpg" or np.array_equal(image, np.broadcast_to(pixels, (3, 6, 4)))
    whole = MultiViewTransform(ViewSpec((6, 4), scale=None, flip_p=0))
    with Image.open(tmp_path / f"turned.{suffix}") as opened:
        assert opened.getexif()[0x0112] == 6
        (seen,) = whole(opened, 0, epoch=0)
    assert torch.equal((seen * 255).round().to(torch.uint8), image[:1])


def test_sixteen_bits_do_not_turn_white(tmp_path: Path) -> None:
    ramp = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "whole.tif")
    images, names, unreadable = _grid.read_images(tmp_path, 4)
    assert names == ["ramp.png", "whole.tif"] and not unreadable
    for image in images:
        assert np.array_equal(image, np.broadcast_to(np.round(ramp / 257), (3, 64, 64)))
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "floats.tif")
    Image.fromarray(ramp.astype(np.int32) * 999).save(tmp_path / "large.tif")
    _, names, unreadable = _grid.read_images(tmp_path, 9)
    assert names == ["ramp.png", "whole.tif"]
    assert [file.partition(" ")[0] for file in unreadable] == ["floats.tif", "large.tif"]
    assert all("which value is white is not known of mode" in file for file in unreadable)


def test_bad_input_is_told(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    whole = str(photos / "china.png")
    for arguments, told in (
        ([str(tmp_path / "absent")], "absent: no such file or folder"),
        ([str(empty)], "empty: no image files"),
        ([str(photos / "broken.png")], "broken.png: not readable as an image"),
        ([str(photos / "notes.txt")], "notes.txt: not readable as an image"),
        ([whole, "--recipe", "dinov9"], "invalid choice: 'dinov9'"),
        ([whole, "--images", "0"], "must be at least 1, got 0"),
        ([whole, "--seed", "-1"], "must be at least 0, got -1"),
        ([whole, "--seed", str(2**64)], "seed must be a 64-bit"),
        ([whole, "--size", "small"], "invalid integer value: 'small'"),
        ([whole, "--recipe", "mae", "--size", "8", "--out", str(tmp_path / "views.xyz")], "xyz"),
    ):
        with pytest.raises(SystemExit, match="2"):
            viewer.main(arguments)
        assert told in capsys.readouterr().err


def test_absent_packages_are_named() -> None:
    """A process that cannot import them: what it lacks, and nothing else."""
    code = (
        "import sys; sys.modules['matplotlib'] = sys.modules['PIL'] = None\n"
        "from sslfast.augment.__main__ import main\n"
        "main(['photo.png'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "needs pillow and matplotlib: pip install pillow matplotlib" in done.stderr


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        viewer.main(["--help"])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("--recipe", "--out", "--images", "--seed", "--size", "dinov2", "EXIF"))


def test_command_line(photos: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sslfast.augment"]
    out = tmp_path / "views.png"
    options = ["--recipe", "supervised", "--size", "32", "--out", str(out)]
    done = subprocess.run([*command, str(photos), *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and out.stat().st_size > 10_000, done.stderr
