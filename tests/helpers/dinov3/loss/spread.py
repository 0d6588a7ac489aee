from __future__ import annotations

import dinov3.distributed as dist
import torch
import torch.distributed as torch_dist
import torch.distributed.nn  # noqa: F401  (torch_dist.nn)
from torch import Tensor, nn
from torch.nn import functional as F


class KoLeoLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pdist = nn.PairwiseDistance(2, eps=1e-8)

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        with torch.autocast("cuda", enabled=False):
            rows = F.normalize(student_output, dim=-1, eps=eps)
            similarity = (rows @ rows.T).fill_diagonal_(-1)
            return -(self.pdist(rows, rows[similarity.argmax(1)]) + eps).log().mean()


class KoLeoLossDistributed(nn.Module):
    def __init__(self, topk=1, loss_group_size: int | None = None) -> None:
        super().__init__()
        self.pdist = nn.PairwiseDistance(2, eps=1e-8)
        self.topk, self.loss_group_size = topk, loss_group_size

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        with torch.autocast("cuda", enabled=False):
            rows = F.normalize(student_output, dim=-1, eps=eps)
            every = torch.cat(torch_dist.nn.all_gather(rows)) if dist.is_enabled() else rows
            size = self.loss_group_size or len(every)
            if size % len(rows):
                raise ValueError(f"a group of {size} rows must consist of whole batches of {len(rows)}")
            if len(every) % size:
                raise ValueError(f"{len(every)} rows must consist of groups of {size}")
            group, place = divmod(dist.get_rank() * len(rows), size)
            others = every[group * size :][:size]
            with torch.no_grad():
                similarity = rows @ others.T
                similarity.diagonal(place).fill_(-1)
                nearest = similarity.topk(self.topk, dim=1).indices  # [B, topk]
            distance = self.pdist(rows.repeat_interleave(self.topk, 0), others[nearest.flatten()])
            return -(distance.float() + eps).log().mean()
