"""Which random numbers are for what: the one table of streams, the same as in ``csrc/common/streams.h``.

A stream takes the place of the view's number in the counter of Philox. Views of images are numbered from 0, and all
else begins at 2^15, so no task shares a number with a view of the same sample. What draws for each of several views or
masks of a sample has 2^10 streams, one for each; ``tests`` compare the table with that of C++ and look for overlaps.
"""

from __future__ import annotations

FIRST, LAST = 2**15, 2**16 - 1
EACH = 2**10  # streams of what has one for each view: numbers of views are below this


def _of_each_view(group: int) -> range:
    return range(FIRST + group * EACH, FIRST + (group + 1) * EACH)


STREAMS = {
    "rotation": range(FIRST, FIRST + 1),
    "jigsaw": range(FIRST + 1, FIRST + 2),
    "permutations": range(FIRST + 2, FIRST + 3),
    "relative_location": range(FIRST + 3, FIRST + 4),
    "color_noise": range(FIRST + 4, FIRST + 5),
    "inpainting": range(FIRST + 5, FIRST + 6),
    "region": range(FIRST + 6, FIRST + 7),
    "random_mask": _of_each_view(1),
    "block_mask": _of_each_view(2),
    "multiblock_mask": _of_each_view(3),
    "token_selection": _of_each_view(4),
    "token_replacement": _of_each_view(5),
    "batch_of_masks": _of_each_view(6),
    "multiblock_sizes": _of_each_view(7),
    "slices": _of_each_view(8),
}


def stream_of(name: str, view: int = 0) -> int:
    """The number of a stream by its name in ``STREAMS``."""
    return STREAMS[name][view]
