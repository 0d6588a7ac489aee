"""Named recipes: the views of published methods."""

from __future__ import annotations

from .spec import IMAGENET_MEAN, IMAGENET_STD, ViewSpec


def recipe(name: str, size: int | tuple[int, int] = 224) -> list[ViewSpec]:
    """The views of a published method."""
    if name == "simclr":
        view = ViewSpec(
            size, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, jitter_p=0.8, grey_p=0.2, blur_p=0.5
        )
        return [view, view]
    if name == "supervised":
        return [ViewSpec(size, mean=IMAGENET_MEAN, std=IMAGENET_STD)]
    raise ValueError(f"name must be one of simclr, supervised, got {name!r}")
