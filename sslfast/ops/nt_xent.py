"""NT-Xent without the 2N × 2N matrix: schema, fake kernels, autograd, choice of backend, and the public function.

Each backend keeps per row the running maximum and the sum of exponentials relative to it, in base 2:
``lse_i = ln 2 · (row_max_i + log2 row_sum_i)``. Maximum and sum are kept apart because ``P_ip = 2^(s_ip − max)/sum``
is then exact where the positive dominates, which one rounded ``lse`` is not at small temperatures.
The mathematics is in ``docs/nt_xent.md``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _backends, _library, _native, reference
from .._checks import accumulator, check_matrix, check_same, check_temperature
from .l2_normalize import EPS, normalized

BACKENDS = ("cpu", "triton", "reference")

# What one CPU step may use beyond its inputs, in bytes, as long as the packed rows themselves fit; a constant, so that
# no buffer grows with 2N × 2N. What the rows leave of it, at least LEAST_CACHE, keeps similarity tiles from forward to
# backward: all of them up to N ≈ 2,000 pairs, which saves a quarter of the arithmetic.
MEMORY = 62 * 2**20
LEAST_CACHE = 16 * 2**20


def _tile_cache(z: Tensor) -> int:
    """How many numbers of similarity tiles the CPU forward of ``z0`` = ``z`` keeps for its backward."""
    rows, size = 2 * z.shape[0], accumulator(z).itemsize
    packed = rows * z.shape[1] * size
    # On and above the diagonal: tiles of 192 × 192, or (few rows) 36 of an eighth of the rows × 192.
    every_tile = max((rows + 192) * (rows + 384) // 2, 36 * 192 * (rows // 8 + 33))
    if 3 * packed + every_tile * size <= MEMORY:  # rows packed once, their gradient, dz
        return every_tile
    return max(MEMORY - 4 * packed, LEAST_CACHE) // size  # the transposed layout as well


# ---------------------------------------------------------------------------------------------- cpu: one fused operator


def _cpu_fake(
    z0: Tensor, z1: Tensor, temperature: Tensor, normalize: bool, tile_cache: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, kind = 2 * z0.shape[0], accumulator(z0)
    row = [z0.new_empty(rows, dtype=kind) for _ in range(3)]
    return z0.new_empty((), dtype=kind), row[0], row[1], row[2], z0.new_empty(tile_cache, dtype=kind)


def _cpu_backward_fake(
    grad_loss: Tensor,
    z0: Tensor,
    z1: Tensor,
    temperature: Tensor,
    inv_norm: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    tiles: Tensor,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(z0, memory_format=torch.contiguous_format),
        torch.empty_like(z1, memory_format=torch.contiguous_format),
        torch.empty_like(temperature),
    )


def _cpu_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z0, z1, temperature, normalize, _ = inputs
    ctx.save_for_backward(z0, z1, temperature, *output[1:])
    ctx.normalize = normalize
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _cpu_backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return None, None, None, None, None
    z0, z1, temperature, inv_norm, row_max, row_sum, tiles = ctx.saved_tensors
    if torch.is_grad_enabled() and any(t.requires_grad for t in (grad_loss, z0, z1, temperature)):
        function = partial(_by_reference, normalize=ctx.normalize)
        grads = _library.second_order(function, (z0, z1, temperature), ctx.needs_input_grad[:3], grad_loss)
    else:
        grads = torch.ops.sslfast.nt_xent_backward(
            grad_loss, z0, z1, temperature, inv_norm, row_max, row_sum, tiles, ctx.normalize
        )
    return (*grads, None, None)


def _by_reference(z0: Tensor, z1: Tensor, temperature: float | Tensor, normalize: bool) -> Tensor:
    """The reference with the kernels' precision: sums of 16-bit inputs are float32, also inside an autocast region."""
    kind = accumulator(z0)
    with torch.autocast(z0.device.type, enabled=False):
        return reference.nt_xent(z0.to(kind), z1.to(kind), temperature, normalize=normalize)


_library.define(
    "nt_xent(Tensor z0, Tensor z1, Tensor temperature, bool normalize, SymInt tile_cache)"
    " -> (Tensor loss, Tensor inv_norm, Tensor row_max, Tensor row_sum, Tensor tiles)",
    _cpu_fake,
)
_library.define(
    "nt_xent_backward(Tensor grad_loss, Tensor z0, Tensor z1, Tensor temperature, Tensor inv_norm, Tensor row_max,"
    " Tensor row_sum, Tensor tiles, bool normalize) -> (Tensor, Tensor, Tensor)",
    _cpu_backward_fake,
)
_library.autograd("nt_xent", _cpu_backward, _cpu_setup_context)

# ------------------------------------------------------------------------ triton: on rows that are already normalised


def _triton_fake(z: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row = [z.new_empty(z.shape[0], dtype=torch.float32) for _ in range(3)]
    return z.new_empty((), dtype=torch.float32), row[0], row[1], row[2]


def _triton_backward_fake(
    grad_loss: Tensor, z: Tensor, temperature: Tensor, row_max: Tensor, row_sum: Tensor, row_rest: Tensor
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape, dtype=torch.float32), torch.empty_like(temperature)


def _triton_forward(z: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels import nt_xent as kernel

    return kernel.nt_xent_forward(z.contiguous(), temperature)


def _triton_backward_kernel(
    grad_loss: Tensor, z: Tensor, temperature: Tensor, row_max: Tensor, row_sum: Tensor, row_rest: Tensor
) -> tuple[Tensor, Tensor]:
    from ..kernels import nt_xent as kernel

    return kernel.nt_xent_backward(grad_loss, z.contiguous(), temperature, row_max, row_sum, row_rest)


def _rows_by_reference(z: Tensor, temperature: Tensor) -> Tensor:
    z0, z1 = z.chunk(2)
    return _by_reference(z0, z1, temperature, normalize=False)


def _triton_setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _triton_backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return None, None
    z, temperature, *rows = ctx.saved_tensors
    if torch.is_grad_enabled() and any(t.requires_grad for t in (grad_loss, z, temperature)):
        return _library.second_order(_rows_by_reference, (z, temperature), ctx.needs_input_grad, grad_loss)
    dz, dtemperature = torch.ops.sslfast.nt_xent_triton_backward(grad_loss, z, temperature, *rows)
    return dz.to(z.dtype), dtemperature


_library.define(
    "nt_xent_triton(Tensor z, Tensor temperature) -> (Tensor loss, Tensor row_max, Tensor row_sum, Tensor row_rest)",
    _triton_fake,
)
_library.define(
    "nt_xent_triton_backward(Tensor grad_loss, Tensor z, Tensor temperature, Tensor row_max, Tensor row_sum,"
    " Tensor row_rest) -> (Tensor, Tensor)",
    _triton_backward_fake,
)
_library.implement("nt_xent_triton", _triton_forward, "CUDA", "CPU")
_library.implement("nt_xent_triton_backward", _triton_backward_kernel, "CUDA", "CPU")
_library.autograd("nt_xent_triton", _triton_backward, _triton_setup_context)

# ------------------------------------------------------------------------------------------------------ public function


def why_not(backend: str, z: Tensor) -> str | None:
    """The reason ``backend`` cannot serve inputs like ``z``, or ``None`` if it can."""
    if backend == "cpu":
        return _native.why_no_cpu(z.device, "z0")
    if backend == "triton":
        if z.dtype == torch.float64:
            return "the Triton kernel takes float32, bfloat16 and float16, not float64"
        return _native.why_no_triton(z.device)
    return f"nt_xent has no {backend} implementation"


def nt_xent(z0: Tensor, z1: Tensor, temperature: float | Tensor = 0.5, *, normalize: bool = True) -> Tensor:
    """Normalised temperature-scaled cross entropy (NT-Xent) of two views, mean over the 2N rows.

    ``ℓ_i = −log( exp(s_ip / τ) / Σ_{j ≠ i} exp(s_ij / τ) )``, ``s_ij`` the cosine of rows ``i`` and ``j`` of
    ``z = [z0; z1]`` and ``p`` the other view of row ``i``. Time grows as N²·D, extra memory as N·D: the 2N × 2N matrix
    is never stored. (On a CPU a constant amount of it may be kept for the backward: a step stays within about 62 MiB
    where the rows themselves leave room for that.)

    Args:
        z0, z1: [N, D] each, row ``i`` of both a view of image ``i``; float32, float64, bfloat16 or float16; any
            strides.
        temperature: τ, finite and not zero (default 0.5; 1e-8 to 1e8 in size, negative is legal); or a one-element
            tensor, which then receives its gradient.
        normalize: divide each row by ``max(‖row‖₂, 1e-12)`` first (default): while packing on a CPU, by a kernel of its
            own on a GPU.

    Returns:
        [] float32 (float64 for float64 inputs). Differentiable in ``z0``, ``z1`` and ``temperature``; under
        ``create_graph=True`` the gradients come from the reference, with the matrix in memory.

    Raises:
        TypeError: an argument is not a tensor, is not floating point, or the dtypes differ (inside an autocast region
            the wider one is used instead).
        ValueError: shapes or devices differ, a tensor is not two-dimensional or is empty, the temperature is zero or
            not finite (a temperature tensor on a GPU is not read: it would wait for the device).

    Source: Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations", equation 1; value
    as lightly 1.6.0's ``NTXentLoss`` (google-research/simclr reports the sum of two such means, twice this value).
    """
    check_matrix("z0", z0)
    check_matrix("z1", z1)
    if z0.dtype != z1.dtype and torch.is_autocast_enabled(z0.device.type):
        wider = torch.promote_types(z0.dtype, z1.dtype)
        z0, z1 = z0.to(wider), z1.to(wider)
    check_same("z0", z0, "z1", z1)
    check_temperature(temperature, z0.device)
    backend = _backends.serve("nt_xent", z0, "triton", why_not)
    kind = accumulator(z0)
    if backend == "reference":
        return _by_reference(z0, z1, temperature, normalize)
    if isinstance(temperature, Tensor):
        tau = temperature.reshape(()).to(kind)
    else:
        tau = torch.full((), temperature, dtype=kind, device=z0.device)
    if backend == "triton":
        z = torch.cat([z0, z1])  # [2N, D]
        return _library.run("nt_xent_triton", normalized(z, EPS, backend) if normalize else z, tau)[0]
    learns = torch.is_grad_enabled() and (z0.requires_grad or z1.requires_grad or tau.requires_grad)
    cache = _tile_cache(z0) if learns else 0
    return _library.run("nt_xent", z0, z1, tau, normalize, cache)[0]
