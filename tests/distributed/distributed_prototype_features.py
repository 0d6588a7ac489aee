"""Cases of test_distributed.py: the teacher's bias is that of one process on the rows of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from distributed_common import SIZES, batch, case
from sslfast import NormalizedPrototypes, PrototypeLoss, center_update_, prototype_sinkhorn, prototype_usage
from sslfast.distributed.collectives import Ranks


@case
def teacher_bias_of_all_rows(rank: int, world: int) -> None:
    """Uneven ranks, and iBOT's: 3 and 7 masked tokens in buffers of one length."""
    u = torch.randn(11, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for sizes in SIZES[world]:
        (h, *_), parts = batch(sizes, torch.float64)
        mine = parts[rank][0]
        masked = torch.arange(len(h)) % 3 != 1
        of_rank = masked.split(list(sizes))[rank]
        for weights, own in ((None, None), (masked.double(), of_rank.double())):
            right = prototype_sinkhorn(h, u, 0.3, row_weights=weights)
            found = prototype_sinkhorn(mine, u, 0.3, row_weights=own, gather_distributed=True)
            torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-11)
            usage = prototype_usage(h, u, 0.3, row_weights=weights)
            of_all = prototype_usage(mine, u, 0.3, row_weights=own, gather_distributed=True)
            torch.testing.assert_close(of_all[:3], usage[:3], rtol=1e-9, atol=1e-11)
            assert torch.equal(of_all.assignment, usage.assignment.split(list(sizes))[rank])
            for prototypes in (u, NormalizedPrototypes(u)):
                center, whole = torch.ones(1, 11, dtype=torch.float64), torch.ones(1, 11, dtype=torch.float64)
                center_update_(whole, h, prototypes, row_weights=weights)
                center_update_(center, mine, prototypes, row_weights=own, gather_distributed=True)
                torch.testing.assert_close(center, whole, rtol=1e-9, atol=1e-11)


@case
def prototype_loss_of_all_rows(rank: int, world: int) -> None:
    """The mean over ranks of loss and gradient, and the centre, are those of one process, uneven ranks too."""
    w = torch.randn(11, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    for sizes in SIZES[world]:
        (x, y, *_), parts = batch(sizes, torch.float64)
        mask = torch.arange(len(x) * 4).view(-1, 4) % 3 != 0
        tokens = mask.sum(1).split(list(sizes))
        of_tokens = torch.randn(int(mask.sum()), 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        own = of_tokens.split([int(part.sum()) for part in tokens])[rank]
        for centering in ("center", "sinkhorn"):
            for whole, mine in (
                (
                    (torch.stack([x, y]), torch.stack([y, x])),
                    [torch.stack(parts[rank][:2]), torch.stack(parts[rank][1::-1])],
                ),
                ((of_tokens, -of_tokens, w, None, mask), [own, -own, w, None, mask.split(list(sizes))[rank]]),
            ):
                one, many = (
                    PrototypeLoss(11, 0.3, centering=centering, gather_distributed=over).double()
                    for over in (False, True)
                )
                right = one(*whole[:2], *(whole[2:] or (w,)))
                found = many(*mine[:2], *(mine[2:] or (w,)))
                wanted = torch.autograd.grad(right, w)[0]
                gradient = torch.autograd.grad(found, w)[0]
                for a, b in ((found.detach(), right.detach()), (gradient, wanted)):
                    torch.testing.assert_close(Ranks().all_reduce(a) / world, b, rtol=1e-9, atol=1e-11)
                torch.testing.assert_close(many.center, one.center, rtol=1e-9, atol=1e-11)


@case
def teacher_bias_where_one_rank_has_no_row(rank: int, world: int) -> None:
    h, u = torch.randn(10, 7, dtype=torch.float64), torch.randn(11, 7, dtype=torch.float64)
    mine = h if rank == 0 else h[:0]
    found = prototype_sinkhorn(mine, u, 0.3, gather_distributed=True)
    torch.testing.assert_close(found, prototype_sinkhorn(h, u, 0.3), rtol=1e-9, atol=1e-11)
    center, whole = torch.ones(1, 11, dtype=torch.float64), torch.ones(1, 11, dtype=torch.float64)
    center_update_(center, mine, u, gather_distributed=True)
    torch.testing.assert_close(center, center_update_(whole, h, u), rtol=1e-9, atol=1e-11)


@case
def ranks_with_other_prototypes_all_raise(rank: int, world: int) -> None:
    if world == 1:
        return
    h = torch.randn(4, 7)
    told = _refused(lambda: prototype_sinkhorn(h, torch.randn(11 + rank, 7), gather_distributed=True))
    assert "disagree on how many prototypes" in told, told
    told = _refused(lambda: prototype_sinkhorn(h, torch.randn(11, 7), iterations=2 + rank, gather_distributed=True))
    assert "disagree on how many iterations" in told, told
    bad = (lambda: h[:, :5]) if rank == 1 else (lambda: h)
    told = _refused(lambda: prototype_sinkhorn(bad(), torch.randn(11, 7), gather_distributed=True))
    assert ("features" if rank == 1 else "refused") in told, told


def _refused(call: object) -> str:
    try:
        found = call()  # type: ignore[operator]
    except (ValueError, RuntimeError) as error:
        return str(error)
    assert isinstance(found, Tensor)
    return "no error"
