"""What ``sslfast.patch`` tries out before it serves a method of DINOv2 or DINOv3, and that it leaves no trace."""

from __future__ import annotations

import sys

import dinov2.loss as v2
import dinov2.loss.tokens as tokens
import dinov3.loss as v3
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import sslfast

OWN_PAIRS = v2.DINOLoss.forward


def alone(teacher_output, temperature, iterations=3):
    """Assignments that balance each rank's rows by themselves."""
    q = torch.exp(teacher_output.float() / temperature)
    for _ in range(iterations):
        q = F.normalize(F.normalize(q, p=1, dim=0), p=1, dim=1)
    return q


def local_sinkhorn(self, teacher_output, teacher_temp, n_iterations=3):
    return alone(teacher_output, teacher_temp, n_iterations)


def shifted_sinkhorn(self, teacher_output, teacher_temp, n_iterations=3):
    """Each row's maximum subtracted, which changes the assignments."""
    return tokens.balanced(teacher_output - teacher_output.amax(1, keepdim=True), teacher_temp, n_iterations)


def mean_of_pairs(self, student_output_list, teacher_out_softmaxed_centered_list):
    count = len(student_output_list) * len(teacher_out_softmaxed_centered_list)
    return OWN_PAIRS(self, student_output_list, teacher_out_softmaxed_centered_list) / count


def detached_pairs(self, student_output_list, teacher_out_softmaxed_centered_list):
    first, *rest = student_output_list
    found = OWN_PAIRS(self, [first], teacher_out_softmaxed_centered_list)
    return found + OWN_PAIRS(self, [s.detach() for s in rest], teacher_out_softmaxed_centered_list) if rest else found


def other_center(self, teacher_output):
    self.updated, self.len_teacher_output = False, len(teacher_output)
    self.async_batch_center = teacher_output.mean(0, keepdim=True)
    dist.all_reduce(self.async_batch_center)


def eval_center(self, teacher_output, teacher_temp):
    return F.softmax((teacher_output - self.center * self.training) / teacher_temp, dim=-1)


@pytest.mark.parametrize(
    ("method", "body", "reason"),
    [
        ("sinkhorn_knopp_teacher", local_sinkhorn, "does not compute"),
        ("sinkhorn_knopp_teacher", shifted_sinkhorn, "does not compute"),
        ("sinkhorn_knopp_teacher", lambda self, teacher_output, teacher_temp, n_iterations=5: None, "its arguments"),
        ("forward", mean_of_pairs, "does not compute"),
        ("forward", detached_pairs, "does not compute"),
        ("reduce_center_update", other_center, "does not compute"),
        ("softmax_center_teacher", eval_center, "does not compute"),
        ("softmax_center_teacher", lambda self, teacher_output, teacher_temp, step: None, "its arguments"),
    ],
)
def test_a_changed_method_is_left_alone(monkeypatch, method, body, reason):
    monkeypatch.setattr(v2.DINOLoss, method, body)
    with sslfast.patch("dinov2", verbose=False) as patched:
        left = {name: why for name, why in patched.unchanged.items() if "K numbers" not in why and "pass" not in why}
        assert list(left) == [f"DINOLoss.{method}"] and reason in left[f"DINOLoss.{method}"]
        assert vars(v2.DINOLoss)[method] is body and "DINOLoss" in patched.replaced


def test_a_teacher_that_is_shifted_is_left_alone(monkeypatch):
    cls = v3.iBOTPatchLoss(7).sinkhorn_knopp_teacher.__class__

    def forward(self, teacher_output, teacher_temp, n_masked_patches_tensor, n_iterations=3):
        return alone(teacher_output, teacher_temp, n_iterations)

    monkeypatch.setattr(cls, "forward", forward)
    with sslfast.patch("dinov3", verbose=False) as patched:
        assert "SinkhornKnoppTeacher.forward" in patched.unchanged and cls.__name__ not in patched.replaced


def test_a_gram_loss_that_removes_more_is_left_alone(monkeypatch):
    own = v3.GramLoss.forward

    def forward(self, output_feats, target_feats, img_level=True):
        self.remove_neg = self.remove_neg or self.remove_only_teacher_neg
        return own(self, output_feats, target_feats, img_level)

    monkeypatch.setattr(v3.GramLoss, "forward", forward)
    with sslfast.patch("dinov3", verbose=False) as patched:
        assert "GramLoss.forward" in patched.unchanged and "KoLeoLoss" in patched.replaced


def test_a_constructor_with_more_arguments_is_left_alone(monkeypatch):
    own = v2.iBOTPatchLoss.__init__

    def init(self, patch_out_dim, student_temp=0.1, center_momentum=0.9, focal=0.0):
        own(self, patch_out_dim, student_temp, center_momentum)

    monkeypatch.setattr(v2.iBOTPatchLoss, "__init__", init)
    with sslfast.patch("dinov2", verbose=False) as patched:
        assert "takes focal" in patched.unchanged["iBOTPatchLoss"]
        assert patched.replaced == ("DINOLoss", "KoLeoLoss")


def test_a_copy_without_some_of_the_classes(monkeypatch):
    monkeypatch.delattr(v3, "GramLoss")
    monkeypatch.delattr(v3, "iBOTPatchLoss")
    with sslfast.patch("dinov3", verbose=False) as patched:
        for name in ("GramLoss", "iBOTPatchLoss", "SinkhornKnoppTeacher"):
            assert patched.unchanged[name] == "dinov3.loss has none"
    for name in ("DINOLoss", "KoLeoLoss", "KoLeoLossDistributed"):
        monkeypatch.delattr(v3, name)
    with pytest.raises(ImportError, match="dinov3.loss has none of DINOLoss, iBOTPatchLoss"):
        sslfast.patch("dinov3")


def test_no_such_package(monkeypatch):
    monkeypatch.delitem(sys.modules, "sslfast.adapters.dinov2", raising=False)
    monkeypatch.setitem(sys.modules, "dinov2.loss", None)
    with pytest.raises(ImportError, match="dinov2 is not importable"):
        sslfast.patch("dinov2")


def test_trials_leave_no_trace(monkeypatch):
    """Random numbers, the default device, the packages' own names, and the process group, of which there is none."""
    names = {module: dict(vars(sys.modules[module])) for module in ("dinov2.loss.tokens", "dinov3.loss.tokens")}

    def refuse(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("a trial sums over the ranks")

    monkeypatch.setattr(dist, "all_reduce", refuse)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with torch.device("meta"), sslfast.patch("dinov2", verbose=False), sslfast.patch("dinov3", verbose=False) as third:
        assert not any("does not compute" in why for why in third.unchanged.values())
    assert torch.equal(torch.rand(2), expected)
    for module, before in names.items():
        assert vars(sys.modules[module]) == before
