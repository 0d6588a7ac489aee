"""``ViewSpec``: what is drawn at random for one view, and from which ranges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .._checks import check_share, is_real, is_whole, real_number, real_numbers, whole_each
from ..ops.augment_views import LARGEST_KERNEL
from ..ops.view_params import MOST_SIDE

SEMANTICS = ("torchvision", "pil")
INTERPOLATIONS = ("bilinear", "bicubic")

JITTER = ("brightness", "contrast", "saturation", "hue")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Range = tuple[float, float]


def _pair(name: str, value: Sequence[float], low: float, high: float = math.inf) -> Range:
    try:
        first, second = real_numbers(name, value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be two numbers (low, high), got {value!r}") from None
    if not low <= first <= second <= high:  # false for NaN too
        upper = "" if high == math.inf else f" ≤ {high}"
        raise ValueError(f"{name} must be (low, high) with {low} ≤ low ≤ high{upper}, got {value!r}")
    return first, second


def _strength(name: str, value: float | Sequence[float]) -> float | Range:
    """A strength, or a range of factors."""
    if not is_real(value):
        low, high = (-0.5, 0.5) if name == "hue" else (0.0, 1e6)
        return _pair(name, value, low, high)  # type: ignore[arg-type]
    strength, most = real_number(name, value), 0.5 if name == "hue" else 1e6
    if not 0 <= strength <= most:
        raise ValueError(f"{name} must be between 0 and {most}, or (low, high), got {value!r}")
    return strength


def _factors(name: str, value: float | Range) -> Range | None:
    """The range of factors, as torchvision's ColorJitter reads a strength; ``None`` where the operation is off."""
    centre, least = (0.0, -0.5) if name == "hue" else (1.0, 0.0)
    low, high = value if isinstance(value, tuple) else (max(centre - value, least), centre + value)
    return None if low == high == centre else (low, high)


@dataclass(frozen=True)
class ViewSpec:
    """One kind of view: an antialiased random-resized crop → flip → colour jitter → greyscale → blur → solarize →
    normalise. Each step has a probability; a step that does not happen costs nothing.

    Args:
        size: side of the view in pixels, or (height, width). Default 224.
        scale: share of the image's area that the crop covers, drawn uniformly; ``None``: the whole image is resized.
        ratio: width / height of the crop, drawn log-uniformly. Default (3/4, 4/3).
        interpolation: ``"bilinear"`` (default) or ``"bicubic"`` (Keys, a = −1/2), antialiased. A bicubic view of a
            float image overshoots [0, 1] at sharp edges; as in torchvision it is not clamped here, but by the first
            colour operation that clamps. In ``pil`` semantics it is clamped to a byte.
        flip_p: probability of a mirrored view. Default 0.5.
        brightness, contrast, saturation: a strength b, meaning factors from max(0, 1 − b) to 1 + b, or (low, high).
            Default 0: off.
        hue: a strength h ≤ 0.5, meaning turns from −h to h, or (low, high); 1 is a full turn. Default 0: off.
        jitter_p: probability that the four happen at all. Default 1.
        shuffle: in an order drawn for each image (default), or in the order above.
        grey_p: probability of greyscale (three equal channels). Default 0.
        blur_p: probability of a Gaussian blur. Default 0.
        blur_kernel: its width in pixels of the view, odd, 1 to 255. Default 23 (10 % of 224, as in SimCLR). The ``pil``
            blur has no kernel size.
        sigma: its standard deviation in pixels of the view, drawn uniformly. Default (0.1, 2.0).
        solarize_p: probability that what is at least ``solarize_threshold`` is inverted. Default 0.
        solarize_threshold: on the scale 0 … 1. Default 0.5 (128 of 255 in ``pil``).
        mean, std: subtracted from and divided out of each channel at the end, on the scale 0 … 1; one number, or one a
            channel. Default: neither.
        semantics: ``"torchvision"`` (default): as torchvision's functional operations on float tensors in [0, 1].
            ``"pil"``: as PIL's operations on bytes, which round or truncate after each step; a float image is first
            rounded to bytes.

    Raises:
        ValueError: naming the argument, what it was, and what is allowed.

    A view of one channel has no hue, saturation or grey; they are skipped, as in torchvision.

    Example:
        >>> spec = sslfast.augment.ViewSpec(size=32, scale=(0.2, 1.0), brightness=0.4, blur_p=0.5)
        >>> [view] = sslfast.augment.MultiViewTransform(spec)(torch.zeros(4, 3, 40, 40), [0, 1, 2, 3])
        >>> view.shape
        torch.Size([4, 3, 32, 32])
    """

    size: int | tuple[int, int] = 224
    scale: Range | None = (0.08, 1.0)
    ratio: Range = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    flip_p: float = 0.5
    brightness: float | Range = 0.0
    contrast: float | Range = 0.0
    saturation: float | Range = 0.0
    hue: float | Range = 0.0
    jitter_p: float = 1.0
    shuffle: bool = True
    grey_p: float = 0.0
    blur_p: float = 0.0
    blur_kernel: int = 23
    sigma: Range = (0.1, 2.0)
    solarize_p: float = 0.0
    solarize_threshold: float = 0.5
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    semantics: str = "torchvision"

    def __post_init__(self) -> None:
        wanted = "a positive whole number below 2^24 or two of them"
        size = whole_each("size", self.size, 2, wanted)
        if not all(1 <= side <= MOST_SIDE for side in size):
            raise ValueError(f"size must be {wanted}, got {self.size!r}")
        self._settle("size", size[0] if is_whole(self.size) else size)
        if self.scale is not None:
            self._settle("scale", _pair("scale", self.scale, 0.0, 1.0))
            if self.scale[0] <= 0:
                raise ValueError(f"scale must begin above 0, got {self.scale!r}")
        self._settle("ratio", _pair("ratio", self.ratio, 0.0))
        if self.ratio[0] < 1e-3 or self.ratio[1] > 1e3:
            raise ValueError(f"ratio must lie between 0.001 and 1000, got {self.ratio!r}")
        for name in ("flip_p", "jitter_p", "grey_p", "blur_p", "solarize_p", "solarize_threshold"):
            self._settle(name, check_share(name, getattr(self, name)))
        for name in JITTER:
            self._settle(name, _strength(name, getattr(self, name)))
        self._settle("sigma", _pair("sigma", self.sigma, 0.0, LARGEST_KERNEL / 6))
        if self.sigma[0] <= 0:
            raise ValueError(f"sigma must begin above 0, got {self.sigma!r}")
        kernel = self.blur_kernel
        if not is_whole(kernel) or kernel % 2 == 0 or not 1 <= kernel <= LARGEST_KERNEL:
            raise ValueError(f"blur_kernel must be an odd whole number from 1 to {LARGEST_KERNEL}, got {kernel!r}")
        self._settle("blur_kernel", int(kernel))
        # The border is mirrored, and a mirror image has no more pixels than the view has.
        if self.blur_p > 0 and self.semantics == "torchvision" and kernel // 2 >= min(size):
            raise ValueError(
                f"blur_kernel must be below twice the view's side: {kernel} is too wide for size {self.size!r}"
            )
        for name in ("mean", "std"):
            given = getattr(self, name)
            values = real_numbers(name, given)
            self._settle(name, values[0] if is_real(given) else values)
            self.channels(name, 3)
            if not all(math.isfinite(v) for v in values) or (name == "std" and 0 in values):
                raise ValueError(f"{name} must be finite{' and not 0' * (name == 'std')}, got {given!r}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}")
        if self.semantics not in SEMANTICS:
            raise ValueError(f"semantics must be one of {', '.join(SEMANTICS)}, got {self.semantics!r}")

    def _settle(self, name: str, value: object) -> None:
        """Numbers of any kind become Python's, so that equal specs are equal and have one hash."""
        object.__setattr__(self, name, value)

    @property
    def height_width(self) -> tuple[int, int]:
        """The view's (height, width)."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def channels(self, name: str, count: int) -> tuple[float, ...]:
        """``mean`` or ``std`` for ``count`` channels: one number serves all."""
        values = getattr(self, name)
        if isinstance(values, float):
            return (values,) * count
        if len(values) not in (1, 3) or len(values) not in (1, count):
            raise ValueError(
                f"{name} must be one number or one a channel, got {values!r} for images of {count} channel(s): "
                f"dataclasses.replace(view, {name}=…)"
            )
        return values * count if len(values) == 1 else values

    def numbers(self) -> tuple[float, ...]:
        """What sampling needs, in the order of ``ViewNumbers`` (csrc/common/view_params.h)."""
        ranges = [_factors(name, getattr(self, name)) for name in JITTER]
        off: tuple[Range, ...] = ((1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (0.0, 0.0))
        factors = [number for r, neutral in zip(ranges, off, strict=True) for number in (r or neutral)]
        return (
            *(self.scale or (0.0, 0.0)),
            *(math.log(r) for r in self.ratio),
            self.flip_p,
            self.jitter_p,
            *factors,
            *(float(r is not None) for r in ranges),
            float(self.shuffle),
            self.grey_p,
            self.blur_p,
            *self.sigma,
            self.solarize_p,
        )
