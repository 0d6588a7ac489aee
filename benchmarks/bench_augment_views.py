"""Views of photographs, from sampling to the cast, beside torchvision, torchvision on PIL images, and kornia.

Sizes: a run makes views of ``images`` images, ``batch`` a call (1: image by image, as the worker of a data loader),
from ``source`` to ``size`` pixels a side, ``views`` of each, on ``threads`` threads; ``pil``: 1 in PIL's semantics.

Every run draws anew, with the same probabilities on both sides. A row of the CSV stands for at least five runs: 320
views, of 32 × 32 images 2,560, of DINO's kinds 800.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sslfast import reference
from sslfast.augment import MultiViewTransform

from . import peers
from .augmentation import bytes_moved, choices, exact, photographs, proven, threads, views
from .harness import CALL, Case, Work, require_backend

BASELINES = ("torchvision", "pillow", "kornia")
PROVIDERS = (*BASELINES, "sslfast")
TINY = {"images": 2, "batch": 2, "source": 56, "size": 40, "views": 1, "threads": 1, "pil": 0}

# Disagreement with float64. PyTorch's own interpolation in float32 is 3e-5 away. kornia's weights of grey have two
# digits less. In PIL's semantics bytes are rounded after each step, and a hue one byte off moves a channel by 6/255.
ROUNDED = 1e-4
KORNIA = 2e-3
ROUNDED_TO_BYTES = 8e-2


def _case(device: str, dtype: str = "float32", **sizes: int) -> Case:
    usual = {"images": 64, "batch": 64, "source": 256, "size": 224, "views": 1, "threads": 1, "pil": 0}
    return Case("augment_views", {**usual, **sizes}, dtype, CALL, device)


def cases(device: str, quick: bool) -> list[Case]:
    """SimCLR's view image by image (in both semantics), in batches, and of 32 × 32 images; DINO's ten views.

    On a GPU: SimCLR's view of a batch of 256 in bfloat16, channels last.
    """
    if device == "cuda":
        return [_case(device, "bfloat16", images=256, batch=256)]
    two = min(2, torch.get_num_threads())
    simclr = [_case(device, batch=1), _case(device, batch=1, pil=1), _case(device, threads=two)]
    small = _case(device, images=512, batch=512, source=32, size=32, threads=two)
    return simclr if quick else [*simclr, small, _case(device, images=16, batch=1, views=10)]


def setup(case: Case, provider: str) -> Work:
    """The closure of one provider over ``images``, which are there as each wants them (tensors or PIL images)."""
    images = photographs(case.shape["images"], case.shape["source"]).to(case.device)
    inputs: Sequence[Any] = images if case.shape["batch"] == 1 else images.split(case.shape["batch"])
    if case.shape["pil"] and case.shape["batch"] == 1:
        from PIL import Image

        inputs = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    if provider == "sslfast":
        return _sslfast(case, inputs)
    if provider == "kornia":
        return _kornia(case, inputs)
    pipelines = [peers.torchvision_pipeline(spec) for spec in views(case)]
    work = _work(case, inputs, lambda image, first, epoch: tuple(pipeline(image) for pipeline in pipelines))
    rows = choices(case, proven(case)).table.tolist()

    def proof() -> tuple[Tensor, ...]:
        """Its operations with our choices, on floats, where it rounds no bytes on the way."""
        few = inputs if case.shape["pil"] else images[: proven(case)] / 255
        return tuple(
            torch.stack([peers.torchvision_view(few[b], row, spec) for b, row in enumerate(of_view)])
            for of_view, spec in zip(rows, views(case), strict=True)
        )

    return Work(work.prepare, work.run, proof, ROUNDED_TO_BYTES if case.shape["pil"] else ROUNDED)


def _work(case: Case, inputs: Sequence[Any], make: Callable[[Any, int, int], tuple[Tensor, ...]]) -> Work:
    """``make(input, number of its first image, epoch)`` over all inputs, in another epoch each time."""
    epochs = itertools.count()

    def run(epoch: int) -> tuple[Tensor, ...]:
        made: tuple[Tensor, ...] = ()
        with threads(case.shape["threads"]):
            for index, images in enumerate(inputs):
                made = make(images, index * case.shape["batch"], epoch)
        return made

    return Work(lambda: next(epochs), run)


def _sslfast(case: Case, inputs: Sequence[Any]) -> Work:
    channels_last = case.device == "cuda"
    transform = MultiViewTransform(views(case), dtype=case.torch_dtype, channels_last=channels_last)
    batch, count = case.shape["batch"], proven(case)
    ids = torch.arange(case.shape["images"], device=case.device)

    def make(images: Any, first: int, epoch: int) -> tuple[Tensor, ...]:
        return tuple(transform(images, first if batch == 1 else ids[first : first + batch], epoch=epoch))

    def proof() -> tuple[Tensor, ...]:
        if batch > 1:
            return tuple(view[:count] for view in make(inputs[0], 0, 0))
        each = [make(inputs[b], b, 0) for b in range(count)]
        return tuple(torch.stack(of_view) for of_view in zip(*each, strict=True))

    require_backend(lambda: make(inputs[0], 0, 0), "cuda" if case.device == "cuda" else "cpu")
    work = _work(case, inputs, make)
    return Work(work.prepare, work.run, proof, ROUNDED_TO_BYTES if case.shape["pil"] else None)


def _kornia(case: Case, inputs: Sequence[Tensor]) -> Work:
    (spec,) = views(case)
    pipeline = peers.kornia_pipeline(spec)
    memory = torch.channels_last if case.device == "cuda" else torch.contiguous_format

    def make(images: Tensor, first: int, epoch: int) -> tuple[Tensor, ...]:
        return (pipeline(images).to(case.torch_dtype, memory_format=memory),)

    def proof() -> tuple[Tensor, ...]:
        """Its crops are not antialiased: what is compared is the rest of its pipeline, on crops of the reference."""
        rows = choices(case, proven(case)).table[0]
        plain = torch.cat([rows[:, :5], torch.zeros_like(rows[:, 5:])], 1)
        plain[:, 9:13] = -1  # crop, resize and flip alone
        crops = reference.augment_views([inputs[0][: len(rows)]], plain[None], size=spec.height_width)[0]
        made = [peers.kornia_colours(crop, row, spec) for crop, row in zip(crops, rows.tolist(), strict=True)]
        return (torch.stack(made).to(case.torch_dtype),)

    work = _work(case, inputs, make)
    return Work(work.prepare, work.run, proof, KORNIA if case.dtype == "float32" else None)


def truth(case: Case) -> tuple[Tensor, ...]:
    """The reference in float64: the first images' views in epoch 0."""
    return exact(case)


def cost(case: Case) -> tuple[float, float]:
    """Bound by bytes alone: each crop read once, each view written once."""
    return 0.0, bytes_moved(case)


def why_skip(case: Case, provider: str, metric: str) -> str | None:
    """Each provider where it does the same work."""
    missing = [name for name in ("sklearn", "PIL") if importlib.util.find_spec(name) is None]
    if missing:
        return f"the photographs need {missing[0]}, which is not installed"
    one = case.shape["batch"] == 1
    if provider == "torchvision" and (case.shape["pil"] or not one):
        return "measured on single tensors: of a batch it draws one set of parameters"
    if provider == "pillow" and not case.shape["pil"]:
        return "measured in its own semantics"
    if provider == "kornia" and one:
        return "measured in batches"
    return None
