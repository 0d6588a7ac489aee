"""Colorization: the colours of an image from its lightness, as a class of colour for each pixel."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._checks import check_share, real_number, warn_of_bytes, whole_number
from .._library import kept_on_device, on_the_host
from ._draws import check_images, settle, unit_scale

# Linear sRGB to XYZ (D65), and the white point, with scikit-image's digits, which the released code converts with.
XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
WHITE = (0.95047, 1.0, 1.08883)
TO_XYZ = [[part / white for part in row] for row, white in zip(XYZ, WHITE, strict=True)]  # X, Y and Z over white's
TO_RGB = np.linalg.inv(TO_XYZ).tolist()
KNEE = 6 / 29  # where CIE's cube root goes over into a line

STEP = 10  # of the grid of colours
# The paper's 313 colours: (a, the first b, the last b), in steps of 10. They hold each corner of each 10 × 10
# square of the ab plane that a colour of sRGB falls into. Those are 309, and the released list has four more at its
# rim: (40, 90), (100, −90), (100, −10) and (100, 0).
ROWS = (
    (-90, 50, 90),
    (-80, 20, 90),
    (-70, 0, 90),
    (-60, -20, 90),
    (-50, -30, 100),
    (-40, -40, 100),
    (-30, -50, 100),
    (-20, -50, 100),
    (-10, -60, 100),
    (0, -70, 100),
    (10, -80, 90),
    (20, -80, 90),
    (30, -90, 90),
    (40, -100, 90),
    (50, -100, 80),
    (60, -110, 80),
    (70, -110, 80),
    (80, -110, 70),
    (90, -110, 70),
    (100, -90, 0),
)
RANGE, CELL = 110.0, 2.5  # the table of nearest colours: a and b from −RANGE to RANGE, in squares of CELL
FAR = 1e6  # where the table's padding lies


class Colorized(NamedTuple):
    """What to predict colours from, the colours, and the colours as classes.

    Attributes:
        lightness: [B, 1, H, W] float32: (L − 50)/100.
        ab: [B, 2, h, w] float32, CIE Lab's a and b.
        bins: [B, K, h, w] int64: the K nearest colours, nearest first.
        weights: [B, K, h, w] float32: how much each of them is the target; sums to 1 over K.

    Example:
        >>> found = sslfast.pretext.colorization(torch.rand(2, 3, 32, 32), neighbours=5)
        >>> found.weights.shape
        torch.Size([2, 5, 32, 32])
    """

    lightness: Tensor
    ab: Tensor
    bins: Tensor
    weights: Tensor


def _linear(channels: Tensor, matrix: list[list[float]]) -> Tensor:
    """[3, 3] · [B, 3, H, W], as sums: autocast and TF32 would round the factors of a matrix product."""
    first, second, third = channels.unbind(1)
    return torch.stack([a * first + b * second + c * third for a, b, c in matrix], dim=1)


def rgb_to_lab(images: Tensor) -> Tensor:
    """CIE Lab (D65) of sRGB.

    Args:
        images: [B, 3, H, W], uint8, or floating point on the scale 0 … 1.

    Returns:
        [B, 3, H, W] float32 (float64 for float64): L from 0 to 100, a from −86 to 98, b from −108 to 94.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> lightness, a, b = sslfast.pretext.rgb_to_lab(torch.ones(1, 3, 1, 1)).flatten().tolist()
        >>> round(lightness, 2)
        100.0
    """
    check_images(images, (3,))
    warn_of_bytes(images)
    rgb = unit_scale(images)
    linear = torch.where(rgb > 0.04045, ((rgb.clamp_min(0.0) + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = _linear(linear, TO_XYZ)
    f = torch.where(xyz > KNEE**3, xyz.clamp_min(KNEE**3) ** (1 / 3), xyz / (3 * KNEE**2) + 4 / 29)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """sRGB of CIE Lab (D65), clamped to [0, 1]: the inverse of :func:`rgb_to_lab`.

    Args:
        lab: [B, 3, H, W] float32 or float64.

    Returns:
        [B, 3, H, W], ``lab``'s dtype.

    Example:
        >>> images = torch.rand(1, 3, 8, 8)
        >>> lab = sslfast.pretext.rgb_to_lab(images)
        >>> torch.allclose(sslfast.pretext.lab_to_rgb(lab), images, atol=1e-4)
        True
    """
    check_images(lab, (3,))
    lightness, a, b = unit_scale(lab).unbind(1)
    y = (lightness + 16) / 116
    f = torch.stack([y + a / 500, y, y - b / 200], dim=1)
    xyz = torch.where(f > KNEE, f**3, 3 * KNEE**2 * (f - 4 / 29))
    linear = _linear(xyz, TO_RGB).clamp(0, 1)
    return torch.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear).clamp(0, 1)


@kept_on_device
def _bins(device: torch.device) -> Tensor:
    grid = [(a, b) for a, first, last in ROWS for b in range(first, last + 1, STEP)]
    return torch.tensor(grid, dtype=torch.float32, device="cpu").to(device)


def color_bins(device: torch.device | str = "cpu") -> Tensor:
    """[313, 2] float32: a and b of the classes of colour, in the order of the released list (by a, then by b).

    Example:
        >>> sslfast.pretext.color_bins().shape
        torch.Size([313, 2])
    """
    return _bins(torch.device(device)).clone()


@functools.lru_cache(maxsize=8)
def _candidate_arrays(neighbours: int) -> tuple[np.ndarray, np.ndarray]:
    """For each square of the ab plane, every bin that can be among the nearest to a point in it: [squares, K] int64
    numbers, and [squares, K, 2] float32 a and b.

    From the square's centre to any point in it is at most r = CELL/√2. If the centre's k-th nearest bin is at d, k bins
    are within d + r of the point, so its k nearest are, and those lie within d + 2r of the centre. Rows are in
    ascending order and padded with 313, far away.
    """
    with on_the_host():
        bins = _bins(torch.device("cpu")).double()
        middle = torch.arange(-RANGE + CELL / 2, RANGE, CELL, dtype=torch.float64)
        distance = torch.cdist(torch.cartesian_prod(middle, middle), bins)
        furthest = distance.kthvalue(neighbours, dim=1, keepdim=True).values
        reach = furthest + 2**0.5 * CELL + 1e-3  # float32 may round into the next square
        near = distance <= reach
        padded = torch.where(near, torch.arange(len(bins)), len(bins)).sort(dim=1).values
        padded = padded[:, : int(near.sum(1).max())]
        colours = torch.cat([bins, torch.full((1, 2), FAR, dtype=torch.float64)])[padded]
        return padded.numpy(), colours.to(torch.float32).numpy()


@kept_on_device
def _candidates(neighbours: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``_candidate_arrays`` as tensors."""
    numbers, colours = (torch.from_numpy(array).to(device) for array in _candidate_arrays(neighbours))
    return numbers, colours


@dataclass(frozen=True)
class Colorization:
    """Lightness, and the colour of each pixel as a distribution over 313 classes.

    Args:
        stride: colours of every n-th pixel, down and across (the paper's network predicts at a quarter of the
            resolution: 4). Default 1.
        neighbours: the classes among which a colour is divided, 1 to 32. Default 5, as in the paper; the released code
            takes 10.
        sigma: standard deviation of the Gaussian that divides it, in units of a and b. Default 5.

    Raises:
        ValueError: naming the argument.

    Source: Zhang et al. 2016, "Colorful Image Colorization".

    Example:
        >>> found = sslfast.pretext.Colorization(stride=4)(torch.rand(2, 3, 32, 32))
        >>> found.ab.shape
        torch.Size([2, 2, 8, 8])
    """

    stride: int = 1
    neighbours: int = 5
    sigma: float = 5.0

    def __post_init__(self) -> None:
        settle(
            self,
            stride=whole_number("stride", self.stride, 1),
            neighbours=whole_number("neighbours", self.neighbours, 1, 32),
            sigma=real_number("sigma", self.sigma),
        )
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma must be positive and finite, got {self.sigma!r}")

    def __call__(self, images: Tensor) -> Colorized:
        """Inputs and targets of a batch.

        Args:
            images: [B, 3, H, W], uint8, or floating point on the scale 0 … 1. Nothing is random here.

        Returns:
            ``Colorized(lightness, ab, bins, weights)``, with h = ⌈H/stride⌉, w = ⌈W/stride⌉. The cross-entropy with the
            soft target is ``−(weights · log_probability.gather(1, bins)).sum(1)``: no second [B, 313, h, w] for it.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        lab = rgb_to_lab(images).to(torch.float32)
        ab = lab[:, 1:, :: self.stride, :: self.stride].contiguous()
        return Colorized((lab[:, :1] - 50) / 100, ab, *self.encode(ab))

    def encode(self, ab: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest classes of colours, and their weights ∝ exp(−distance²/2σ²).

        Args:
            ab: [B, 2, h, w]; what lies beyond ±110 is clamped to it (no colour of sRGB does).

        Returns:
            (bins [B, K, h, w] int64, nearest first, the first by number among equals; weights [B, K, h, w] float32).

        Raises:
            TypeError, ValueError: naming the argument.
        """
        check_images(ab, (2,))
        point = ab.to(torch.float32).clamp(-RANGE, RANGE)
        side = int(2 * RANGE / CELL)
        square = ((point + RANGE) / CELL).to(torch.int64).clamp(0, side - 1)
        row = square[:, 0] * side + square[:, 1]  # [B, h, w]
        numbers, colours = _candidates(self.neighbours, ab.device)
        distance = (colours[row] - point.permute(0, 2, 3, 1)[..., None, :]).square().sum(-1)  # [B, h, w, candidates]
        # As whole numbers the bits of positive floats are in the floats' order; the place behind them breaks ties.
        key = distance.view(torch.int32).to(torch.int64) << 8 | torch.arange(distance.shape[-1], device=ab.device)
        order = key.topk(self.neighbours, dim=-1, largest=False).indices
        nearest = numbers.flatten()[row[..., None] * numbers.shape[1] + order]
        weights = (distance.gather(-1, order) / (-2 * self.sigma**2)).softmax(-1)
        return nearest.permute(0, 3, 1, 2).contiguous(), weights.permute(0, 3, 1, 2).contiguous()


def colorization(images: Tensor, *, stride: int = 1, neighbours: int = 5, sigma: float = 5.0) -> Colorized:
    """Lightness and colours of a batch [B, 3, H, W]: :class:`Colorization`, which says the rest.

    Example:
        >>> found = sslfast.pretext.colorization(torch.rand(2, 3, 32, 32), stride=4)
        >>> found.lightness.shape, found.bins.shape
        (torch.Size([2, 1, 32, 32]), torch.Size([2, 5, 8, 8]))
    """
    return Colorization(stride, neighbours, sigma)(images)


def dense_colors(bins: Tensor, weights: Tensor) -> Tensor:
    """The soft target in full: [B, K, h, w] classes and weights → [B, 313, h, w].

    Example:
        >>> found = sslfast.pretext.colorization(torch.rand(2, 3, 8, 8))
        >>> sslfast.pretext.dense_colors(found.bins, found.weights).shape
        torch.Size([2, 313, 8, 8])
    """
    count, _, height, width = bins.shape
    return weights.new_zeros((count, len(_bins(bins.device)), height, width)).scatter_(1, bins, weights)


def decode_colors(logits: Tensor, temperature: float = 0.38) -> Tensor:
    """Colours from predicted classes by the annealed mean, Σ_q c_q softmax(logits/T)_q.

    Args:
        logits: [B, 313, h, w] floating point, logits or log-probabilities.
        temperature: T from 1, the mean, towards 0, the mode. Default 0.38, the paper's.

    Returns:
        [B, 2, h, w] float32: a and b.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> sslfast.pretext.decode_colors(torch.zeros(2, 313, 8, 8)).shape
        torch.Size([2, 2, 8, 8])
    """
    check_images(logits, (313,))
    temperature = real_number("temperature", temperature)
    if not 0 < temperature <= 1:
        raise ValueError(f"temperature must be above 0 and at most 1, got {temperature!r}")
    annealed = (logits.to(torch.float32) / temperature).softmax(1)
    # Sums for the same reason as in _linear.
    means = [(annealed * colour[:, None, None]).sum(1) for colour in _bins(logits.device).unbind(1)]
    return torch.stack(means, dim=1)


def rebalancing_weights(histogram: Tensor, *, lam: float = 0.5, sigma: float = 5.0) -> Tensor:
    """How much a pixel counts by the class of its colour, so that rare colours are learnt.

        w ∝ ((1 − λ) p̃ + λ/Q)⁻¹, with Σ_q p̃_q w_q = 1

    Args:
        histogram: [313], how often each class is the nearest, over a data set; at least one not 0.
        lam: λ, from 0 (inverse frequency) to 1 (all alike). Default 0.5.
        sigma: standard deviation of the Gaussian over a and b that smooths the histogram to p̃; 0: none. Default 5.

    Returns:
        [313] float32; a pixel's weight is ``weights[bins[:, 0]]``.

    Raises:
        ValueError: naming the argument.

    Example:
        >>> weights = sslfast.pretext.rebalancing_weights(torch.ones(313), sigma=0.0)
        >>> round(weights.min().item(), 4), round(weights.max().item(), 4)  # all alike
        (1.0, 1.0)
    """
    bins = _bins(histogram.device).double()
    if histogram.shape != (len(bins),):
        raise ValueError(f"histogram must have shape ({len(bins)},), got {tuple(histogram.shape)}")
    lam, sigma = check_share("lam", lam), real_number("sigma", sigma)
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma must be finite and not negative, got {sigma!r}")
    share = histogram.double() / histogram.double().sum()
    if sigma > 0:
        spread = (torch.cdist(bins, bins).square() / (-2 * sigma**2)).softmax(0)  # a column is where one colour goes
        share = spread @ share
    weights = 1 / ((1 - lam) * share + lam / len(bins))
    return (weights / (share * weights).sum()).to(torch.float32)
