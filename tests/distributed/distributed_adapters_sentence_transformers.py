"""A case of test_distributed.py: sentence-transformers' losses with sslfast inside, over real ranks."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import Unavailable, peers
from distributed_adapters_open_clip import close, served
from distributed_common import batch, case, mean_over_ranks

ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"directions": ALL, "scale": 7.0},
    {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
)


@case
def sentence_transformers_ranking(rank: int, world: int) -> None:
    """gather_across_devices: the package's value and gradients, and the global batch's; uneven batches too."""
    if world != 2:  # every process imports transformers, which takes longer than the case
        return
    peers._import_torchvision()
    try:
        losses = importlib.import_module("sentence_transformers.sentence_transformer.losses")
    except ImportError as error:
        raise Unavailable(f"sentence-transformers is not importable: {error}") from error

    def plain(gather: bool, options: dict[str, Any]) -> Callable[..., Tensor]:
        loss = losses.MultipleNegativesRankingLoss(nn.Identity(), gather_across_devices=gather, **options)
        return lambda *x: loss.compute_loss_from_embeddings(list(x), None)

    def cached(gather: bool, options: dict[str, Any]) -> Callable[..., Tensor]:
        loss = losses.CachedMultipleNegativesRankingLoss(
            nn.Sequential(nn.Identity()), mini_batch_size=2, gather_across_devices=gather, **options
        )
        return lambda *x: loss.calculate_loss([list(t.split(2)) for t in x])

    for sizes in ((4, 4), (3, 5)):
        (x, y, _, _), _ = batch(sizes, torch.float64)
        columns = [x, y, x.flip(1) + y]
        mine = [t.split(list(sizes))[rank] for t in columns]
        for options in OPTIONS:
            for form in (plain, cached):
                told = f"{form.__name__}, {sizes}, {options}"
                truth = found(form(False, options), columns)
                with served("sentence_transformers"):
                    fast = found(form(True, options), mine)
                close(f"{told}: value", mean_over_ranks(fast[0]), truth[0])
                for own, true in zip(fast[1:], truth[1:], strict=True):
                    close(f"{told}: gradient", own / world, true.split(list(sizes))[rank])
                if len(set(sizes)) == 1:
                    for own, package in zip(fast, found(form(True, options), mine), strict=True):
                        close(f"{told}: the package's own", own, package)


def found(call: Callable[..., Tensor], columns: list[Tensor]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in columns]
    loss = call(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]
