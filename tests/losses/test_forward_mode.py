"""Forward-mode derivatives of everything that learns: those of reverse mode, never silently zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

import sslfast
from fake_cuda.distillation import DISTILLATION
from fake_cuda.images import TOKENS
from fake_cuda.inputs import Case, D, Inputs, N
from fake_cuda.losses import CONTRASTIVE, DECORRELATION, MASKED
from fake_cuda.worker import tensors

SEED, TOLERANCE = 7, 1e-8  # of float64, relative to the terms of the sum that is compared


# Mixes dtypes as an autocast region makes them, or gives nothing that learns.
WITHOUT = {
    "DINOHead",  # layers in float32
    "SwAVPrototypes",
    "k_means",
    "k_means/spherical, given centroids",
    "self_labelling",
    "ops.neighbour_distance.sums_by_index",
    "MemoryQueue",
    "contrastive_diagnostics",
    "masking.gather_patches",
    "ops.unit_slices.unit_slices",
    "center_update_",
    "center_update_/normalised",
    "prototype_sinkhorn",
    "prototype_usage",
    "duplicate_prototypes",
    "ops.prototype_columns.visit",
    "sinkhorn",
    "sinkhorn_bias",
    "ops.sinkhorn.column_sums",
    "ops.sinkhorn.bias_of",
    "ops.sinkhorn.assigned",
    *(name for name in CONTRASTIVE | DECORRELATION | DISTILLATION if name.endswith("autocast region")),
}
EVERY = CONTRASTIVE | DECORRELATION | DISTILLATION | MASKED | TOKENS
LEARNING = {name: case for name, case in EVERY.items() if name not in WITHOUT}


class Leaves(Inputs):
    """Inputs that learn are ``given``, or made; ``leaves`` are all of them."""

    def __init__(self, given: list[Tensor] | None = None) -> None:
        super().__init__(torch.device("cpu"), torch.float64, False)
        self.given, self.leaves = None if given is None else iter(given), list[Tensor]()

    def _next(self, made: Tensor) -> Tensor:
        leaf = made if self.given is None else next(self.given)
        self.leaves.append(leaf)
        return leaf

    def z(self, *shape: int) -> Tensor:
        return self._next(torch.randn(shape or (N, D), dtype=self.dtype))

    def number(self, value: float) -> Tensor:
        return self._next(torch.tensor(value, dtype=self.dtype))


def function_of(case: Case) -> tuple[Callable[..., list[Tensor]], list[Tensor]]:
    """A call as a function of what learns in it, and that."""
    torch.manual_seed(SEED)
    x = Leaves()
    case(x)

    def function(*leaves: Tensor) -> list[Tensor]:
        torch.manual_seed(SEED)
        return [t for t in tensors(case(Leaves(list(leaves)))) if t.is_floating_point()]

    return function, x.leaves


def by_dual_numbers(function: Callable[..., list[Tensor]], leaves: list[Tensor], along: list[Tensor]) -> list[Any]:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, v) for t, v in zip(leaves, along, strict=True)]
        return [forward_ad.unpack_dual(t).tangent for t in function(*duals)]


def by_jvp(function: Callable[..., list[Tensor]], leaves: list[Tensor], along: list[Tensor]) -> list[Any]:
    return torch.func.jvp(lambda *x: tuple(function(*x)), tuple(leaves), tuple(along))[1]


def by_linearize(function: Callable[..., list[Tensor]], leaves: list[Tensor], along: list[Tensor]) -> list[Any]:
    return torch.func.linearize(lambda *x: tuple(function(*x)), *leaves)[1](*along)


def test_losses_are_among_them() -> None:
    public = {name: getattr(sslfast, name) for name in sslfast.__all__}
    losses = {name for name, value in public.items() if isinstance(value, type) and issubclass(value, torch.nn.Module)}
    called = {name.partition("/")[0] for name in LEARNING}
    assert losses - called <= {"DINOHead", "MemoryQueue", "SwAVPrototypes"}


WAYS = [(name, way) for name in LEARNING for way in (by_dual_numbers, *([] if "/" in name else [by_jvp]))]


@pytest.mark.parametrize(("name", "tangents"), WAYS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_as_reverse_mode(name: str, tangents: Callable[..., list[Any]]) -> None:
    """Σ c·(J v) = Σ (Jᵀ c)·v for random c and v, J v by forward mode and Jᵀ c by the kernels."""
    function, leaves = function_of(LEARNING[name])
    generator = torch.Generator().manual_seed(SEED)
    along = [torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in leaves]
    forward = tangents(function, leaves, along)
    learning = [t.clone().requires_grad_() for t in leaves]
    total, expected, size = 0.0, 0.0, 0.0
    outputs = function(*learning)
    assert len(outputs) == len(forward)
    pairs = [(out, tangent) for out, tangent in zip(outputs, forward, strict=True) if out.requires_grad]
    cotangents = [torch.randn(out.shape, dtype=out.dtype, generator=generator) for out, _ in pairs]
    for cotangent, (_, tangent) in zip(cotangents, pairs, strict=True):
        if tangent is not None:
            total += (cotangent * tangent).sum().item()
    for v, grad in zip(
        along,
        torch.autograd.grad([out for out, _ in pairs], learning, cotangents, allow_unused=True),
        strict=True,
    ):
        if grad is not None:
            expected += (grad * v).sum().item()
            size += (grad * v).abs().sum().item()
    assert size > 0
    assert abs(total - expected) <= TOLERANCE * size, (total, expected)


A, B = (torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
ONE_ARGUMENT = {
    "nt_xent": lambda z: sslfast.nt_xent(z, B),
    "clip": lambda z: sslfast.clip(z, B, 5.0),
    "sup_con": lambda z: sslfast.sup_con(z[:, None], torch.arange(7) % 3, normalize=True),
    "barlow_twins": lambda z: sslfast.barlow_twins(z, B),
    "vicreg": lambda z: sslfast.vicreg(z, B),
    "uniformity": lambda z: sslfast.uniformity(z, normalize=True),
    "sig_lip": lambda z: sslfast.sig_lip(z, B, 5.0, -3.0),
}


@pytest.mark.parametrize("name", ONE_ARGUMENT)
def test_jacfwd_and_hessians(name: str) -> None:
    function = ONE_ARGUMENT[name]
    z = A.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(z), z)
    torch.testing.assert_close(torch.func.jacfwd(function)(A), grad)
    hessian = torch.func.jacfwd(torch.func.jacrev(function))(A)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(function, A))


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: sslfast.clip(x, F.normalize(B), 10.0),
        lambda x: sslfast.sig_lip(x, F.normalize(B), 10.0, -10.0),
        lambda x: sslfast.sup_con(x[:, None], torch.arange(len(x)) % 2),
        lambda x: sslfast.uniformity(x),
        lambda x: sslfast.alignment(x, F.normalize(B)),
    ],
    ids=["clip", "sig_lip", "sup_con", "uniformity", "alignment"],
)
def test_linearize_of_losses_that_look_at_their_rows(loss: Callable[[Tensor], Tensor]) -> None:
    x = F.normalize(A)
    (tangent,) = by_linearize(lambda x: [loss(x)], [x], [B])
    torch.testing.assert_close(tangent, torch.func.jvp(loss, (x,), (B,))[1])


def test_linearize() -> None:
    z = A.clone().requires_grad_()
    (grad,) = torch.autograd.grad(sslfast.nt_xent(z, B), z)
    (tangent,) = by_linearize(lambda x: [sslfast.nt_xent(x, B)], [A], [B])
    torch.testing.assert_close(tangent, (grad * B).sum())


def test_a_kernel_that_is_forced_refuses() -> None:
    def loss(z: Tensor) -> Tensor:
        with sslfast.use_backend("cpu"):
            return sslfast.nt_xent(z, B)

    with pytest.raises(NotImplementedError, match=r"sslfast\.nt_xent has no forward-mode derivative"):
        torch.func.jvp(loss, (A,), (B,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"sslfast\.l2_normalize has no forward"):
        torch.ops.sslfast.l2_normalize(forward_ad.make_dual(A, B), 1e-12)


def test_a_gradient_with_a_tangent_refuses() -> None:
    z = A.clone().requires_grad_()
    out = sslfast.l2_normalize(z)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"sslfast\.l2_normalize has no forward"):
        torch.autograd.grad(out, z, forward_ad.make_dual(A, B))
