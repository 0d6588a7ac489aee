"""similarity_lse: wrong arguments, and inputs on the edge of what it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sslfast

pytestmark = pytest.mark.sanitize


def test_bad_arguments() -> None:
    q, k = torch.randn(4, 3), torch.randn(5, 3)
    ids, cols = torch.arange(4), torch.arange(5)
    cases: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (ValueError, "same width.*3 and 2", (q, k[:, :2], 1.0), {}),
        (TypeError, "same dtype", (q, k.double(), 1.0), {}),
        (ValueError, "two-dimensional", (q[0], k, 1.0), {}),
        (ValueError, "at least one row", (q, k[:0], 1.0), {}),
        (TypeError, "k must be a torch.Tensor", (q, [1], 1.0), {}),
        (ValueError, "given together", (q, k, 1.0), {"row_ids": ids}),
        (ValueError, "col_ids belong to k", (q, None, 1.0), {"row_ids": ids, "col_ids": ids}),
        (ValueError, "at least one row", (q[:0], None, 1.0), {}),
        (ValueError, r"row_ids must have shape \(4,\)", (q, k, 1.0), {"row_ids": cols, "col_ids": cols}),
        (TypeError, "col_ids must hold integers", (q, k, 1.0), {"row_ids": ids, "col_ids": cols.float()}),
        (ValueError, r"bias must be .* shape \(5,\)", (q, k, 1.0), {"bias": torch.randn(4)}),
        (ValueError, "scale must be a float", (q, k, torch.randn(2)), {}),
        (TypeError, "scale must be a float", (q, k, "1"), {}),
        (ValueError, "positives must be columns of k, 0 to 4", (q, k, 1.0), {"positives": ids + 2}),
        (TypeError, "positives must hold integers", (q, k, 1.0), {"positives": ids.float()}),
    ]
    for error, message, arguments, options in cases:
        with pytest.raises(error, match=message):
            sslfast.similarity_terms(*arguments, **options)


def test_statistics_of_more_columns_than_the_block_has() -> None:
    """What a ring does: total statistics with a large maximum, and a block of small logits with excluded pairs."""
    q, k = torch.full((1, 2), 0.1), torch.tensor([[0.1, 0.0], [0.2, 0.1]])
    one, ids = torch.ones(1), (torch.tensor([5]), torch.tensor([5, 6]))
    for top in (-282.0, 150.0):
        dq, dk, _, _ = torch.ops.sslfast.similarity_lse_backward(
            one, None, None, q, k, torch.tensor(1.0), None, *ids, None, torch.tensor([top]), one,
            *[torch.empty(0)] * 3, True, True, False,
        )  # fmt: skip
        weight = torch.tensor([[0.0, 2.0 ** (0.03 * 1.4426950408889634 - top)]])
        torch.testing.assert_close(dq, weight @ k)
        torch.testing.assert_close(dk, weight.T @ q)


def test_hardest_of_a_nan_row_is_nan() -> None:
    q, k = torch.randn(30, 4), torch.randn(40, 4)
    q[3] = float("nan")
    hardest = sslfast.similarity_terms(q, k, 1.0, hardest=True).hardest
    assert hardest is not None and hardest[3].isnan() and hardest.isnan().sum() == 1
