"""Which views suit the demos' images."""

from __future__ import annotations

from dataclasses import replace

from sslfast.augment import ViewSpec, recipe

from .data import Dataset


def views_for(data: Dataset, local: int = 0) -> list[ViewSpec]:
    """Two views alike: SimCLR's for photographs; for drawings on black weaker ones, in which a class survives.

    ``local``: so many more follow, of smaller parts of the image and no larger than the two see at least.
    """
    views = _two_views(data)
    least = views[0].scale[0]
    return views + [replace(views[0], scale=(least / 2, least))] * local


def _two_views(data: Dataset) -> list[ViewSpec]:
    views = recipe("simclr", size=data.view_size)
    if data.photos:
        return views
    weaker = dict(
        scale=(0.4, 1.0), interpolation="bilinear", brightness=0.4, contrast=0.4, blur_p=0.3, sigma=(0.1, 1.0)
    )
    return [replace(view, flip_p=0.5 if data.mirror else 0.0, **weaker) for view in views]
