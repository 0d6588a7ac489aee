"""Two ways to make the gradients of a loss over all pairs, and which one a call takes.

``streamed``: a program owns rows of a gradient and streams over the other side, recomputing logits and weights. Nothing
of size M × N ever leaves the chip, but each gradient, and each chunk of its features, forms the weights anew.

``banded``: the weights W of a band of rows are formed once, in the inputs' dtype, and the library multiplies them:
``dq[band] = W k``, ``dk += Wᵀ q[band]``. A band's buffer has at most ``BAND_BYTES`` (or one block of rows), so memory
grows as M + N here too, and the order of every sum is fixed.

The cost model, in operations at the peak rate for each logit and feature pair (a product of D features is 2·D):

    streamed: sides·(chunks + 1)·2·D / STREAMED_SHARE          sides: gradients wanted, of q, of k, or both
    banded:   (sides + 1)·2·D / BANDED_SHARE  +  (sides + 1)·itemsize·BALANCE        W written once, read once a side

Shares and balance are predicted by counting instructions and bytes of the compiled kernels for an H200, not measured
(docs/similarity_lse.md has the count).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .. import _backends
from ._common import Config

BAND_BYTES = 256 * 2**20

# (bytes of an element, all features in one product) -> share of the peak of products that a streamed gradient reaches.
STREAMED_SHARE = {(2, True): 0.50, (2, False): 0.20, (4, True): 0.15, (4, False): 0.03}
# float32: three TF32 passes form the weights, and the library multiplies them without tensor cores.
BANDED_SHARE = {2: 0.60, 4: 0.13}
# Operations at the peak rate in the time of one byte of memory traffic: 990 (TF32: 495) T/s over 4.8 TB/s.
BALANCE = {2: 206.0, 4: 103.0}


def costs(
    features: int, itemsize: int, sides: int, block_k: int, block_d: int, after_forward: bool = True
) -> dict[str, float]:
    """The cost model's operations for one logit by each form.

    Args:
        block_k, block_d: the streamed kernel's, cut to the features.
        after_forward: the rows' statistics are there; where they are not, streaming finds them on the way and bands
            need a forward pass first.
    """
    product = 2.0 * features
    chunks = triton.cdiv(features, block_d)
    streamed = sides * (chunks + 1) * product / STREAMED_SHARE[itemsize, features <= block_k]
    banded = (sides + 1) * (product / BANDED_SHARE[itemsize] + itemsize * BALANCE[itemsize])
    if not after_forward:
        banded += product / BANDED_SHARE[itemsize]
    return {"streamed": streamed, "banded": banded}


def gradient_form(z: Tensor, sides: int, config: Config, after_forward: bool = True) -> str:
    """The form that is forced, or the cheaper one by :func:`costs`, for rows ``z``; config: of the streamed kernel."""
    forced = _backends.forced_gradient_form()
    if forced is not None:
        return forced
    found = costs(z.shape[1], z.element_size(), sides, config.block_k, config.block_d, after_forward)
    return min(found, key=found.__getitem__)


def band_buffer(z: Tensor, rows: int, columns: int, block: int) -> Tensor | None:
    """[band, columns]: room for the weights of a band, in ``z``'s dtype; ``None`` where not even one block fits.

    A band is a multiple of ``block`` rows. The columns' stride is a multiple of 16 bytes, as the library's products
    want it. Where memory is short the band is halved: more launches, the same sums of the same products for dq, and
    those of dk in another order.
    """
    stride = triton.cdiv(columns, 8) * 8
    blocks = min(triton.cdiv(rows, block), max(1, BAND_BYTES // (stride * z.element_size() * block)))
    while blocks > 0:
        try:
            return z.new_empty((blocks * block, stride))[:, :columns]
        except torch.OutOfMemoryError:
            blocks //= 2
    return None


def multiply_band(w: Tensor, q: Tensor, k: Tensor, first: int, dq: Tensor | None, dk: Tensor | None) -> None:
    """``dq[band] = W k`` and ``dk += Wᵀ q[band]`` for the band of rows from ``first`` on; ``None``: not wanted."""
    rows = slice(first, first + len(w))
    if dq is not None:
        product(dq[rows], w, k)
    if dk is not None:
        product(dk, w.T, q[rows], add=first > 0)


def product(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """``out = a @ b``, or ``out += a @ b``, summed in float32 whatever the dtype of a and b."""
    beta = 1.0 if add else 0.0  # with 0, what stands in out is not read
    with torch.autocast(out.device.type, enabled=False):
        if a.dtype == torch.float32:
            out.addmm_(a, b, beta=beta)
        elif out.is_cuda:
            torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, beta=beta, out=out)
        else:  # the interpreter's tensors
            out.addmm_(a.float(), b.float(), beta=beta)
