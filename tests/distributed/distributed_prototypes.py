"""Cases of test_distributed.py: Sinkhorn, DINO's and iBOT's losses are those of one process on the global batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import sslfast
from distributed_common import SIZES, case, mean_over_ranks, raises

PROTOTYPES = 11
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, PROTOTYPES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def part(x: Tensor, sizes: tuple[int, ...], rank: int, dim: int = 0) -> Tensor:
    return x.split(list(sizes), dim)[rank].clone()


@case
def sinkhorn_of_the_global_batch(rank: int, world: int) -> None:
    """For uneven ranks, and where a rank has no row, or none that counts."""
    for sizes in (*SIZES[world], (0, *[7] * (world - 1)) if world > 1 else (3,)):
        for start in ("columns", "rows"):
            x = logits(sum(sizes), 2)
            truth = sslfast.sinkhorn(x, 0.2, start=start)
            mine = part(x, sizes, rank)
            found = sslfast.sinkhorn(mine, 0.2, start=start, gather_distributed=True)
            torch.testing.assert_close(found, part(truth, sizes, rank), **CLOSE)
            padded = torch.cat([mine, mine.new_full((4, 2, PROTOTYPES), float("nan"))])
            count = torch.tensor(len(mine))
            found = sslfast.sinkhorn(padded, 0.2, start=start, rows=count, gather_distributed=True)
            torch.testing.assert_close(found[: len(mine)], part(truth, sizes, rank), **CLOSE)


@case
def ranks_that_disagree_on_prototypes_all_raise(rank: int, world: int) -> None:
    if world == 1:
        return
    last = rank == world - 1
    x = torch.randn(3, 5 if last else 4)
    told = "sinkhorn: the ranks disagree on prototypes: 4 on rank"
    raises(ValueError, told, lambda: sslfast.sinkhorn(x, 0.2, gather_distributed=True))
    told = "disagree on the temperature: 0.1 on rank"
    raises(ValueError, told, lambda: sslfast.sinkhorn(x[:, :4], 0.2 if last else 0.1, gather_distributed=True))
    kind, told = (ValueError, "temperature must be") if last else (RuntimeError, f"of rank {world - 1} were")
    raises(kind, told, lambda: sslfast.sinkhorn(x[:, :4], 0.0 if last else 0.1, gather_distributed=True))
    criterion = sslfast.DINOLoss(5 if last else 4, gather_distributed=True)
    raises(ValueError, "the ranks disagree on", lambda: criterion(torch.stack([x, x]), [x, x]))


Step = Callable[[bool, Tensor, Tensor], tuple[Tensor, Tensor]]


def same_as_one_process(step: Step, whole: tuple[Tensor, Tensor], mine: tuple[Tensor, Tensor], sizes, dim: int) -> None:
    """``step(gather, teacher, student)`` gives a loss and the state after it; ``dim``: that of the rows."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    values = []
    for gather, (teacher, student) in ((False, whole), (True, mine)):
        leaf = student.clone().requires_grad_()
        loss, state = step(gather, teacher, leaf)
        values.append((loss.detach(), torch.autograd.grad(loss, leaf)[0], state))
    (loss, grad, state), (my_loss, my_grad, my_state) = values
    torch.testing.assert_close(mean_over_ranks(my_loss), loss, **CLOSE)
    torch.testing.assert_close(my_grad / world, part(grad, sizes, rank, dim), **CLOSE)
    torch.testing.assert_close(my_state, state, **CLOSE)


@case
def dino_of_the_global_batch(rank: int, world: int) -> None:
    for sizes in SIZES[world]:
        teacher, student = logits(2, sum(sizes)), logits(5, sum(sizes), seed=1)
        mine = part(teacher, sizes, rank, 1), part(student, sizes, rank, 1)
        for centering in ("center", "sinkhorn"):

            def step(gather: bool, teacher: Tensor, student: Tensor, centering=centering) -> tuple[Tensor, Tensor]:
                criterion = sslfast.DINOLoss(
                    PROTOTYPES, teacher_temp=0.3, centering=centering, gather_distributed=gather
                ).double()
                first = criterion(teacher, student)
                return first + criterion(teacher, student), criterion.center.clone()

            same_as_one_process(step, (teacher, student), mine, sizes, 1)


@case
def ibot_of_the_global_batch(rank: int, world: int) -> None:
    """Ranks with 3 and 7 masked tokens, or with none: the centre is the mean of all tokens, not one of means."""
    if world > 2:
        return
    for tokens in ((3, 7), (0, 7)) if world == 2 else ((4,),):
        masks = []
        for count in tokens:  # two images a rank
            mask = torch.zeros(2, 8, dtype=torch.bool)
            mask[0, : (count + 1) // 2], mask[1, : count // 2] = True, True
            masks.append(mask)
        teacher, student = logits(sum(tokens)), logits(sum(tokens), seed=1)
        mine = part(teacher, tokens, rank), part(student, tokens, rank)
        for centering in ("center", "sinkhorn"):

            def step(
                gather: bool, teacher: Tensor, student: Tensor, centering=centering, masks=tuple(masks)
            ) -> tuple[Tensor, Tensor]:
                criterion = sslfast.IBOTPatchLoss(
                    PROTOTYPES, teacher_temp=0.3, centering=centering, gather_distributed=gather
                ).double()
                mask = masks[rank] if gather else torch.cat(masks)
                first = criterion(teacher, student, mask)
                return first + criterion(teacher, student, mask), criterion.center.clone()

            same_as_one_process(step, (teacher, student), mine, tokens, 0)


@case
def ibot_plus_plus_of_the_global_batch(rank: int, world: int) -> None:
    """Uneven numbers of images: each image counts once."""
    for sizes in SIZES[world]:
        teacher, student = logits(sum(sizes), 4), logits(sum(sizes), 4, seed=1)
        masks = torch.arange(4 * sum(sizes)).view(-1, 4) % 3 == 0
        mine = part(teacher, sizes, rank), part(student, sizes, rank)
        for centering, masked in (("center", True), ("sinkhorn", True), ("center", False)):

            def step(gather: bool, teacher: Tensor, student: Tensor, how=(centering, masked)) -> tuple[Tensor, Tensor]:
                criterion = sslfast.IBOTPlusPlusPatchLoss(
                    PROTOTYPES, teacher_temp=0.3, centering=how[0], gather_distributed=gather
                ).double()
                mask = (masks.split(list(sizes))[rank] if gather else masks) if how[1] else None  # noqa: B023
                first = criterion(teacher, student, mask)
                return first + criterion(teacher, student, mask, None, 0.3), criterion.center.clone()

            same_as_one_process(step, (teacher, student), mine, sizes, 0)


@case
def capi_of_the_global_batch(rank: int, world: int) -> None:
    """Uneven ranks: a position's tokens are those of all of them, and each predicted token counts once."""
    for sizes in SIZES[world]:
        teacher, student = logits(sum(sizes), 5), logits(sum(sizes), 3, seed=1)
        index = torch.arange(3 * sum(sizes)).view(-1, 3) * 7 % 5
        mine = part(teacher, sizes, rank), part(student, sizes, rank)

        def step(gather: bool, teacher: Tensor, student: Tensor, index=index) -> tuple[Tensor, Tensor]:
            criterion = sslfast.CAPILoss(0.3, 0.5, gather_distributed=gather)
            meets = index.split(list(sizes))[rank] if gather else index  # noqa: B023
            return criterion(teacher, student, meets) + criterion(teacher[:, :3], student), torch.zeros(())

        same_as_one_process(step, (teacher, student), mine, sizes, 0)
    if world == 1:
        return
    last = rank == world - 1
    told = "sinkhorn: the ranks disagree on positions: 5 on rank"
    raises(ValueError, told, lambda: sslfast.capi(*[logits(3, 4 if last else 5)] * 2, gather_distributed=True))
    kind, told = (
        (ValueError, "teacher_index must be positions") if last else (RuntimeError, f"of rank {world - 1} were")
    )
    beyond = torch.full((2, 3), 9 if last else 0)
    raises(kind, told, lambda: sslfast.capi(logits(2, 5), logits(2, 3), beyond, gather_distributed=True))


@case
def swav_of_the_global_batch(rank: int, world: int) -> None:
    """Assignments are those of all ranks' rows; the loss is a mean over each rank's own, as swav's."""
    sizes = (6,) * world
    scores = logits(3, sum(sizes))
    mine = part(scores, sizes, rank, 1)

    def step(gather: bool, _: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        criterion = sslfast.SwAVLoss(sinkhorn_epsilon=0.3, sinkhorn_gather_distributed=gather)
        return criterion(list(scores[:2]), [scores[2]]), torch.zeros(())

    same_as_one_process(step, (scores, scores), (mine, mine), sizes, 1)
