"""Augmentation for self-supervised learning: views of images from uint8 pixels to training tensors, CPU and GPU."""

from .params import ViewParams
from .recipes import RECIPES, recipe
from .spec import IMAGENET_MEAN, IMAGENET_STD, ViewSpec
from .transform import MultiViewTransform, apply, sample_params

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MultiViewTransform",
    "RECIPES",
    "ViewParams",
    "ViewSpec",
    "apply",
    "recipe",
    "sample_params",
]
