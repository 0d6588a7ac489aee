"""Named recipes: the views of published methods, as lists of ``ViewSpec``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..ops.augment_views import LARGEST_KERNEL
from .spec import IMAGENET_MEAN, IMAGENET_STD, ViewSpec

SWAV_STD = (0.228, 0.224, 0.225)  # red is 0.228 in SwAV's code, 0.229 elsewhere
DINOV2_KERNEL = 9

# What recipes share. Sizes and blur kernels are set by ``recipe``.
_CROP = ViewSpec(mean=IMAGENET_MEAN, std=IMAGENET_STD, semantics="pil")
_SIMCLR = replace(_CROP, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, jitter_p=0.8, grey_p=0.2, blur_p=0.5)
_MOCO = replace(
    _CROP, scale=(0.2, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, jitter_p=0.8, grey_p=0.2
)
_BYOL = replace(_CROP, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter_p=0.8, grey_p=0.2)
_BICUBIC = replace(_BYOL, interpolation="bicubic")
_SWAV = replace(_SIMCLR, std=SWAV_STD)


def _two(view: ViewSpec, blur: Sequence[float] = (1.0, 0.1)) -> list[ViewSpec]:
    """BYOL's asymmetry: the first view always blurred, the second seldom, and sometimes solarised."""
    return [replace(view, blur_p=blur[0]), replace(view, blur_p=blur[1], solarize_p=0.2)]


# Global views, then local ones.
_VIEWS: dict[str, tuple[list[ViewSpec], list[ViewSpec]]] = {
    "simclr": ([replace(_SIMCLR, interpolation="bicubic", mean=0.0, std=1.0, semantics="torchvision")] * 2, []),
    "moco_v2": ([replace(_MOCO, blur_p=0.5)] * 2, []),
    "moco_v3": (_two(_BYOL), []),
    "byol": (_two(replace(_BICUBIC, semantics="torchvision")), []),
    "barlow_twins": (_two(_BICUBIC), []),
    "vicreg": (_two(_BICUBIC), []),
    "swav": ([replace(_SWAV, scale=(0.14, 1.0))] * 2, [replace(_SWAV, scale=(0.05, 0.14))] * 6),
    "dino": (_two(replace(_BICUBIC, scale=(0.4, 1.0))), [replace(_BICUBIC, scale=(0.05, 0.4), blur_p=0.5)] * 8),
    "dinov2": (
        _two(replace(_BICUBIC, scale=(0.32, 1.0), semantics="torchvision"), blur=(0.0, 0.9)),
        [replace(_BICUBIC, scale=(0.05, 0.32), blur_p=0.5, semantics="torchvision")] * 8,
    ),
    "mae": ([replace(_CROP, scale=(0.2, 1.0), interpolation="bicubic")], []),
    "supervised": ([_CROP], []),
}
RECIPES = tuple(_VIEWS)


def _fitted(view: ViewSpec, size: int | tuple[int, int], semantics: str | None, most: int) -> ViewSpec:
    """``view`` at another size, with SimCLR's kernel for it: 10 % of the shorter side, odd, 3 to ``most``."""
    sized = replace(view, size=size, blur_kernel=1)
    side = min(sized.height_width)
    kernel = min(max(3, 2 * (side // 20) + 1), most, 2 * side - 1)
    return replace(sized, blur_kernel=kernel, semantics=view.semantics if semantics is None else semantics)


def recipe(
    name: str,
    size: int | tuple[int, int] | None = None,
    local_size: int | tuple[int, int] | None = None,
    semantics: str | None = None,
) -> list[ViewSpec]:
    """The views of a published method: the global ones first, then the local ones, all cut from the original image.

    | name | views | semantics |
    |---|---|---|
    | ``simclr`` | 2, strong jitter, blur half of the time, not normalised | ``torchvision`` |
    | ``moco_v2`` | 2, area from 0.2, blur half of the time | ``pil`` |
    | ``moco_v3`` | 2, BYOL's colours and asymmetry, bilinear | ``pil`` |
    | ``byol`` | 2, the first always blurred; the second 10 % blurred, 20 % solarised | ``torchvision`` |
    | ``barlow_twins`` | 2, as BYOL's, on bytes | ``pil`` |
    | ``vicreg`` | 2, the same | ``pil`` |
    | ``swav`` | 2 of area 0.14 – 1 and 6 local of 0.05 – 0.14, SimCLR's colours | ``pil`` |
    | ``dino`` | 2 of area 0.4 – 1 and 8 local of 0.05 – 0.4, BYOL's colours | ``pil`` |
    | ``dinov2`` | 2 of area 0.32 – 1 and 8 local of 0.05 – 0.32 | ``torchvision`` |
    | ``mae`` | 1, area from 0.2, bicubic, flip | ``pil`` |
    | ``supervised`` | 1, area from 0.08, bilinear, flip | ``pil`` |

    Semantics are ``pil`` where the published results come from PIL on bytes, ``torchvision`` where they come from
    floats, and for DINOv2. Sources, and where a view here differs from the published one:

    - ``simclr``: Chen et al. 2020; google-research/simclr, ``data_util.py``. Colour strength 1, both views alike,
      values in [0, 1] without normalisation. Published, and otherwise here: bicubic without antialias, a = −3/4 (here
      with it, a = −1/2); clipped to [0, 1] at the end (here by the colour operations alone: bicubic overshoot stays in
      views that no such operation touches); contrast about the mean of each channel (here of the grey image);
      saturation in HSV (here a mixture with grey); one σ a batch (here one an image); blur padded with zeros (here
      mirrored); crops drawn by TensorFlow's rule, 100 attempts (here torchvision's, 10).
    - ``moco_v2``: Chen et al. 2020; facebookresearch/moco. The flip comes last there, which makes no difference.
    - ``moco_v3``: Chen et al. 2021; facebookresearch/moco-v3, ``main_moco.py``. Area from 0.08, the code's default, as
      for vision transformers; its ResNet-50 takes ``--crop-min=.2``.
    - ``byol``: Grill et al. 2020; google-deepmind/deepmind-research, ``byol/utils/augmentations.py``. Published, and
      otherwise here: brightness is *added*, uniform in ±0.4 (here a factor); bicubic without antialias, and contrast,
      saturation, overshoot and the blur's border as for ``simclr``. What PyTorch packages call BYOL's augmentation is,
      like this, torchvision's operations with BYOL's numbers.
    - ``barlow_twins``, ``vicreg``: Zbontar et al. 2021, Bardes et al. 2022; their repositories of facebookresearch.
    - ``swav``: Caron et al. 2020; facebookresearch/swav, ``multicropdataset.py``. It divides red by 0.228 where others
      do by 0.229, and so does this. Blur is PIL's (an early version of the code had OpenCV's).
    - ``dino``: Caron et al. 2021; facebookresearch/dino, ``main_dino.py``; iBOT has the same views.
    - ``dinov2``: Oquab et al. 2024; facebookresearch/dinov2, ``data/augmentations.py``. Its code asks for blur with
      probability 1, 0.1 and 0.5 (first global, second global, local), but applies it with 1 − p: the published models
      were trained with 0, 0.9 and 0.5, and so is this. To have it as written, replace ``blur_p`` of the first two. Its
      blur is torchvision's Gaussian of 9 taps, which only ``torchvision`` semantics has; published, the other
      operations round to bytes. Local views are 98 pixels wide where patches are 14.
    - ``mae``: He et al. 2022; facebookresearch/mae, ``main_pretrain.py``.
    - ``supervised``: the training transform of PyTorch's ImageNet example.

    Args:
        name: one of ``RECIPES``.
        size: side of the global views in pixels, or (height, width). Default 224.
        local_size: of the local views. Default 96.
        semantics: ``"torchvision"`` or ``"pil"`` for all views. Default: the recipe's.

    Blur kernels follow the size by SimCLR's rule: 10 % of the shorter side, odd, at least 3 (23 at 224, 9 at 96, 3 at
    32; less only where a view is too small for its mirror image), and for ``dinov2`` at most its 9. σ stays at 0.1 … 2
    pixels. ``pil`` blur has no kernel size.

    Returns:
        One ``ViewSpec`` a view; ``dataclasses.replace`` changes one.

    Raises:
        ValueError: the name is unknown, a size or semantics is not allowed, or the recipe has no local views.

    Example:
        >>> [view.size for view in sslfast.augment.recipe("swav")]
        [224, 224, 96, 96, 96, 96, 96, 96]
    """
    if name not in _VIEWS:
        raise ValueError(f"name must be one of {', '.join(RECIPES)}, got {name!r}")
    whole, local = _VIEWS[name]
    if local_size is not None and not local:
        raise ValueError(f"local_size must be None for {name}, which has no local views, got {local_size!r}")
    most = DINOV2_KERNEL if name == "dinov2" else LARGEST_KERNEL
    return [_fitted(view, 224 if size is None else size, semantics, most) for view in whole] + [
        _fitted(view, 96 if local_size is None else local_size, semantics, most) for view in local
    ]
