"""Logits of −inf, from infinite features: the log-sum-exp and its gradients are the reference's, at every level."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import sslfast
from helpers import same_nonfinite

# Of one part in the kernels' dtype, and of two: products of either with an infinite sum must not cancel.
SCALES = [0.25, 1.0, 0.7, 3.3, -1.0, 1 / 0.07]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def _ids(m: int) -> Tensor:
    return torch.arange(m)


FORMS: dict[str, Callable[[Tensor, Tensor, float], tuple[Tensor, ...]]] = {
    "rows": lambda q, k, s: (sslfast.similarity_lse(q, k, s),),
    "only q learns": lambda q, k, s: (sslfast.similarity_lse(q, k.detach(), s),),
    "columns": lambda q, k, s: sslfast.similarity_lse(q, k, s, columns=True),
    "positives": lambda q, k, s: sslfast.similarity_terms(q, k, s, positives=_ids(len(q)), hardest=True)[::2],
    "itself": lambda q, k, s: (sslfast.similarity_terms(k, k, s, row_ids=_ids(len(k)), col_ids=_ids(len(k))).row_lse,),
    "log-sigmoid": lambda q, k, s: (sslfast.similarity_logsigmoid(q, k, s, 0.5),),
}


def inputs(dtype: torch.dtype, scale: float, rows: int) -> tuple[Tensor, Tensor]:
    """Every row of q, and of k but for one, has a negative logit with the row of k that holds an infinity."""
    generator = torch.Generator().manual_seed(0)
    q, k = (-torch.rand(n, 3, generator=generator, dtype=torch.float64) - 0.1 for n in (rows - 2, rows))
    k[2, 1] = torch.inf if scale > 0 else -torch.inf
    return q.to(dtype), k.to(dtype)


@pytest.mark.levels
@pytest.mark.parametrize("rows", [7, 250])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_as_the_reference(form: str, dtype: torch.dtype, scale: float, rows: int) -> None:
    results = []
    for backend in ("cpu", "reference"):
        q, k = (t.requires_grad_() for t in inputs(dtype, scale, rows))
        with sslfast.use_backend(backend):
            values = FORMS[form](q, k, scale)
            learning = [v for v in values if v.requires_grad]
            grads = torch.autograd.grad(learning, (q, k), [torch.ones_like(v) for v in learning], allow_unused=True)
        results.append([t.float() for t in (*values, *grads) if t is not None])
    if form in ("rows", "only q learns"):
        assert results[0][0].isfinite().all()
    for number, (kernel, reference) in enumerate(zip(*results, strict=True)):
        if dtype == torch.bfloat16 and number >= len(values):  # rounded to bfloat16 at the end
            torch.testing.assert_close(kernel, reference, rtol=2e-2, atol=1e-3, equal_nan=True)
        else:
            same_nonfinite(f"{form}, {number}", kernel, reference)
