"""Pretext tasks on batches: rotation, jigsaw puzzles, relative patch location, colorization, inpainting.

Each takes images [B, C, H, W] and gives inputs and labels, on the images' device. What is drawn depends on (seed,
epoch, sample id) alone, as for the views: not on the batch, the worker, the rank or the device.
"""

from .colorization import (
    Colorization,
    Colorized,
    color_bins,
    colorization,
    decode_colors,
    dense_colors,
    lab_to_rgb,
    rebalancing_weights,
    rgb_to_lab,
)
from .inpainting import Inpainted, Inpainting, inpainting
from .jigsaw import Jigsaw, Puzzle, jigsaw, permutation_set
from .relative_location import PatchPair, RelativeLocation, relative_location
from .rotation import Rotated, Rotation, rotation

__all__ = [
    "Colorization",
    "Colorized",
    "Inpainted",
    "Inpainting",
    "Jigsaw",
    "PatchPair",
    "Puzzle",
    "RelativeLocation",
    "Rotated",
    "Rotation",
    "color_bins",
    "colorization",
    "decode_colors",
    "dense_colors",
    "inpainting",
    "jigsaw",
    "lab_to_rgb",
    "permutation_set",
    "rebalancing_weights",
    "relative_location",
    "rgb_to_lab",
    "rotation",
]
