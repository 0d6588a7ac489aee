from __future__ import annotations

from torch import nn
from torch.nn import functional as F


class GramLoss(nn.Module):
    def __init__(self, apply_norm=True, img_level=True, remove_neg=True, remove_only_teacher_neg=False) -> None:
        super().__init__()
        assert not (remove_neg and remove_only_teacher_neg)
        self.apply_norm, self.remove_neg, self.remove_only_teacher_neg = apply_norm, remove_neg, remove_only_teacher_neg

    def forward(self, output_feats, target_feats, img_level=True):
        if img_level:
            assert output_feats.dim() == target_feats.dim() == 3
        similarities = []
        for features in (output_feats.float(), target_feats.float()):
            rows = F.normalize(features, dim=-1) if self.apply_norm else features
            rows = rows if img_level else rows.reshape(-1, rows.shape[-1])
            similarities.append(rows @ rows.mT)
        student, teacher = similarities
        if self.remove_neg:
            student = student.masked_fill(student < 0, 0)
        if self.remove_neg or self.remove_only_teacher_neg:
            teacher = teacher.masked_fill(teacher < 0, 0)
        return F.mse_loss(student, teacher)
