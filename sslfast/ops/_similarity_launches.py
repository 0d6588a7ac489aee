"""The Triton launches behind the operators of ``_similarity_operators.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _library
from ._similarity_operators import BackwardInputs, SelfInputs, like


def _triton_forward(*arguments: Any) -> tuple[Tensor, ...]:
    from ..kernels import similarity_lse as kernel

    q, k, *rest, _tile_cache = arguments  # the GPU does without the cache
    return (*kernel.similarity_forward(q.contiguous(), k.contiguous(), *rest), like(q, 0))


def _triton_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from ..kernels import similarity_lse as kernel

    given = BackwardInputs(*arguments)
    given = given._replace(q=given.q.contiguous(), k=given.k.contiguous())
    return kernel.similarity_backward(**{name: value for name, value in given._asdict().items() if name != "tiles"})


def _triton_attend(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import similarity_lse as kernel

    return kernel.similarity_attend(q.contiguous(), k.contiguous(), *rest)


def _triton_self(*arguments: Any) -> tuple[Tensor, ...]:
    from ..kernels import similarity_lse as kernel

    given = SelfInputs(*arguments)
    z = given.z.contiguous()
    found = kernel.similarity_forward(
        z, z, given.scale, None, given.ids, given.ids, given.positives, False, given.hardest
    )
    row_lse, _, positive, negative, row_max, row_sum, _, _ = found
    return row_lse, positive, negative, row_max, row_sum, like(z, 0)


def _triton_self_backward(
    grad_row: Tensor | None,
    grad_positive: Tensor | None,
    z: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    positives: Tensor | None,
    row_max: Tensor,
    row_sum: Tensor,
    tiles: Tensor,
) -> tuple[Tensor, Tensor]:
    """With W = G + Gᵀ, dz = scale·W z is one launch, dq of a rectangular backward that is given g for the columns too.

    Of a positive that holds the half through q; the other, ``gp_i·scale·z_i`` in row p(i), is added here.
    """
    from ..kernels import similarity_lse as kernel

    z = z.contiguous()
    statistics = (row_max, row_sum, row_max, row_sum)
    dz, _, twice, _ = kernel.similarity_backward(
        grad_row, grad_row, grad_positive, z, z, scale, None, ids, ids, positives, *statistics, True, False, False
    )
    if grad_positive is not None and positives is not None:
        present = (positives >= 0) & (positives < z.shape[0])
        place = torch.where(present, positives, 0)
        weighted = torch.where(present, grad_positive, 0.0)[:, None] * z.to(dz.dtype)  # [M, D]
        twice = twice + (weighted * z.index_select(0, place)).sum()
        dz = dz.index_put((place,), scale * weighted, accumulate=True)  # sorts: no atomics
    return dz, twice / 2


_library.implement("similarity_lse_self_triton", _triton_self, "CUDA", "CPU")
_library.implement("similarity_lse_self_triton_backward", _triton_self_backward, "CUDA", "CPU")
_library.implement("similarity_lse_triton", _triton_forward, "CUDA", "CPU")
_library.implement("similarity_lse_triton_backward", _triton_backward, "CUDA", "CPU")
_library.implement("similarity_lse_attend_triton", _triton_attend, "CUDA", "CPU")
