"""Calls of the losses of a student against a teacher, as those of ``losses.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import sslfast
from sslfast.ops.distillation_cross_entropy import distillation_cross_entropy
from sslfast.ops.gram_anchor import gram_anchor
from sslfast.ops.mean_assignment import mean_assignment
from sslfast.ops.negative_cosine import negative_cosine
from sslfast.ops.prototype_columns import TeacherRows, visit
from sslfast.ops.sinkhorn import assigned, bias_of, column_sums

from .calls import of_function, of_mixed, of_module
from .inputs import B, Case, D, Inputs, L, N

_PROTOTYPES: dict[str, Case] = {
    "prototype_cross_entropy": lambda x: sslfast.prototype_cross_entropy(
        x.z(3, N, D), x.fixed(2, N, D), x.z(40, D), x.fixed(40, D), teacher_bias=x.fixed(40), row_weights=x.fixed(N)
    ),
    "prototype_cross_entropy/rows, shared prototypes": lambda x: sslfast.prototype_cross_entropy(
        x.z(), x.fixed(), x.z(40, D)
    ),
    "NormalizedPrototypes": lambda x: sslfast.prototype_cross_entropy(
        x.z(2, N, D), x.fixed(2, N, D), sslfast.NormalizedPrototypes(x.z(40, D), x.z(40))
    ),
    "DINOHead": lambda x: _of_head(x.made(lambda: sslfast.DINOHead(D, 40, hidden_dim=24, bottleneck_dim=16)), x),
    "prototype_sinkhorn": lambda x: sslfast.prototype_sinkhorn(x.fixed(), x.fixed(40, D), row_weights=x.fixed(N)),
    "k_means": lambda x: sslfast.k_means(x.fixed(), 5, 2),
    "k_means/spherical, given centroids": lambda x: sslfast.k_means(x.fixed(), x.fixed(3, D), 2, metric="cosine"),
    "self_labelling": lambda x: sslfast.self_labelling(x.fixed(), x.fixed(5, D), bias=x.fixed(5)),
    "deep_cluster_v2": lambda x: sslfast.deep_cluster_v2(x.z(2, N, D), x.labels()[None], prototypes=x.z(9, D)),
    "deep_cluster_v2/logits": lambda x: sslfast.deep_cluster_v2([x.z(2, N, D), x.z(2, N, 9)], x.ids(2, N) % 7),
    "DeepClusterV2Loss": lambda x: _of_bank(x.made(lambda: sslfast.DeepClusterV2Loss(N, D, [7])), x),
    "SwAVPrototypes": lambda x: _of_prototypes(x.made(lambda: sslfast.SwAVPrototypes(D, [9, 7])), x),
    "re_ssl": lambda x: sslfast.re_ssl(x.z(), x.fixed(), x.fixed(40, D)),
    "ReSSLLoss": lambda x: _and_queue(x.made(lambda: sslfast.ReSSLLoss(40, D)), x),
    "PrototypeLoss": lambda x: x.made(lambda: sslfast.PrototypeLoss(40))(
        x.z(3, N, D), x.fixed(2, N, D), x.z(40, D), x.fixed(40, D)
    ),
    "PrototypeLoss/masked tokens, Sinkhorn": lambda x: x.made(lambda: sslfast.PrototypeLoss(40, centering="sinkhorn"))(
        x.z(2 * L, D), x.fixed(2 * L, D), x.z(40, D), x.fixed(40, D), x.mask()
    ),
    "prototype_usage": lambda x: sslfast.prototype_usage(x.fixed(), x.fixed(40, D), row_weights=x.fixed(N)),
    "duplicate_prototypes": lambda x: sslfast.duplicate_prototypes(x.fixed(40, D)),
    "ops.prototype_columns.visit": lambda x: _visited(x),
    "center_update_": lambda x: sslfast.center_update_(x.fixed(40), x.fixed(2, N, D), x.fixed(40, D)),
    "center_update_/normalised": lambda x: sslfast.center_update_(
        x.fixed(1, 40), x.fixed(), sslfast.NormalizedPrototypes(x.fixed(40, D), x.fixed(40)), row_weights=x.fixed(N)
    ),
}


def _visited(x: Inputs) -> Any:
    rows = TeacherRows.of(x.fixed(), x.fixed(40, D), 0.3, x.ids(N) > 3)
    return visit(rows, x.fixed(40).to(rows.kind), by_row=True)


def _and_queue(module: Any, x: Inputs) -> list[Tensor]:
    return [module(x.z(), x.fixed()), module.memory_queue.queue]


def _of_head(head: sslfast.DINOHead, x: Inputs) -> Tensor:
    z = x.z(2, N, D).to(next(head.parameters()).dtype)
    return sslfast.prototype_cross_entropy(head(z), x.fixed(2, N, 16), head.prototypes)


def _of_bank(module: sslfast.DeepClusterV2Loss, x: Inputs) -> Tensor:
    module.update(x.fixed(2, N, D), x.ids(N))
    module.assignments.copy_(x.ids(1, N) % 7)
    return module(x.z(2, N, D), x.ids(N), x.z(7, D))


def _of_prototypes(head: sslfast.SwAVPrototypes, x: Inputs) -> Tensor:
    head.normalize()
    z = x.z(2, N, D).to(head.heads[0].weight.dtype)
    return sslfast.deep_cluster_v2(z, x.ids(2, N) % 7, prototypes=head)


_LOGITS: dict[str, Case] = {
    "koleo": lambda x: sslfast.koleo(x.z(), 2),
    "koleo/groups": lambda x: sslfast.koleo(x.z(), loss_group_size=N // 2),
    "KoLeoLoss": lambda x: sslfast.KoLeoLoss()(x.z()),
    "sinkhorn": lambda x: sslfast.sinkhorn(x.fixed(), 0.3, rows=x.ids(N)[5]),
    "sinkhorn_bias": lambda x: sslfast.sinkhorn_bias(x.fixed(N, 3, D), 0.3, start="rows"),
    "distillation_cross_entropy": lambda x: sslfast.distillation_cross_entropy(
        [x.z(), x.z(), x.z()], [x.fixed(), x.fixed()], teacher_bias=x.fixed(D), ignore_diagonal=True
    ),
    "distillation_cross_entropy/weighted rows of a buffer": lambda x: sslfast.distillation_cross_entropy(
        x.z(3, N, D), x.fixed(2, N, D), teacher_bias=x.fixed(2, D), row_weights=x.fixed(N), rows=x.ids(N)[5]
    ),
    "ops.distillation_cross_entropy.distillation_cross_entropy": lambda x: distillation_cross_entropy(
        [x.z(2, N, D), x.z(1, N, D)], [x.fixed(2, N, D)], None, (0.5, 0.5), ignore_diagonal=True
    ),
    "ops.sinkhorn.column_sums": lambda x: column_sums(x.fixed(N, 2, D), None, 0.3)[1],
    "ops.sinkhorn.bias_of": lambda x: bias_of(x.fixed(N, 2, D), 0.3, 2, True),
    "ops.sinkhorn.assigned": lambda x: assigned(x.fixed(N, 2, D), bias_of(x.fixed(N, 2, D), 0.3, 2, False), 0.3),
    "ops.distillation_cross_entropy.distillation_cross_entropy/rows of another teacher": lambda x: (
        distillation_cross_entropy([x.z(2, 5, D)], [x.fixed(1, N, D)], None, (0.5, 0.5), teacher_rows=x.ids(5))
    ),
    "assignment_cross_entropy": lambda x: sslfast.assignment_cross_entropy(x.z(), x.fixed()),
    "swav": lambda x: sslfast.swav(
        [x.z(), x.z()], [x.z()], [x.fixed(9, D), x.fixed(9, D)], temperature=0.5, sinkhorn_epsilon=0.5
    ),
    "SwAVLoss": lambda x: sslfast.SwAVLoss(0.5, 2, 0.5, diagnostics=True)([x.z(), x.z()], [x.z()]),
    "mean_assignment": lambda x: sslfast.mean_assignment(x.z(), 0.5, row_weights=x.fixed(N), rows=x.ids(N)[5]),
    "ops.mean_assignment.mean_assignment": lambda x: mean_assignment(x.z(), x.fixed(3, D), None, 0.5),
    "msn": lambda x: sslfast.msn(x.z(2 * N, D), x.fixed(), x.z(9, D), temperature=0.5, entropy_weight=0.5),
    "MSNLoss": lambda x: sslfast.MSNLoss(0.5, diagnostics=True)(x.z(), x.fixed(), x.z(9, D)),
    "pmsn": lambda x: sslfast.pmsn(x.z(2 * N, D), x.fixed(), x.z(9, D), temperature=0.5, sinkhorn_iterations=0),
    "PMSNLoss": lambda x: x.made(lambda: sslfast.PMSNLoss(0.5, target_distribution=torch.full((9,), 1 / 9)))(
        x.z(), x.fixed(), x.z(9, D)
    ),
    "DINOLoss": lambda x: _dino(x.made(lambda: sslfast.DINOLoss(D, diagnostics=True)), x),
    "DINOLoss/Sinkhorn": lambda x: x.made(lambda: sslfast.DINOLoss(D, centering="sinkhorn"))(
        x.fixed(2, N, D), [x.z(), x.z()], 0.5
    ),
    "IBOTPatchLoss": lambda x: x.made(lambda: sslfast.IBOTPatchLoss(D, diagnostics=True))(
        x.fixed(2 * L, D), x.z(2 * L, D), x.mask()
    ),
    "IBOTPlusPlusPatchLoss": lambda x: x.made(lambda: sslfast.IBOTPlusPlusPatchLoss(D, diagnostics=True))(
        x.fixed(B, L, D), x.z(B, L, D), x.mask(), visible_loss_weight=0.5
    ),
    "IBOTPlusPlusPatchLoss/no mask": lambda x: x.made(lambda: sslfast.IBOTPlusPlusPatchLoss(D))(
        x.fixed(B, L, D), x.z(B, L, D)
    ),
    "capi": lambda x: sslfast.capi(x.fixed(N, 5, D), x.z(N, 3, D), x.ids(N, 3)),
    "capi/itself": lambda x: _clustered(x.z(N, 3, D)),
    "CAPILoss": lambda x: sslfast.CAPILoss(0.5, 0.5, diagnostics=True)(x.fixed(N, 3, D), x.z(N, 3, D)),
}


def _clustered(logits: Tensor) -> Tensor:
    return sslfast.capi(logits, logits)


def _dino(module: Any, x: Inputs) -> list[Any]:
    teacher = [x.fixed(), x.fixed()]
    first = module(teacher, [x.z(), x.z(), x.z()], epoch=1, update_center=False)
    module.update_center()
    return [*first, *module(teacher, [x.z(), x.z()], 0.5), module.center]


def _of_four(function: Any) -> Case:
    return lambda x: function(x.z(), x.z(), x.fixed(), x.fixed())


DISTILLATION: dict[str, Case] = {
    **_PROTOTYPES,
    **_LOGITS,
    "negative_cosine": of_function(sslfast.negative_cosine),
    "negative_cosine/a target": lambda x: sslfast.negative_cosine(x.z(), x.fixed(), convention="distance"),
    "negative_cosine/in an autocast region": of_mixed(sslfast.negative_cosine),
    "NegativeCosineLoss": of_module(sslfast.NegativeCosineLoss),
    "NegativeCosineLoss/diagnostics": of_module(sslfast.NegativeCosineLoss, diagnostics=True),
    "byol": _of_four(sslfast.byol),
    "BYOLLoss": _of_four(sslfast.BYOLLoss()),
    "sim_siam": _of_four(sslfast.sim_siam),
    "SimSiamLoss": _of_four(sslfast.SimSiamLoss(diagnostics=True)),
    "gram_anchor": lambda x: sslfast.gram_anchor(x.z(B, L, D), x.fixed(B, L, D)),
    "gram_anchor/as they are": lambda x: sslfast.gram_anchor(x.z(B, L, D), x.fixed(B, L, D), normalize=False),
    "GramLoss": lambda x: sslfast.GramLoss(img_level=False, remove_neg=False)(x.z(B, L, D), x.fixed(B, L, D)),
    "patch_kernel_alignment": lambda x: sslfast.patch_kernel_alignment(x.z(B, L, D), x.fixed(B, L, D), x.mask()),
    "patch_kernel_alignment/samples of wide tokens": lambda x: sslfast.patch_kernel_alignment(
        x.z(B, L, 128), x.fixed(B, L, 128), x.mask(), max_tokens=5
    ),
    "PatchKernelAlignmentLoss": lambda x: sslfast.PatchKernelAlignmentLoss()(x.z(B, L, D), x.fixed(B, L, D)),
    "ops.gram_anchor.gram_anchor": lambda x: gram_anchor(x.z(B, L, D), x.fixed(B, L, D)),
    "ops.negative_cosine.negative_cosine": lambda x: negative_cosine(x.z(), x.z()),
}
