"""``python -m sslfast.augment``: look at the views that a recipe makes of one's own images.

python -m sslfast.augment photo.jpg --recipe dino --out views.png
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .recipes import RECIPES, recipe
from .transform import MultiViewTransform

PACKAGES = {"PIL": "pillow", "matplotlib": "matplotlib"}  # by the module that needs it


def _missing() -> list[str]:
    """The packages that the picture needs and that cannot be imported."""
    missing = []
    for module, package in PACKAGES.items():
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(package)
    return missing


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    parse.__name__ = "integer"  # argparse names the type in its message
    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sslfast.augment",
        description="Draw the views that a recipe makes of images: one row an image, first the original with the crop "
        "boxes, then its views with what was drawn for each. Pixels are those that are stored, as for a transform: an "
        "orientation in EXIF is not applied. Needs matplotlib and pillow.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="PATH", help="an image, or a folder of images (with subfolders)")
    parser.add_argument("--recipe", choices=RECIPES, default="simclr", help="whose views")
    parser.add_argument("--out", type=Path, default=Path("views.png"), help="the picture; its suffix names the format")
    parser.add_argument("--images", type=_at_least(1), default=4, help="how many images of a folder, at most")
    parser.add_argument("--seed", type=_at_least(0), default=0, help="of the random choices")
    parser.add_argument(
        "--size", type=_at_least(1), default=224, help="side of the global views; local ones follow, 96 at 224"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and write the picture; bad input ends with status 2 and a message."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if missing := _missing():
        parser.error(f"the picture needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    from ._grid import draw, read_images

    has_local = len({view.size for view in recipe(given.recipe)}) > 1
    local_size = max(1, round(given.size * 96 / 224)) if has_local else None
    try:
        images, names, unreadable = read_images(given.source, given.images)
        transform = MultiViewTransform(recipe(given.recipe, given.size, local_size), seed=given.seed)
        params = transform.sample_params(images, range(len(images)), epoch=0)
        made = list(transform.apply(images, params))
        given.out.parent.mkdir(parents=True, exist_ok=True)
        title = f"{given.recipe}, {transform.views[0].semantics} semantics, seed {given.seed}"
        draw(images, names, transform.views, params, made, title, given.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for file in unreadable:
        print(f"skipped, not readable: {file}", file=sys.stderr)
    print(f"{given.out} written: {len(transform.views)} views of {len(images)} image(s) by recipe {given.recipe!r}")


if __name__ == "__main__":
    main()
