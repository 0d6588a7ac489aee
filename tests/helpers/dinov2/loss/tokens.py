from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def summed(x: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(x)
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
    return (targets * F.log_softmax(logits / temperature, dim=-1)).sum(-1)


class DINOLoss(nn.Module):
    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__()
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.updated, self.reduce_handle, self.len_teacher_output, self.async_batch_center = True, None, None, None

    @torch.no_grad()
    def softmax_center_teacher(self, teacher_output, teacher_temp):
        self.apply_center_update()
        return F.softmax((teacher_output - self.center) / teacher_temp, dim=-1)

    @torch.no_grad()
    def sinkhorn_knopp_teacher(self, teacher_output, teacher_temp, n_iterations=3):
        return balanced(teacher_output, teacher_temp, n_iterations)

    def forward(self, student_output_list, teacher_out_softmaxed_centered_list):
        pairs = ((s, t) for s in student_output_list for t in teacher_out_softmaxed_centered_list)
        return -sum(cross_entropy(t, s, self.student_temp).mean() for s, t in pairs)

    @torch.no_grad()
    def update_center(self, teacher_output):
        self.reduce_center_update(teacher_output)

    @torch.no_grad()
    def reduce_center_update(self, teacher_output):
        self.updated, self.len_teacher_output = False, len(teacher_output)
        self.async_batch_center = teacher_output.sum(0, keepdim=True)
        if dist.is_initialized():
            self.reduce_handle = dist.all_reduce(self.async_batch_center, async_op=True)

    @torch.no_grad()
    def apply_center_update(self):
        if self.updated:
            return
        if self.reduce_handle is not None:
            self.reduce_handle.wait()
        mean = self.async_batch_center / (self.len_teacher_output * ranks())
        self.center = self.center * self.center_momentum + mean * (1 - self.center_momentum)
        self.updated = True


class iBOTPatchLoss(nn.Module):  # noqa: N801
    def __init__(self, patch_out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__()
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.register_buffer("center", torch.zeros(1, 1, patch_out_dim))
        self.updated, self.reduce_handle = True, None
        self.len_teacher_patch_tokens, self.async_batch_center = None, None

    @torch.no_grad()
    def softmax_center_teacher(self, teacher_patch_tokens, teacher_temp):
        self.apply_center_update()
        return F.softmax((teacher_patch_tokens - self.center) / teacher_temp, dim=-1)

    @torch.no_grad()
    def sinkhorn_knopp_teacher(self, teacher_output, teacher_temp, n_masked_patches_tensor, n_iterations=3):
        dist.all_reduce(n_masked_patches_tensor)  # in place, and with a process group alone
        return balanced(teacher_output, teacher_temp, n_iterations)

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
            self.reduce_handle = dist.all_reduce(self.async_batch_center, async_op=True)

    @torch.no_grad()
    def apply_center_update(self):
        if self.updated:
            return
        if self.reduce_handle is not None:
            self.reduce_handle.wait()
        mean = self.async_batch_center / (self.len_teacher_patch_tokens * ranks())
        self.center = self.center * self.center_momentum + mean * (1 - self.center_momentum)
        self.updated = True
