from __future__ import annotations

import torch
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
