from __future__ import annotations

import torch
import torch.distributed as dist
from dinov3.distributed import get_process_subgroup, get_subgroup_size
from torch import Tensor, nn
from torch.nn import functional as F


def summed(x: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(x, group=get_process_subgroup())
    return x


def balanced(scores: Tensor, temperature: float, iterations: int) -> Tensor:
    """Exponentials, not shifted: they overflow. The numbers of rows and prototypes, which cancel, are left out."""
    q = torch.exp(scores.float() / temperature)
    q /= summed(q.sum())
    for _ in range(iterations):
        q /= summed(q.sum(0, keepdim=True))
        q /= q.sum(1, keepdim=True)
    return q


def cross_entropy(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    return (targets.float() * F.log_softmax(logits.float() / temperature, dim=-1)).sum(-1)


class DINOLoss(nn.Module):
    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__()
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.register_buffer("center", torch.full((1, out_dim), torch.nan))
        self.updated, self.reduce_handle, self.len_teacher_output, self.async_batch_center = True, None, None, None

    def init_weights(self):
        self.center.zero_()

    @torch.no_grad()
    def softmax_center_teacher(self, teacher_output, teacher_temp, update_centers=True):
        if update_centers:
            self.apply_center_update()
        return F.softmax((teacher_output - self.center) / teacher_temp, dim=-1)

    @torch.no_grad()
    def sinkhorn_knopp_teacher(self, teacher_output, teacher_temp, n_iterations=3):
        return balanced(teacher_output, teacher_temp, n_iterations)

    def forward(self, student_logits, teacher_probs, ignore_diagonal=False):
        log_q = F.log_softmax(student_logits.float() / self.student_temp, dim=-1)
        pairs = torch.einsum("sbk,tbk->st", log_q, teacher_probs)
        met = torch.ones_like(pairs)
        if ignore_diagonal:
            met.fill_diagonal_(0)
        return -(pairs * met).sum() / (met.sum() * student_logits.shape[1])

    @torch.no_grad()
    def update_center(self, teacher_output):
        self.reduce_center_update(teacher_output)

    @torch.no_grad()
    def reduce_center_update(self, teacher_output):
        self.updated, self.len_teacher_output = False, len(teacher_output)
        self.async_batch_center = teacher_output.sum(0, keepdim=True)
        if dist.is_initialized():
            self.reduce_handle = dist.all_reduce(self.async_batch_center, async_op=True, group=get_process_subgroup())

    @torch.no_grad()
    def apply_center_update(self):
        if self.updated:
            return
        if self.reduce_handle is not None:
            self.reduce_handle.wait()
        mean = self.async_batch_center / (self.len_teacher_output * get_subgroup_size())
        self.center = self.center * self.center_momentum + mean * (1 - self.center_momentum)
        self.updated = True


class SinkhornKnoppTeacher(nn.Module):
    @torch.no_grad()
    def forward(self, teacher_output, teacher_temp, n_masked_patches_tensor, n_iterations=3):
        dist.all_reduce(n_masked_patches_tensor, group=get_process_subgroup())  # in place, and with a group alone
        return balanced(teacher_output, teacher_temp, n_iterations)


class iBOTPatchLoss(nn.Module):  # noqa: N801
    def __init__(self, patch_out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__()
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.register_buffer("center", torch.full((1, 1, patch_out_dim), torch.nan))
        self.updated, self.reduce_handle = True, None
        self.len_teacher_patch_tokens, self.async_batch_center = None, None
        self.sinkhorn_knopp_teacher = SinkhornKnoppTeacher()
        self.sinkhorn_knopp_teacher.compile()

    def init_weights(self):
        self.center.zero_()

    @torch.no_grad()
    def softmax_center_teacher(self, teacher_patch_tokens, teacher_temp, update_centers=True):
        if update_centers:
            self.apply_center_update()
        return F.softmax((teacher_patch_tokens - self.center) / teacher_temp, dim=-1)

    def forward(self, student_patch_tokens, teacher_patch_tokens, student_masks_flat):
        each = cross_entropy(teacher_patch_tokens, student_patch_tokens, self.student_temp)
        of_image = (each * student_masks_flat.float()).sum(-1) / student_masks_flat.sum(-1).clamp(min=1.0)
        return -of_image.mean()

    def forward_masked(
        self,
        student_patch_tokens_masked,
        teacher_patch_tokens_masked,
        student_masks_flat,
        n_masked_patches=None,
        masks_weight=None,
    ):
        each = cross_entropy(teacher_patch_tokens_masked, student_patch_tokens_masked, self.student_temp)
        if masks_weight is None:
            of_image = 1 / student_masks_flat.sum(-1, keepdim=True).clamp(min=1.0)
            masks_weight = of_image.expand_as(student_masks_flat)[student_masks_flat]
        return -(each[:n_masked_patches] * masks_weight).sum() / len(student_masks_flat)

    @torch.no_grad()
    def update_center(self, teacher_patch_tokens):
        self.reduce_center_update(teacher_patch_tokens)

    @torch.no_grad()
    def reduce_center_update(self, teacher_patch_tokens):
        self.updated, self.len_teacher_patch_tokens = False, len(teacher_patch_tokens)
        self.async_batch_center = teacher_patch_tokens.mean(1).sum(0, keepdim=True)
        if dist.is_initialized():
            self.reduce_handle = dist.all_reduce(self.async_batch_center, async_op=True, group=get_process_subgroup())

    @torch.no_grad()
    def apply_center_update(self):
        if self.updated:
            return
        if self.reduce_handle is not None:
            self.reduce_handle.wait()
        mean = self.async_batch_center / (self.len_teacher_patch_tokens * get_subgroup_size())
        self.center = self.center * self.center_momentum + mean * (1 - self.center_momentum)
        self.updated = True
