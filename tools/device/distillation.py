"""The losses of a teacher, of prototypes and of neighbours, as calls."""

from __future__ import annotations

import torch
from torch import Tensor

import sslfast

from .problems import Loss, Problem, of_two_views, rows, unit


def _gram(n: int, d: int) -> Problem:
    return Problem(sslfast.gram_anchor, (rows(3, n, d),), (), (rows(3, n, d, seed=1),))


def _gram_of_all(n: int, d: int) -> Problem:
    function = lambda x, y: sslfast.gram_anchor(x, y, normalize=False, per_image=False, negatives="keep")  # noqa: E731
    return Problem(function, (d**-0.5 * rows(2, n, d),), (), (d**-0.5 * rows(2, n, d, seed=1),))


def _alignment(n: int, d: int) -> Problem:
    mask = rows(3, n, seed=2) > 0.5
    return Problem(sslfast.patch_kernel_alignment, (rows(3, n, d),), (), (rows(3, n, d, seed=1), mask))


def _neighbours(n: int, d: int) -> Problem:
    function = lambda q, k: sslfast.nearest_neighbours(q, k, 5).similarity  # noqa: E731
    return Problem(function, (unit(n, d), unit(2 * n + 1, d, 1)))


def _by_distance(n: int, d: int) -> Problem:
    function = lambda q, k: sslfast.nearest_neighbours(q, k, 5, metric="euclidean").similarity  # noqa: E731
    return Problem(function, (unit(n, d), unit(2 * n + 1, d, 1)))


def _distilled(n: int, d: int) -> Problem:
    def function(student: Tensor, teacher: Tensor) -> Tensor:
        bias = sslfast.sinkhorn_bias(teacher[0], 0.2)
        return sslfast.distillation_cross_entropy(student, teacher, teacher_bias=bias, ignore_diagonal=True)

    return Problem(function, (rows(5, n, d),), (), (rows(2, n, d, seed=1),))


def _assigned(n: int, d: int) -> Problem:
    def function(student: Tensor, teacher: Tensor) -> Tensor:
        return sslfast.assignment_cross_entropy(student, sslfast.sinkhorn(teacher, 0.2))

    return Problem(function, (rows(n, d),), (), (rows(n, d, seed=1),))


def _swav(n: int, d: int) -> Problem:
    def function(first: Tensor, second: Tensor, small: Tensor) -> Tensor:
        return sslfast.swav([first, second], [small], sinkhorn_epsilon=0.2)

    return Problem(function, tuple(rows(n, d, seed=seed) for seed in range(3)))


def _dino(n: int, d: int) -> Problem:
    def function(student: Tensor, teacher: Tensor) -> Tensor:
        criterion = sslfast.DINOLoss(d).to(student.device)
        return criterion(teacher, student) + criterion(teacher.flip(1), student)

    return Problem(function, (rows(4, n, d),), (), (rows(2, n, d, seed=1),))


def _ibot(n: int, d: int) -> Problem:
    mask = rows(3, n, seed=2) > 0.5

    def function(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        return sslfast.IBOTPatchLoss(d).to(student.device)(teacher, student, mask)

    return Problem(function, (rows(3 * n, d),), (), (rows(3 * n, d, seed=1), mask))


def _all_tokens(n: int, d: int) -> Problem:
    mask = rows(3, n, seed=2) > 0.5

    def function(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        criterion = sslfast.IBOTPlusPlusPatchLoss(d).to(student.device)
        return criterion(teacher, student, mask, visible_loss_weight=0.5)

    return Problem(function, (rows(3, n, d),), (), (rows(3, n, d, seed=1), mask))


def _capi(n: int, d: int) -> Problem:
    index = torch.arange(3 * n).view(n, 3) % 5
    function = lambda student, teacher, index: sslfast.capi(teacher, student, index)  # noqa: E731
    return Problem(function, (rows(n, 3, d),), (), (rows(n, 5, d, seed=1) / 4, index))


def _re_ssl(n: int, d: int) -> Problem:
    function = lambda q, k, queue: sslfast.re_ssl(q, k, queue, temperature_k=0.1)  # noqa: E731
    return Problem(function, (rows(n, d),), (), (rows(n, d, seed=1), unit(2 * n + 1, d, 2)))


def _prototypes(n: int, d: int) -> Problem:
    def function(student: Tensor, w: Tensor, gain: Tensor, teacher: Tensor, u: Tensor, bias: Tensor) -> Tensor:
        prototypes = sslfast.NormalizedPrototypes(w, gain)
        return sslfast.prototype_cross_entropy(student, teacher, prototypes, u, teacher_bias=bias)

    student = unit(3 * n, d).view(3, n, d)
    given = unit(2 * n, d, seed=1).view(2, n, d), unit(2 * n, d, seed=4), rows(2 * n, seed=5)
    return Problem(function, (student, rows(2 * n, d, seed=2), 1 + rows(2 * n, seed=3).square()), (), given)


def _sinkhorn(n: int, d: int) -> Problem:
    def function(student: Tensor, w: Tensor, teacher: Tensor) -> Tensor:
        bias = sslfast.prototype_sinkhorn(teacher, w.detach(), 0.1)
        center = sslfast.center_update_(torch.zeros_like(bias), teacher, w.detach(), 0.0)
        return sslfast.prototype_cross_entropy(student, teacher, w, teacher_temperature=0.1, teacher_bias=bias - center)

    return Problem(function, (unit(n, d), unit(2 * n, d, seed=2)), (), (unit(n, d, seed=1),))


def _clustered(n: int, d: int) -> Problem:
    """Clusters so far apart that no rounding moves a row from one to another."""
    centers = 4 * unit(7, d)
    x = centers[torch.arange(n) % 7] + 0.05 * rows(n, d, seed=1)

    def function(z: Tensor, w: Tensor, x: Tensor) -> Tensor:
        found = [sslfast.k_means(x, x[:7], metric=metric) for metric in ("euclidean", "cosine")]
        labels = torch.stack([clusters.assignments for clusters in found])
        return sslfast.deep_cluster_v2(z, labels, prototypes=[w, w[:7]])

    return Problem(function, (unit(3 * n, d, seed=2).view(3, n, d), unit(9, d, seed=3)), (), (x,))


def _self_labelled(n: int, d: int) -> Problem:
    def function(z: Tensor, w: Tensor, x: Tensor) -> Tensor:
        labels = sslfast.self_labelling(x[:, :7].round(), sharpness=1.0)  # a half's digits are exact
        return sslfast.deep_cluster_v2(z, labels, prototypes=w)

    return Problem(function, (unit(n, d, seed=2), unit(7, d, seed=3)), (), (4 * rows(n, d),))


def _bank(n: int, d: int) -> Problem:
    def function(z: Tensor, w: Tensor, index: Tensor) -> Tensor:
        criterion = sslfast.DeepClusterV2Loss(n, d, [len(w)]).to(z.device)
        criterion.assignments.copy_(index % len(w))
        return criterion(z, index, w)

    return Problem(function, (unit(2 * n, d).view(2, n, d), unit(9, d, seed=1)), (), (torch.arange(n),))


def _mean_assignment(n: int, d: int) -> Problem:
    def function(logits: Tensor) -> Tensor:
        return torch.special.entr(sslfast.mean_assignment(logits)).sum()

    return Problem(function, (rows(n, d),))


def _msn(n: int, d: int) -> Problem:
    def function(anchors: Tensor, prototypes: Tensor, targets: Tensor) -> Tensor:
        found = sslfast.msn(anchors, targets, prototypes, entropy_weight=0.5)
        return found + sslfast.pmsn(anchors, targets, prototypes)

    return Problem(function, (rows(3 * n, d), rows(2 * n, d, seed=1)), (), (rows(n, d, seed=2),))


def _prototype_loss(n: int, d: int) -> Problem:
    mask = rows(3, n, seed=2) > 0.5

    def function(student: Tensor, w: Tensor, teacher: Tensor, u: Tensor, mask: Tensor) -> Tensor:
        dino, ibot = sslfast.PrototypeLoss(2 * n), sslfast.PrototypeLoss(2 * n, centering="sinkhorn")
        of_views = dino.to(student.device)(student.view(3, n, d), teacher.view(3, n, d)[:2], w, u)
        return of_views + ibot.to(student.device)(student, teacher, w, u, mask)

    given = unit(3 * n, d, seed=1), unit(2 * n, d, seed=4), mask
    return Problem(function, (unit(3 * n, d), unit(2 * n, d, seed=3)), (), given)


DISTILLATION = [
    Loss("gram_anchor", ("gram_anchor",), _gram),
    Loss("gram_anchor, all rows", ("gram_anchor",), _gram_of_all),
    Loss("patch_kernel_alignment", ("patch_kernel_alignment",), _alignment, triton=False),
    of_two_views("negative_cosine", sslfast.negative_cosine, triton=False),
    of_two_views("byol", lambda p, z: sslfast.byol(p, z, z, p), triton=False),
    of_two_views("sim_siam", lambda p, z: sslfast.sim_siam(p, z, z, p), triton=False),
    Loss("nearest_neighbours", ("nearest_neighbours",), _neighbours),
    Loss("nearest_neighbours, by distance", ("nearest_neighbours",), _by_distance),
    Loss("k_means", ("k_means", "deep_cluster_v2"), _clustered),
    Loss("self_labelling", ("self_labelling",), _self_labelled, waits="the host reads the error"),
    Loss("DeepClusterV2Loss", ("DeepClusterV2Loss",), _bank, waits="its labels are made anew for each call here"),
    Loss("koleo", ("koleo",), lambda n, d: Problem(sslfast.koleo, (rows(n, d),))),
    Loss("koleo, topk", ("koleo",), lambda n, d: Problem(lambda x: sslfast.koleo(x, 3), (rows(n, d),))),
    Loss("distillation_cross_entropy", ("distillation_cross_entropy", "sinkhorn_bias"), _distilled, triton=False),
    Loss("assignment_cross_entropy", ("assignment_cross_entropy", "sinkhorn"), _assigned, triton=False),
    Loss("swav", ("swav", "SwAVLoss"), _swav, triton=False),
    Loss("mean_assignment", ("mean_assignment",), _mean_assignment, triton=False),
    Loss("msn", ("msn", "pmsn", "MSNLoss", "PMSNLoss"), _msn, triton=False),
    Loss("DINOLoss", ("DINOLoss",), _dino, triton=False),
    Loss("IBOTPatchLoss", ("IBOTPatchLoss",), _ibot, triton=False),
    Loss("IBOTPlusPlusPatchLoss", ("IBOTPlusPlusPatchLoss",), _all_tokens, triton=False),
    Loss("capi", ("capi", "CAPILoss"), _capi, triton=False),
    Loss("re_ssl", ("re_ssl", "ReSSLLoss"), _re_ssl),
    Loss("prototype_cross_entropy", ("prototype_cross_entropy", "NormalizedPrototypes"), _prototypes),
    Loss("PrototypeLoss", ("PrototypeLoss",), _prototype_loss),
    Loss("prototype_sinkhorn", ("prototype_sinkhorn", "center_update_"), _sinkhorn),
]
