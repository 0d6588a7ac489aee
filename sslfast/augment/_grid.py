"""The picture of ``python -m sslfast.augment``: a row an image, the original with its crops, then its views."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .params import ViewParams
from .spec import ViewSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
INCHES = 2.1  # side of a panel
OPERATIONS = ("brightness", "contrast", "saturation", "hue")


def _bytes_of(image: Image) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """[H, W, 3] of the pixels as they are stored, whatever EXIF says: what a transform makes its views of.

    Raises:
        ValueError: which value is white cannot be known.
    """
    if image.mode != "F" and image.mode[0] != "I":
        return np.array(image.convert("RGB"))
    levels = np.array(image)
    if image.mode == "F" or levels.min() < 0 or levels.max() > 65535:
        raise ValueError(f"which value is white is not known of mode {image.mode!r}")
    grey = np.round(levels / 257).astype(np.uint8)  # of 16 bits, which conversion would clip to 255
    return np.stack([grey] * 3, axis=-1)


def read_images(source: Path, most: int) -> tuple[list[Tensor], list[str], list[str]]:
    """The first images of ``source``, a file or a folder (with its subfolders, in the order of their names).

    Returns:
        At most ``most`` images [3, H, W] uint8, their names, and the names of the files that could not be read.

    Raises:
        FileNotFoundError, ValueError: there is no such path, no image file in it, or none that can be read.
    """
    from PIL import Image

    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    files = [source]
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not files:
            raise ValueError(f"{source}: no image files ({', '.join(sorted(SUFFIXES))}) in it")
    images: list[Tensor] = []
    names: list[str] = []
    unreadable: list[str] = []
    for path in files:
        if len(images) == most:
            break
        try:
            with Image.open(path) as opened:
                pixels = _bytes_of(opened)
        except Exception as error:  # Pillow's decoders raise whatever the damaged bytes lead them to
            unreadable.append(f"{path.name} ({error})")
        else:
            images.append(torch.from_numpy(pixels).permute(2, 0, 1))
            names.append(path.name)
    if not images:
        raise ValueError(f"{source}: not readable as an image: {', '.join(unreadable[:5])}")
    return images, names, unreadable


def pixels_of(view: Tensor, spec: ViewSpec) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """[h, w, 3] in [0, 1] of a normalised view [3, h, w]."""
    mean, std = (torch.tensor(spec.channels(name, 3), device=view.device)[:, None, None] for name in ("mean", "std"))
    return (view * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


def told(params: ViewParams, view: int, image: int) -> str:
    """What happened to an image in a view, in order: flip, hue −0.08, contrast 1.20, blur σ 1.3; a line each."""
    done = ["flip"] if params.flip[view, image] else []
    for operation in (int(o) for o in params.order[view, image] if o >= 0):
        name = OPERATIONS[operation]
        done.append(f"{name} {getattr(params, name)[view, image]:.2f}")
    done += ["grey"] if params.grey[view, image] else []
    done += [f"blur σ {params.sigma[view, image]:.1f}"] if params.sigma[view, image] else []
    done += ["solarize"] if params.solarize[view, image] else []
    return "\n".join(done).replace("-", "−")


def draw(
    images: Sequence[Tensor],
    names: Sequence[str],
    views: Sequence[ViewSpec],
    params: ViewParams,
    made: Sequence[Tensor],
    title: str,
    out: Path,
) -> None:
    """Write the picture.

    Args:
        images: B images [3, H, W], uint8, and their ``names``.
        views: V of them, with the ``params`` of V views of B images.
        made: V tensors [B, 3, h, w].
        title: above all.
        out: the file; its suffix names the format.

    Raises:
        ValueError, OSError: the format is unknown, or the file cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows, columns = len(images), 1 + len(views)
    # Beside the square panels: room for a title and for what happened, at most eight lines, under each view.
    figure = Figure(figsize=(INCHES * (columns + 1), (INCHES + 1.3) * rows + 0.4), layout="constrained")
    figure.suptitle(title)
    palette = colormaps["tab10" if len(views) <= 10 else "tab20"]
    grid = figure.subplots(rows, columns, squeeze=False, width_ratios=[2] + [1] * len(views))
    for b, image in enumerate(images):
        panels: list[Axes] = list(grid[b])
        _panel(panels[0], image.permute(1, 2, 0).numpy(), f"{names[b]}\n{image.shape[1]} × {image.shape[2]}")
        for v, spec in enumerate(views):
            colour = palette(v % palette.N)
            top, left, height, width = params.box[v, b].tolist()
            # imshow has the middle of the first pixel at 0.
            corner = (left - 0.5, top - 0.5)
            panels[0].add_patch(Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=1.5))
            label = f"view {v + 1}\n{spec.height_width[0]} × {spec.height_width[1]}"
            _panel(panels[1 + v], pixels_of(made[v][b], spec), label, colour)
            panels[1 + v].set_xlabel(told(params, v, b), fontsize=8)
    figure.savefig(out, dpi=110, bbox_inches="tight")  # long lists of operations may pass the last row


def _panel(
    axes: Axes,
    pixels: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    label: str,
    colour: tuple[float, float, float, float] | None = None,
) -> None:
    axes.imshow(pixels)
    axes.set_title(label, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(colour is not None)
        spine.set_edgecolor(colour or "black")
        spine.set_linewidth(3)
