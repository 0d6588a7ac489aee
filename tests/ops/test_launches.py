"""How many launches a training step of each decorrelating loss is on a GPU, so that the number cannot creep up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import sslfast
from launches import Launches, as_on_gpu
from sslfast import _native

REASON = "the kernels would run" if torch.cuda.is_available() else _native.why_no_triton(torch.device("cpu"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

DUAL, PRIMAL = (256, 8192), (4096, 2048)
# loss: the call, and the most launches of a step in dual and in primal form: Triton kernels forward and backward, then
# operators forward and backward. Of a backward one operator fills the gradient it starts from.
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "barlow_twins": (sslfast.barlow_twins, (3, 1, 1, 3), (4, 2, 1, 3)),
    "vicreg": (sslfast.vicreg, (3, 1, 1, 2), (4, 2, 1, 2)),
    "vibcreg": (sslfast.vibcreg, (3, 1, 1, 2), (4, 2, 1, 2)),
    "covariance_loss": (lambda a, b: sslfast.covariance_loss(a), (3, 1, 1, 2), (4, 2, 1, 2)),
    # The rows are its columns, which makes the tall batch the one of many columns.
    "spectral_contrastive": (sslfast.spectral_contrastive, (4, 2, 1, 3), (3, 1, 1, 3)),
    "cross_correlation_loss": (lambda a, b: sum(sslfast.cross_correlation_loss(a, b)), (3, 1, 8, 10), (4, 2, 8, 10)),
    "frossl": (lambda a, b: sslfast.frossl([a, b]), (3, 1, 17, 30), (4, 2, 17, 30)),
}


def launched(
    loss: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> tuple[Launches, Launches]:
    """Those of the forward, and those of the backward."""
    views = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(2)]
    forward, backward = Launches(), Launches()
    with sslfast.use_backend("triton"):
        with forward:
            value = loss(*views)
        with backward:
            value.backward()
    return forward, backward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [DUAL, PRIMAL], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_makes_few_launches(
    name: str, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_gpu(monkeypatch)
    loss, *most = LOSSES[name]
    steps = launched(loss, shape, dtype)
    found = (*(step.triton.total() for step in steps), *(step.operators.total() for step in steps))
    allowed = most[shape == PRIMAL]
    assert all(f <= a for f, a in zip(found, allowed, strict=True)), [(s.triton, s.operators) for s in steps]


def test_tico_makes_few_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the library's products and two normalisations; its moving average is a part of them."""
    views = [torch.randn(256, 256).requires_grad_() for _ in range(2)]
    covariance = torch.eye(256)
    forward, backward = Launches(), Launches()
    with forward:
        loss, _ = sslfast.tico(*views, covariance)
    with backward:
        loss.backward()
    assert (forward.operators.total(), backward.operators.total()) <= (12, 13)


def test_a_barlow_twins_step_costs_a_cpu_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predicted: 4 Triton kernels and 4 operators, 104 µs. They were 10 and 42, 452 µs."""
    as_on_gpu(monkeypatch)
    steps = launched(sslfast.barlow_twins, DUAL, torch.bfloat16)
    assert sum(step.seconds for step in steps) <= 104.5e-6


def test_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators inside the Triton launchers, kernels, and no views."""
    as_on_gpu(monkeypatch)
    a = torch.randn(32, 64)
    with Launches() as count, sslfast.use_backend("triton"):
        sslfast.second_moment(a.T.mul(2.0))
    assert count.operators == {"mul": 1, "bmm": 1}
    assert count.triton == {
        "_second_moment_columns_kernel": 1,
        "_second_moment_off_diagonal_kernel": 1,
        "_second_moment_totals_kernel": 1,
    }
