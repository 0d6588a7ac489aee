"""Cases of test_distributed.py: values and gradients are those of one process on the global batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sslfast
from distributed_common import (
    FORMULAS,
    SIZES,
    STRATEGIES,
    Formula,
    batch,
    case,
    clip,
    compare,
    mean_over_ranks,
    nt_xent,
    of_global_batch,
    sig_lip,
    value_and_gradients,
)
from sslfast.distributed import Scope, scope_of
from sslfast.losses.contrastive.clip import clip as clip_loss
from sslfast.losses.contrastive.dcl import dcl, dclw
from sslfast.losses.contrastive.hypersphere import hypersphere, uniformity
from sslfast.losses.contrastive.info_nce import info_nce
from sslfast.losses.contrastive.moco import moco, moco_v3
from sslfast.losses.contrastive.nt_xent import nt_xent as nt_xent_loss
from sslfast.losses.contrastive.ranking import multiple_negatives_ranking
from sslfast.losses.contrastive.sig_lip import sig_lip as sig_lip_loss
from sslfast.losses.contrastive.sup_con import sup_con


@case
def value_and_gradients_of_the_global_batch(rank: int, world: int) -> None:
    for sizes in SIZES[world]:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for formula in FORMULAS:
                if dtype == torch.bfloat16 and formula not in (clip, sig_lip):
                    continue
                for strategy in STRATEGIES:
                    inputs = batch(sizes, dtype)[1][rank]
                    if dtype == torch.bfloat16:
                        inputs[2] = inputs[2].float()
                    found = value_and_gradients(formula, scope_of(True, strategy), inputs)
                    compare(f"{formula.__name__}, {sizes}, {dtype}, {strategy}", found, rank, sizes, formula, dtype)


def hard_negatives(x: Tensor, y: Tensor) -> Tensor:
    """[n, 2, D], each row's own."""
    return torch.stack([x.flip(1), 0.3 * y + x], 1)


def classes(x: Tensor) -> Tensor:
    """Labels that depend on the row alone, so that classes spread over the ranks."""
    return (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()


def regions(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Four regions of each image in two views, and masks that depend on the rows alone."""
    views = [torch.stack([z, z.flip(1), z.roll(2, 1), z.roll(3, 1)], 1) for z in (x, y)]
    return *views, *((view.detach()[..., 0] > 0).long() for view in views)


# Each takes x, y [n, D], a learnable number, and the keywords that every loss takes.
LOSSES: dict[str, Formula] = {
    "nt_xent": lambda x, y, s, **how: nt_xent_loss(x, y, s, **how),
    "info_nce": lambda x, y, s, **how: info_nce(x, y, s, negatives=(y.flip(1), hard_negatives(x, y)), **how),
    "info_nce, smoothed": lambda x, y, s, **how: sslfast.smoothed_info_nce(
        x, y, s, negatives=(y.flip(1), hard_negatives(x, y)), **how
    ),
    "info_nce, symmetric": lambda x, y, s, **how: sslfast.symmetric_info_nce(x, y, s, label_smoothing=0.1, **how),
    "info_nce, debiased": lambda x, y, s, **how: sslfast.debiased_info_nce(x, y, s, tau_plus=0.1, **how),
    "info_nce, positives": lambda x, y, s, **how: info_nce(
        x, y, s, positives=torch.arange(len(x)).unsqueeze(1).repeat(1, 2).clamp(max=len(x) - 1), **how
    ),
    "moco": lambda x, y, s, **how: moco(x, y, torch.linspace(-1, 1, 77, dtype=x.dtype).view(11, 7), s, **how),
    "moco_v3": lambda x, y, s, **how: moco_v3(x, y, s, **how),
    "re_ssl": lambda x, y, s, gather_distributed=False, strategy="gather": sslfast.re_ssl(
        x * s,
        y,
        torch.linspace(-1, 1, 77, dtype=x.dtype).view(11, 7),
        normalize=False,
        gather_distributed=gather_distributed,
    ),
    "dcl": lambda x, y, s, **how: dcl(x, y, s, **how),
    "dclw": lambda x, y, s, **how: dclw(x, y, s, **how),
    "direct_clr": lambda x, y, s, **how: sslfast.direct_clr(x, y, s, loss_dim=5, **how),
    "macl": lambda x, y, s, **how: sslfast.macl(x, y, s, **how),
    "det_con_s": lambda x, y, s, **how: sslfast.det_con_s(*regions(x, y), s, **how),
    "det_con_b": lambda x, y, s, **how: sslfast.det_con_b(
        *regions(x, y)[:2], *regions(y.flip(1), x * y)[:2], *regions(x, y)[2:], s, **how
    ),
    "DetConSLoss": lambda x, y, s, gather_distributed=False, **how: sslfast.DetConSLoss(
        s, **({} if gather_distributed else {"gather_distributed": False}), **how
    )(*regions(x, y)),
    "co2": lambda x, y, s, gather_distributed=False, strategy="gather": sslfast.co2(
        x, y, None, s, gather_distributed=gather_distributed
    ),
    "co2, a queue": lambda x, y, s, gather_distributed=False, strategy="gather": sslfast.co2(
        x, y, torch.linspace(-1, 1, 77, dtype=x.dtype).view(11, 7), s, gather_distributed=gather_distributed
    ),
    "ranking": lambda x, y, s, **how: multiple_negatives_ranking(
        x,
        y,
        hard_negatives(x, y),
        s,
        directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
        **how,
    ),
    "sup_con": lambda x, y, s, **how: sup_con(
        torch.stack([x, y], 1), classes(x.detach()), temperature=s, normalize=True, **how
    ),
    "sup_con, one view": lambda x, y, s, **how: sup_con(
        torch.stack([x, y], 1), temperature=s, contrast_mode="one", normalize=True, **how
    ),
    "clip": lambda x, y, s, **how: clip_loss(x, y, s, 0.3 * s, **how),
    "sig_lip": lambda x, y, s, **how: sig_lip_loss(x, y, s, -s, **how),
    "negative_cosine": lambda x, y, s, gather_distributed=False, strategy="gather": sslfast.negative_cosine(
        x * s, y, convention="distance", gather_distributed=gather_distributed
    ),
    "byol": lambda x, y, s, gather_distributed=False, strategy="gather": sslfast.byol(
        x * s, y, y, x, gather_distributed=gather_distributed
    ),
    "uniformity": lambda x, y, s, **how: uniformity(x * s, **how),
    "hypersphere": lambda x, y, s, **how: hypersphere(x * s, y, **how),
}


@case
def losses_of_the_global_batch(rank: int, world: int) -> None:
    """The library's own losses, against themselves in one process."""
    for sizes in SIZES[world]:
        if max(sizes) > 50:
            continue
        for name, loss in LOSSES.items():
            whole, parts = batch(sizes, torch.float64)
            with sslfast.use_backend("reference"):
                truth = value_and_gradients(lambda _, *inputs, f=loss: f(*inputs), Scope(), whole[:3])
            for strategy in STRATEGIES:
                how = {"gather_distributed": True, "strategy": strategy}
                found = value_and_gradients(
                    lambda _, *inputs, f=loss, how=how: f(*inputs, **how), Scope(), parts[rank][:3]
                )
                of_global_batch(f"{name}, {sizes}, {strategy}", found, truth, rank, sizes, 1e-11)


@case
def rows_and_columns_without_a_pair(rank: int, world: int) -> None:
    """−inf and zero gradient where the ids of all ranks exclude every pair; also where only one rank's do."""
    sizes = SIZES[world][0]
    total = sum(sizes)
    (x, y, scale, _), parts = batch(sizes, torch.float64)
    for row_ids, col_ids in (
        (torch.arange(total).clamp(max=1), torch.zeros(total, dtype=torch.int64)),  # row 0 has no column
        (torch.zeros(total, dtype=torch.int64), torch.arange(total).clamp(max=1)),  # column 0 has no row
        (rank_of(sizes), rank_of(sizes)),  # no pair within a rank
    ):

        def terms(scope: Scope, x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> list[Tensor]:
            x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
            found = scope.similarity_terms(x, y, scale, row_ids=rows, col_ids=columns, columns=True, hardest=True)
            loss = sum(lse.masked_fill(lse.isinf(), 0.0).square().sum() for lse in (found.row_lse, found.col_lse))
            return [found.row_lse, found.col_lse, found.hardest, *torch.autograd.grad(loss, (x, y))]

        with sslfast.use_backend("reference"):
            truth = terms(Scope(), x, y, row_ids, col_ids)
        for strategy in STRATEGIES:
            mine = [t.split(list(sizes))[rank] for t in (row_ids, col_ids)]
            for a, b in zip(terms(scope_of(True, strategy), *parts[rank][:2], *mine), truth, strict=True):
                torch.testing.assert_close(a, b.split(list(sizes))[rank], rtol=1e-9, atol=1e-12)


def rank_of(sizes: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


@case
def large_similarities(rank: int, world: int) -> None:
    """At temperature 0.01 the maxima of the blocks lie hundreds apart in base 2."""
    sizes = SIZES[world][-1]
    for dtype in (torch.float64, torch.float32):
        for strategy in STRATEGIES:

            def formula(scope: Scope, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
                return clip(scope, x, y, 100 * scale, bias)

            found = value_and_gradients(formula, scope_of(True, strategy), batch(sizes, dtype)[1][rank])
            compare(f"{dtype}, {strategy}", found, rank, sizes, formula, dtype)


@case
def positives_and_hardest_anywhere(rank: int, world: int) -> None:
    """A row's positive may live on any rank, or nowhere."""
    sizes = SIZES[world][-1]
    total = sum(sizes)
    (x, y, scale, _), parts = batch(sizes, torch.float64)
    positives = (torch.arange(total) * 7 + 3) % total
    positives[::5] = -1
    with sslfast.use_backend("reference"):
        truth = Scope().similarity_terms(x, y, scale, positives=positives, hardest=True)
    for strategy in STRATEGIES:
        found = scope_of(True, strategy).similarity_terms(
            *parts[rank][:2], scale, positives=positives.split(list(sizes))[rank], hardest=True
        )
        for name in ("row_lse", "positive", "hardest"):
            mine = getattr(truth, name).split(list(sizes))[rank]
            torch.testing.assert_close(getattr(found, name), mine, rtol=1e-10, atol=1e-10)


@case
def under_ddp(rank: int, world: int) -> None:
    """The averaged gradients of an encoder and a learnable scale, with a short last batch."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7)).double()
            self.scale = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.encoder(x), self.encoder(y), self.scale * 1.0

    torch.manual_seed(3)
    model = Model()
    for sizes in SIZES[world][:2]:
        (x, y, _, bias), parts = batch(sizes, torch.float64, width=6)
        for formula in (nt_xent, clip, sig_lip):
            model.zero_grad()
            with sslfast.use_backend("reference"):
                formula(Scope(), *model(x, y), bias).backward()
            truth = [p.grad.clone() for p in model.parameters()]
            for strategy in STRATEGIES:
                model.zero_grad()
                replica = DistributedDataParallel(model)
                mine = parts[rank]
                formula(scope_of(True, strategy), *replica(*mine[:2]), mine[3]).backward()
                for p, true in zip(model.parameters(), truth, strict=True):
                    torch.testing.assert_close(p.grad, true, rtol=1e-9, atol=1e-12)


@case
def a_gradient_of_its_own_on_each_rank(rank: int, world: int) -> None:
    """Each rank multiplies its loss by another number."""
    sizes = SIZES[world][0]
    (x, y, scale, bias), parts = batch(sizes, torch.float64)
    factors = 1.0 + torch.arange(world)
    for strategy in STRATEGIES:
        for formula in (clip, sig_lip):

            def weighted(scope: Scope, *inputs: Tensor, formula: Formula = formula) -> Tensor:
                return factors[rank] * formula(scope, *inputs)

            found = value_and_gradients(weighted, scope_of(True, strategy), parts[rank])
            # The same from one process: the ranks' losses one after the other, each on its own rows and all columns.
            inputs = [t.clone().requires_grad_() for t in (x, y, scale, bias)]
            labels = torch.arange(len(x)) // 2
            with sslfast.use_backend("reference"):
                if formula is sig_lip:
                    each = [
                        sslfast.similarity_logsigmoid(
                            part, inputs[1], inputs[2], -inputs[2], row_ids=ids, col_ids=labels
                        )
                        for part, ids in zip(inputs[0].split(list(sizes)), labels.split(list(sizes)), strict=True)
                    ]
                else:
                    every = sslfast.similarity_terms(
                        *inputs[:3], bias=inputs[3], columns=True, positives=torch.arange(len(x))
                    )
                    one = every.row_lse + 0.5 * every.col_lse - 1.7 * every.positive
                    each = [part.sum() for part in one.split(list(sizes))]
            loss = sum(factor * part for factor, part in zip(factors, each, strict=True)) * world / len(x)
            truth = torch.autograd.grad(loss, inputs, materialize_grads=True)
            for name, mine, true in zip(("x", "y"), found[1:3], truth[:2], strict=True):
                torch.testing.assert_close(
                    mine, true.split(list(sizes))[rank], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
                )
            torch.testing.assert_close(mean_over_ranks(found[3]), truth[2] / world, rtol=1e-9, atol=1e-12)
