"""What the benchmarks of masking share: photographs, masks given by noise, and the published steps beside the kernels.

The steps are those of the published code, written from its formulas: the index of a gather is repeated over the
features, what is masked is computed first and thrown away, and each step is a pass over all tokens.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sslfast.augment import IMAGENET_MEAN, IMAGENET_STD
from sslfast.masking import Masks, random_masks

from .augmentation import photographs
from .contrastive import generator
from .harness import WHOLE, Case, Work, require_backend

# Of (what is given, *what learns): first the value that is differentiated, then results without a gradient.
Function = Callable[..., tuple[Tensor, ...]]

GPU_BATCH = 256


@dataclass(frozen=True)
class Problem:
    """What one case computes from: leaves that learn, what is given, and the incoming gradient (of a scalar: None)."""

    learn: tuple[Tensor, ...]
    given: dict[str, Tensor]
    grad: Tensor | None = None

    def exact(self) -> Problem:
        """The same numbers in float64."""
        return Problem(
            tuple(x.detach().double().requires_grad_() for x in self.learn),
            {name: x.double() if x.is_floating_point() else x for name, x in self.given.items()},
            None if self.grad is None else self.grad.double(),
        )


@dataclass(frozen=True)
class Benchmark:
    """One operation beside the code that it replaces.

    ``own`` names that code, ``published`` and ``fused`` are the two functions of a case, and ``whole_cost`` counts what
    forward and backward together need. ``batch`` is the size of the shape that is 256 on a GPU.
    """

    op: str
    own: str
    sweep: Sequence[dict[str, int]]
    problem: Callable[[Case], Problem]
    published: Callable[[Case], Function]
    fused: Callable[[Case], Function]
    whole_cost: Callable[[Case], tuple[float, float]]
    tiny: dict[str, int]
    pictures: bool = True
    mode: str = "both"
    tolerance: float | None = None

    @property
    def baselines(self) -> tuple[str, ...]:
        return (self.own, "compile")

    @property
    def providers(self) -> tuple[str, ...]:
        return (*self.baselines, "sslfast")

    def cases(self, device: str, quick: bool) -> list[Case]:
        """The sweep in float32; on a GPU in bfloat16, in batches of 256."""
        sweep = self.sweep[: 1 if quick else None]
        if device == "cuda":
            return [Case(self.op, {**shape, "B": GPU_BATCH}, "bfloat16", self.mode, device) for shape in sweep]
        return [Case(self.op, dict(shape), "float32", self.mode, device) for shape in sweep]

    def setup(self, case: Case, provider: str) -> Work:
        """The closure of one provider."""
        if provider == "sslfast":
            small = replace(case, shape=self.tiny)
            backend = "cuda" if case.device == "cuda" else "cpu"
            require_backend(self._work(self.fused(small), self.problem(small)), backend)
            return self._work(self.fused(case), self.problem(case), case.mode)
        function = self.published(case)
        if provider == "compile":
            function = torch.compile(function, fullgraph=True, dynamic=False)
        return self._work(function, self.problem(case), case.mode)

    def _work(self, function: Function, problem: Problem, mode: str = "both") -> Work:
        def forward(_: None) -> tuple[Tensor, ...]:
            value, *others = function(problem.given, *problem.learn)
            return (value.detach(), *others)

        def gradients(value: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(value, problem.learn, problem.grad) if problem.learn else ()

        def both(_: None) -> tuple[Tensor, ...]:
            value, *others = function(problem.given, *problem.learn)
            return (value.detach(), *others, *gradients(value))

        def in_mode(mode: str) -> Work:
            return self._work(function, problem, mode)

        if mode == "backward":
            prepare = lambda: function(problem.given, *problem.learn)[0]  # noqa: E731
            return Work(prepare, gradients, tolerance=self.tolerance, in_mode=in_mode)
        return Work(lambda: None, forward if mode == "forward" else both, tolerance=self.tolerance, in_mode=in_mode)

    def truth(self, case: Case) -> tuple[Tensor, ...]:
        """The published code in float64 on the same numbers."""
        results = self._work(self.published(case), self.problem(case).exact())()
        return tuple(result.double() for result in results)

    def cost(self, case: Case) -> tuple[float, float]:
        """What forward and backward together need; of one of them alone nothing is claimed."""
        return self.whole_cost(case) if case.mode in WHOLE else (0.0, 0.0)

    def why_skip(self, case: Case, provider: str, metric: str) -> str | None:
        """Nothing but photographs may be missing."""
        return no_photographs() if self.pictures else None


def of_tokens(op: str, width: int, **options: Any) -> Benchmark:
    """A movement of MAE's tokens at ViT-B/16's length, three quarters masked; ``learned``: the position learns too."""
    return Benchmark(
        op=op,
        own="mae",
        sweep=[{"B": 64, "L": 196, "D": width, "K": 49, "learned": learned} for learned in (0, 1)],
        tiny={"B": 3, "L": 11, "D": 20, "K": 4, "learned": 0},
        pictures=False,
        **options,
    )


def of_logits(op: str, own: str, *sizes: tuple[int, int], **options: Any) -> Benchmark:
    """Of logits or scores [B, K] in memory: these sizes, and 32 × 1,024."""
    sweep = [{"B": b, "K": k} for b, k in (*sizes, (32, 1024))]
    return Benchmark(op=op, own=own, sweep=sweep, tiny={"B": 9, "K": 70}, pictures=False, **options)


def problem_with_position(case: Case, learn: list[Tensor], given: dict[str, Tensor], rows: int) -> Problem:
    """``learn``, the position of class token and tokens where it does, and what else is ``given``; for ``rows``."""
    b, d = case.shape["B"], case.shape["D"]
    position = normal(case, 1, 1 + tokens(case), d)
    if case.shape["learned"]:
        learn = [*learn, position]
    else:
        given = {**given, "position": position}
    return Problem(tuple(map(leaf, learn)), given, normal(case, b, rows, d))


def position_of(given: dict[str, Tensor], learned: tuple[Tensor, ...]) -> Tensor:
    """The position, which learns or not."""
    return learned[0] if learned else given["position"]


def no_photographs() -> str | None:
    """Why there are no photographs, where there are none."""
    missing = [name for name in ("sklearn", "PIL") if importlib.util.find_spec(name) is None]
    return f"the photographs need {missing[0]}, which is not installed" if missing else None


# ------------------------------------------------------------------------------------------------------------- inputs


def grid_side(case: Case) -> int:
    """Patches along a side of the image."""
    return case.shape["side"] // case.shape["patch"]


def tokens(case: Case) -> int:
    """L: patches of an image."""
    return case.shape["L"] if "L" in case.shape else grid_side(case) ** 2


def pixels(case: Case) -> int:
    """Values of one patch of three channels."""
    return 3 * case.shape["patch"] ** 2


def pictures(case: Case) -> Tensor:
    """[B, 3, side, side] float32: normalised photographs; in float32 whatever learns, as under autocast."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((photographs(case.shape["B"], case.shape["side"]) / 255 - mean) / std).to(case.device)


def normal(case: Case, *size: int, scale: float = 1.0) -> Tensor:
    """Normal numbers of the case's dtype; the same for the same size, whoever asks."""
    draw = generator().manual_seed(sum(size))
    return (scale * torch.randn(*size, generator=draw)).to(case.device, case.torch_dtype)


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def noise(case: Case) -> Tensor:
    """[B, L] float32 by which patches are kept: no two of an image are equal, so that every sort says the same."""
    uniform = torch.rand(case.shape["B"], tokens(case), generator=generator())
    return (uniform.argsort(1) / tokens(case)).to(case.device)


def ratio(case: Case) -> float:
    """The share to mask of which int(L·(1 − share)) is K, whatever the rounding."""
    return max(0.0, 1 - (case.shape["K"] + 0.5) / tokens(case))


def masks(case: Case, order: str = "noise") -> Callable[[Tensor], Masks]:
    """``random_masks`` of a case, as a function of the noise."""
    return lambda noise: random_masks(
        len(noise), noise.shape[1], ratio(case), order=order, noise=noise, device=noise.device
    )


def shuffle(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """MAE's ids_keep [B, K], ids_restore [B, L] and mask [B, L] (1 where removed) of ``noise(case)``."""
    order = noise(case).argsort(1)
    restore = order.argsort(1)
    return order[:, : case.shape["K"]], restore, (restore >= case.shape["K"]).float()


# ------------------------------------------------------------------------------------------- masked autoencoders' steps


def random_masking(x: Tensor, kept: int, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(kept tokens [B, K, D], mask [B, L], 1 where removed, order to restore [B, L]) of tokens x [B, L, D].

    Two full sorts, a gather whose index is repeated over the features, and one more to unshuffle the mask.
    """
    order = noise.argsort(dim=1)
    restore = order.argsort(dim=1)
    index = order[:, :kept].unsqueeze(-1).repeat(1, 1, x.shape[2])
    mask = torch.ones(noise.shape, device=x.device)
    mask[:, :kept] = 0
    return x.gather(1, index), mask.gather(1, restore), restore


def visible_tokens(x: Tensor, class_token: Tensor, position: Tensor, kept: int, noise: Tensor) -> tuple[Tensor, ...]:
    """The encoder's input [B, 1 + K, D] of all tokens [B, L, D]: positions to all of them, masking, class token."""
    tokens, mask, restore = random_masking(x + position[:, 1:], kept, noise)
    first = (class_token + position[:, :1]).expand(len(x), -1, -1)
    return torch.cat([first, tokens], 1), mask, restore


def decoder_input(x: Tensor, mask_token: Tensor, position: Tensor, restore: Tensor) -> Tensor:
    """All tokens [B, 1 + L, D] of the encoder's output [B, 1 + K, D]: fill up, unshuffle, class token, positions."""
    hidden = mask_token.repeat(len(x), restore.shape[1] - (x.shape[1] - 1), 1)
    filled = torch.cat([x[:, 1:], hidden], 1)
    unshuffled = filled.gather(1, restore.unsqueeze(-1).repeat(1, 1, x.shape[2]))
    return torch.cat([x[:, :1], unshuffled], 1) + position


def patchify(images: Tensor, patch: int) -> Tensor:
    """[B, L, patch²·3] of [B, 3, H, H], channels innermost."""
    count, _, side, _ = images.shape
    split = images.reshape(count, 3, side // patch, patch, side // patch, patch)
    return torch.einsum("bciyjx->bijyxc", split).reshape(count, (side // patch) ** 2, patch * patch * 3)


def pixel_loss(images: Tensor, prediction: Tensor, mask: Tensor, patch: int) -> Tensor:
    """Mean squared error of the masked patches, of pixels normalised patch by patch with the unbiased variance."""
    target = patchify(images, patch)
    mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    target = (target - mean) / (variance + 1e-6) ** 0.5
    each = ((prediction - target) ** 2).mean(-1)
    return (each * mask).sum() / mask.sum()
