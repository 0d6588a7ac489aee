"""Image data sets of the demos: as a tensor in memory, split once into training and test images.

Three kinds are served: the digits that scikit-learn carries, Fashion-MNIST as Debian packages it, and any folder of
images.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

# The split does not follow --seed: accuracies of runs with different seeds then stand on the same test images.
SPLIT_SEED = 0
TEST_FRACTION = 1 / 3
FASHION_DIR = Path("/usr/share/datasets/fashion-mnist")
FASHION_NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
FASHION_TRAIN, FASHION_TEST = 6000, 2000
FOLDER_SIZE = 32
FOLDER_LEAST, FOLDER_MOST = 20, 8000
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class Dataset:
    """Images in memory, with what a method has to know about them.

    Attributes:
        name: short, fit for a file name.
        train, test: [n, C, H, W] float32 in [0, 1].
        train_labels, test_labels: [n] int64, or ``None`` where there are no classes to tell apart.
        class_names: one a class; empty without labels.
        view_size: height and width of an augmented view, in pixels.
        mirror: a mirror image belongs to the same class.
        photos: natural images, in colour and up to the border; not drawings on black.
        notes: what a reader of the result has to know: files skipped, labels missing, subset taken.
    """

    name: str
    train: Tensor
    test: Tensor
    train_labels: np.ndarray | None
    test_labels: np.ndarray | None
    class_names: tuple[str, ...]
    view_size: int
    mirror: bool
    photos: bool
    notes: tuple[str, ...] = ()


def load(source: str) -> Dataset:
    """The data set called ``source``: ``"digits"``, ``"fashion-mnist"`` or the path of a folder of images.

    Raises:
        FileNotFoundError: a folder or a data file is absent.
        NotADirectoryError: ``source`` is a file.
        ValueError: the folder holds too few readable images, in all or in one class.
    """
    if source == "digits":
        return _digits()
    if source == "fashion-mnist":
        return _fashion_mnist()
    return _folder(Path(source))


def batch_of(data: Dataset, wanted: int, notes: list[str]) -> int:
    """The images of a batch, all where there are fewer than ``wanted``: then a note says so."""
    size = min(wanted, len(data.train))
    if size < wanted:
        notes.append(f"a batch of {size}, all training images, instead of {wanted}")
    return size


def _digits() -> Dataset:
    images, labels = load_digits(return_X_y=True)  # [1797, 64] in 0..16
    pixels = torch.from_numpy(images.reshape(-1, 1, 8, 8) / 16).float()
    kept, held_out = train_test_split(
        np.arange(len(labels)), test_size=TEST_FRACTION, stratify=labels, random_state=SPLIT_SEED
    )
    # Views are 16 × 16: a rotation by a few degrees is hardly visible on a grid of 8 × 8.
    return Dataset(
        name="digits",
        train=pixels[kept],
        test=pixels[held_out],
        train_labels=labels[kept],
        test_labels=labels[held_out],
        class_names=tuple(str(digit) for digit in range(10)),
        view_size=16,
        mirror=False,
        photos=False,
    )


def _read_idx(path: Path) -> np.ndarray:
    """An ``idx`` file of bytes: two zero bytes, type 8, the rank, the sizes as big-endian int32, then the data."""
    with gzip.open(path, "rb") as file:
        raw = file.read()
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path}: not an idx file of unsigned bytes (it starts with {raw[:4]!r})")
    rank = raw[3]
    shape = np.frombuffer(raw, ">i4", rank, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _fashion_mnist() -> Dataset:
    parts: dict[str, tuple[Tensor, np.ndarray]] = {}
    for part, count in (("train", FASHION_TRAIN), ("t10k", FASHION_TEST)):
        files = [FASHION_DIR / f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
        absent = [str(file) for file in files if not file.exists()]
        if absent:
            raise FileNotFoundError(f"{', '.join(absent)} not found; install Debian's package dataset-fashion-mnist")
        images, labels = (_read_idx(file) for file in files)
        subset, _ = train_test_split(np.arange(len(labels)), train_size=count, stratify=labels, random_state=SPLIT_SEED)
        parts[part] = (torch.from_numpy(images[subset]).float().div(255).unsqueeze(1), labels[subset].astype(np.int64))
    return Dataset(
        name="fashion-mnist",
        train=parts["train"][0],
        test=parts["t10k"][0],
        train_labels=parts["train"][1],
        test_labels=parts["t10k"][1],
        class_names=FASHION_NAMES,
        view_size=28,
        mirror=True,
        photos=False,
        notes=(f"a stratified subset: {FASHION_TRAIN} training and {FASHION_TEST} test images",),
    )


def _folder(root: Path) -> Dataset:
    files = _image_files(root)
    notes = []
    if len(files) > FOLDER_MOST:
        notes.append(f"{FOLDER_MOST} of {len(files)} image files, chosen at random")
        chosen = np.random.default_rng(SPLIT_SEED).permutation(len(files))[:FOLDER_MOST]
        files = [files[i] for i in np.sort(chosen)]
    pixels, folders, unreadable = _read_images(files, root)
    if unreadable:
        notes.append(f"{len(unreadable)} unreadable file(s) skipped: {_some(unreadable)}")
    if len(pixels) < FOLDER_LEAST:
        told = f"; {notes[-1]}" if unreadable else ""
        raise ValueError(f"{root}: {len(pixels)} readable images, at least {FOLDER_LEAST} are needed{told}")

    names, labels = np.unique(folders, return_inverse=True)
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float().div(255)  # [n, 3, 32, 32]
    if len(names) < 2:
        notes.append("no labels (no subfolders, or one): accuracies cannot be computed")
        kept, held_out = train_test_split(np.arange(len(images)), test_size=TEST_FRACTION, random_state=SPLIT_SEED)
        known = None, None
    else:
        sizes = np.bincount(labels)
        if sizes.min() < 2:
            lone = [str(name) for name in names[sizes < 2]]
            raise ValueError(f"{root}: a class needs 2 readable images or more, these have one: {_some(lone)}")
        count = max(round(TEST_FRACTION * len(labels)), len(names))  # stratifying needs one test image a class
        kept, held_out = train_test_split(
            np.arange(len(labels)), test_size=count, stratify=labels, random_state=SPLIT_SEED
        )
        known = labels[kept], labels[held_out]
    return Dataset(
        name="".join(c if c.isalnum() or c in "-_" else "_" for c in root.resolve().name) or "folder",
        train=images[kept],
        test=images[held_out],
        train_labels=known[0],
        test_labels=known[1],
        class_names=tuple(str(name) for name in names) if known[0] is not None else (),
        view_size=FOLDER_SIZE,
        mirror=True,
        photos=True,
        notes=tuple(notes),
    )


def _image_files(root: Path) -> list[Path]:
    """The image files under ``root`` in a fixed order; all in subfolders, or none."""
    if not root.exists():
        raise FileNotFoundError(f"--data {root}: no such folder (allowed: digits, fashion-mnist, a folder of images)")
    if not root.is_dir():
        raise NotADirectoryError(f"--data {root}: a file, expected a folder of images")
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise ValueError(f"{root}: no image files ({', '.join(sorted(SUFFIXES))}) in it or its subfolders")
    loose = [path for path in files if path.parent == root]
    if loose and len(loose) < len(files):
        raise ValueError(
            f"{root}: images both in it ({_some([path.name for path in loose])}) and in subfolders; "
            "expected one subfolder a class, or all images in the folder itself"
        )
    return files


def _read_images(files: Sequence[Path], root: Path) -> tuple[list[np.ndarray], list[str], list[str]]:
    """Centre crops [32, 32, 3] uint8, the first folder under ``root`` of each, and the files that could not be read."""
    pixels, folders, unreadable = [], [], []
    for path in files:
        try:
            with Image.open(path) as image:
                fitted = ImageOps.fit(image.convert("RGB"), (FOLDER_SIZE, FOLDER_SIZE), Image.Resampling.LANCZOS)
                pixels.append(np.asarray(fitted))
        except Exception:  # Pillow's decoders raise whatever the damaged bytes lead them to
            unreadable.append(str(path.relative_to(root)))
        else:
            folders.append(path.relative_to(root).parts[0] if path.parent != root else "")
    return pixels, folders, unreadable


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
