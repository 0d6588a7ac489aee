"""What the scripts share and what is none of their package's: command line, batches, views, an encoder, a stopwatch."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from examples.common.data import Dataset, load

T = TypeVar("T")


def parse(
    arguments: Sequence[str] | None, text: str, batch_size: int | Mapping[str, int], data: str | None = "fashion-mnist"
) -> argparse.Namespace:
    """The flags of every script; ``data=None``: it brings its own and has no ``--data``.

    ``batch_size``: that of each method, where the script has several and so ``--method``, whose default is the first.
    """
    head = text.splitlines()[0]
    parser = argparse.ArgumentParser(description=head, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--sslfast", action="store_true", help="call sslfast.patch first; nothing else changes")
    parser.add_argument("--steps", type=int, default=20, help="of training")
    several = isinstance(batch_size, Mapping)
    usual, text = (argparse.SUPPRESS, " (default: the method's)") if several else (batch_size, "")
    parser.add_argument("--batch-size", type=int, default=usual, help=f"images or pairs a step{text}")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and views")
    if data is not None:
        parser.add_argument("--data", default=data, help="digits, fashion-mnist, or a folder of images")
    if several:
        parser.add_argument("--method", choices=batch_size, default=next(iter(batch_size)), help="what it trains")
    options = parser.parse_args(arguments)
    if several and "batch_size" not in options:
        options.batch_size = batch_size[options.method]
    for name, least in (("steps", 1), ("batch_size", 2)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}")
    return options


def images(options: argparse.Namespace) -> Dataset:
    """``--data``; ends the program where a batch would be larger than the set."""
    data = load(options.data)
    if len(data.train) < options.batch_size:
        sys.exit(f"--batch-size {options.batch_size}: {data.name} has {len(data.train)} training images")
    return data


def batches(rows: int, options: argparse.Namespace) -> Iterator[Tensor]:
    """The row numbers of each step's batch, [batch]: shuffled, an epoch's rest left out, the same for the same seed."""
    draw = Generator().manual_seed(options.seed)
    left: list[Tensor] = []
    for _ in range(options.steps):
        if not left:
            order = torch.randperm(rows, generator=draw)
            left = list(order[: rows // options.batch_size * options.batch_size].split(options.batch_size))
        yield left.pop(0)


def two_views(x: Tensor) -> Tensor:
    """Two random views of each image, [2B, C, H, W] of x [B, C, H, W] in [0, 1]: turned, scaled, moved, relit."""
    x = torch.cat([x, x])

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(len(x)).uniform_(low, high)

    angle, scale = uniform(-0.3, 0.3), uniform(0.7, 1.1)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [torch.stack([cos, -sin, uniform(-0.2, 0.2)], 1), torch.stack([sin, cos, uniform(-0.2, 0.2)], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, align_corners=False)
    contrast, light = (u.view(-1, 1, 1, 1) for u in (uniform(0.6, 1.4), uniform(-0.2, 0.2)))
    return (moved * contrast + light).clamp_(0, 1)


class Encoder(nn.Sequential):
    """Three convolutions and the mean over positions: [B, C, H, W] to [B, 128]."""

    features = 128

    def __init__(self, channels: int) -> None:
        layers: list[nn.Module] = [nn.BatchNorm2d(channels)]  # standardises the pixels
        for width in (32, 64, self.features):
            convolution = nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Meter:
    """The stopwatch of a training: what a step takes, and the loss's part of it.

    The loss's part runs from :meth:`loss_begins` until the gradients of the embeddings are there: its forward and its
    backward, and nothing of the network's.

    Args:
        script: its name.
        options: what it was called with.
    """

    def __init__(self, script: str, options: argparse.Namespace) -> None:
        self.script, self.options = script, options
        self.losses: list[float] = []
        self.step_seconds: list[float] = []
        self.loss_seconds: list[float] = []
        self._last_gradient = 0.0

    def steps(self, items: Iterable[T]) -> Iterator[T]:
        """``items``, one a step, behind a progress bar; making an item is part of its step."""
        self.start, self.memory_before = time.perf_counter(), _peak_mib()
        with tqdm(total=self.options.steps, desc=self.script, unit="step") as bar:
            begin = self.start
            for item in items:
                yield item
                now = time.perf_counter()
                self.step_seconds.append(now - begin)
                self.loss_seconds.append(self._last_gradient - self._loss_begin)
                begin = now
                bar.set_postfix(loss=f"{self.losses[-1]:.4f}")
                bar.update()
        self.total, self.memory_peak = time.perf_counter() - self.start, _peak_mib()

    def loss_begins(self, *embeddings: Tensor) -> None:
        """The next call is the loss's, of these embeddings."""
        for z in embeddings:
            z.register_hook(self._gradient_is_there)
        self._loss_begin = time.perf_counter()

    def _gradient_is_there(self, _: Tensor) -> None:
        self._last_gradient = time.perf_counter()

    def report(self, **further: float) -> dict[str, Any]:
        """Print, as the last line of stdout, one JSON object; also returned."""
        share = [loss / step for loss, step in zip(self.loss_seconds, self.step_seconds, strict=True)]
        found = {
            "script": self.script,
            **vars(self.options),
            "threads": torch.get_num_threads(),
            "losses": self.losses,
            "seconds_per_step": statistics.median(self.step_seconds),
            "loss_seconds_per_step": statistics.median(self.loss_seconds),
            "loss_share": statistics.median(share),
            "seconds_total": self.total,
            "peak_memory_mib": self.memory_peak,
            "peak_memory_before_training_mib": self.memory_before,
            **further,
        }
        print(json.dumps(found), flush=True)
        return found


def _peak_mib() -> float:
    """The largest resident set that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
