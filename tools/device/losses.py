"""Every public loss as a call of (rows, features), in float64 on the CPU: what stage A holds against the truth.

The calls are :class:`Loss`; those of a teacher and prototypes are in ``distillation.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from sslfast.losses.contrastive.group_nt_xent import group_nt_xent

from .distillation import DISTILLATION
from .problems import Loss, Problem, labels, of_two_views, rows, two, unit

# ----------------------------------------------------------------------------------------------------- contrastive


def _info_nce(n: int, d: int) -> Problem:
    def function(q: Tensor, k: Tensor, negatives: Tensor, hard: Tensor, temperature: Tensor) -> Tensor:
        return sslfast.smoothed_info_nce(q, k, temperature, negatives=(negatives, hard))

    return Problem(function, (*two(n, d), rows(n // 2 + 1, d, seed=4), rows(n, 2, d, seed=5)), (0.2,))


def _info_nce_ids(n: int, d: int) -> Problem:
    def function(q: Tensor, k: Tensor, temperature: Tensor, ids: Tensor) -> Tensor:
        return sslfast.symmetric_info_nce(q, k, temperature, ids=(ids, ids))

    ids = torch.arange(n) // 2 * 2  # every second row is excluded beside its own
    return Problem(function, two(n, d), (0.2,), (ids,))


def _sup_con(n: int, d: int) -> Problem:
    def function(features: Tensor, temperature: Tensor, y: Tensor) -> Tensor:
        return sslfast.sup_con(features, y, temperature=temperature, normalize=True)

    return Problem(function, (rows(n, 2, d),), (0.2,), (labels(n),))


def _sup_con_mask(n: int, d: int) -> Problem:
    y = labels(n)

    def function(features: Tensor, mask: Tensor) -> Tensor:
        return sslfast.sup_con(features, mask=mask, normalize=True)

    return Problem(function, (rows(n, 2, d),), (), ((y[:, None] == y).long(),))


def _labelled(loss: Callable[..., Tensor]) -> Callable[[int, int], Problem]:
    def make(n: int, d: int) -> Problem:
        def function(z: Tensor, keys: Tensor, temperature: Tensor, y: Tensor, key_labels: Tensor) -> Tensor:
            return loss(z, y, keys, key_labels, temperature=temperature)

        return Problem(function, (rows(n, d), rows(n + 9, d, seed=6)), (0.2,), (labels(n), labels(n + 9)))

    return make


def _moco(n: int, d: int) -> Problem:
    return Problem(
        lambda q, temperature, k, queue: sslfast.moco(q, k, queue, temperature),
        two(n, d)[:1],
        (0.2,),
        (two(n, d)[1], rows(5 * n + 3, d, seed=7)),
    )


def _regions(n: int, d: int, views: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    """Four regions of each image and their masks, in two views."""
    images = n // 4
    z = tuple(rows(images, 4, d) + rows(images, 4, d, seed=1 + view) for view in range(views))
    masks = labels(4 * images, 5).view(images, 4)
    return z, (masks, masks.flip(1))


def _det_con_s(n: int, d: int) -> Problem:
    z, masks = _regions(n, d, 2)
    return Problem(lambda a, b, t, m0, m1: sslfast.det_con_s(a, b, m0, m1, t), z, (0.3,), masks)


def _det_con_b(n: int, d: int) -> Problem:
    (*learn, t0, t1), masks = _regions(n, d, 4)
    function = lambda a, b, t, c, d, m0, m1: sslfast.det_con_b(a, b, c, d, m0, m1, t)  # noqa: E731
    return Problem(function, tuple(learn), (0.3,), (t0, t1, *masks))


def _co2(n: int, d: int) -> Problem:
    def function(q: Tensor, k: Tensor, t: Tensor, queue: Tensor) -> Tensor:
        return sslfast.co2(q, k, None, t) + sslfast.co2(q, k, queue, t)

    return Problem(function, two(n, d), (0.3,), (unit(2 * n + 3, d, 7),))


def _regularizer(n: int, d: int) -> Problem:
    def function(q: Tensor, k: Tensor) -> Tensor:
        criterion = sslfast.CO2Regularizer(t_consistency=0.2, memory_bank_size=(2 * n, d)).to(q.device)
        fill(criterion)
        return criterion(q, k)

    return Problem(function, two(n, d))


def _similarity_terms(n: int, d: int) -> Problem:
    def function(
        q: Tensor, k: Tensor, bias: Tensor, scale: Tensor, row_ids: Tensor, col_ids: Tensor, at: Tensor
    ) -> Any:
        terms = sslfast.similarity_terms(
            q, k, scale, bias=bias, row_ids=row_ids, col_ids=col_ids, columns=True, positives=at, hardest=True
        )
        # The hardest logit has no gradient.
        return terms.row_lse, terms.col_lse, terms.positive, terms.hardest

    m = n + 13
    ids = torch.arange(n) % 11, (torch.arange(m) + 5) % 13
    return Problem(function, (unit(n, d), unit(m, d, 1), rows(m, seed=8)), (6.0,), (*ids, (torch.arange(n) * 3) % m))


def _similarity_lse(n: int, d: int) -> Problem:
    function = lambda q, k, scale: sslfast.similarity_lse(q, k, scale)  # noqa: E731
    return Problem(function, (unit(n, d), unit(2 * n + 1, d, 1)), (9.0,))


def _similarity_logsigmoid(n: int, d: int) -> Problem:
    def function(q: Tensor, k: Tensor, scale: Tensor, bias: Tensor, row_ids: Tensor, col_ids: Tensor) -> Tensor:
        return sslfast.similarity_logsigmoid(q, k, scale, bias, row_ids=row_ids, col_ids=col_ids) / n

    ids = torch.arange(n) % 11, torch.arange(n + 7) % 13
    return Problem(function, (unit(n, d), unit(n + 7, d, 1)), (6.0, -2.0), ids)


def _ranking(n: int, d: int) -> Problem:
    def function(anchors: Tensor, positives: Tensor, negatives: Tensor, scale: Tensor) -> Tensor:
        return sslfast.multiple_negatives_ranking(
            anchors, positives, negatives, scale, directions=("query_to_doc", "doc_to_query")
        )

    return Problem(function, (*two(n, d), rows(n, d, seed=9)), (12.0,))


def _bank(n: int, d: int) -> Problem:
    def function(q: Tensor, k: Tensor) -> Tensor:
        criterion = sslfast.NTXentLoss(temperature=0.2, memory_bank_size=(2 * n, d)).to(q.device)
        fill(criterion)
        return criterion(q, k)

    return Problem(function, two(n, d))


def _queue(n: int, d: int) -> Problem:
    def function(q: Tensor, k: Tensor) -> Tensor:
        criterion = sslfast.MoCoLoss(size=2 * n, dim=d, temperature=0.2).to(q.device)
        fill(criterion)
        return criterion(q, k.detach())

    return Problem(function, two(n, d))


def fill(module: torch.nn.Module) -> None:
    """The same unit rows in every buffer of rows, on every device."""
    for buffer in module.buffers():
        if buffer.is_floating_point() and buffer.dim() == 2:
            buffer.copy_(unit(*buffer.shape, seed=11))


MADE_ANEW = "its queue is made anew for each call here"
CONTRASTIVE = [
    of_two_views("nt_xent", lambda z0, z1, t: sslfast.nt_xent(z0, z1, t), 0.3),
    Loss("smoothed_info_nce", ("smoothed_info_nce",), _info_nce),
    Loss("symmetric_info_nce, ids", ("symmetric_info_nce", "info_nce"), _info_nce_ids),
    of_two_views("debiased_info_nce", lambda q, k, t: sslfast.debiased_info_nce(q, k, t), 0.5),
    Loss("moco", ("moco",), _moco),
    of_two_views("moco_v3", lambda q, k, t: sslfast.moco_v3(q, k.detach(), t), 0.2),
    Loss("sup_con", ("sup_con",), _sup_con),
    Loss("sup_con, mask", ("sup_con",), _sup_con_mask),
    Loss("sup_con_keys", ("sup_con_keys",), _labelled(sslfast.sup_con_keys)),
    Loss("labelled_nt_xent", ("labelled_nt_xent",), _labelled(sslfast.labelled_nt_xent)),
    Loss("pair_nt_xent", ("pair_nt_xent",), _labelled(sslfast.pair_nt_xent), waits="the labels are sorted on the host"),
    Loss(
        "group_nt_xent",
        ("group_nt_xent",),
        lambda n, d: Problem(
            lambda z, groups: group_nt_xent(z, groups, 0.3), (rows(n, d),), (), (torch.arange(n) % (n // 3),)
        ),
        waits="the groups are read on the host",
    ),
    of_two_views("dcl", lambda z0, z1, t: sslfast.dcl(z0, z1, t), 0.3),
    of_two_views("dclw", lambda z0, z1, t: sslfast.dclw(z0, z1, t), 0.3),
    of_two_views("direct_clr", lambda z0, z1, t: sslfast.direct_clr(z0, z1, t, loss_dim=9), 0.3),
    of_two_views("macl", lambda z0, z1, t: sslfast.macl(z0, z1, t), 0.5),
    Loss("det_con_s", ("det_con_s",), _det_con_s),
    Loss("det_con_b", ("det_con_b",), _det_con_b),
    Loss("co2", ("co2",), _co2, triton=False),
    Loss("clip", ("clip",), lambda n, d: Problem(sslfast.clip, (unit(n, d), unit(n, d, 1)), (9.0, 0.5))),
    Loss("sig_lip", ("sig_lip",), lambda n, d: Problem(sslfast.sig_lip, (unit(n, d), unit(n, d, 1)), (9.0, -3.0))),
    Loss("multiple_negatives_ranking", ("multiple_negatives_ranking",), _ranking),
    of_two_views("alignment", lambda x, y: sslfast.alignment(x, y, normalize=True), triton=False),
    of_two_views("uniformity", lambda x, y: sslfast.uniformity(x, normalize=True) + 0 * y.sum()),
    Loss("hypersphere", ("hypersphere",), lambda n, d: Problem(sslfast.hypersphere, (unit(n, d), unit(n, d, 1)))),
    Loss("similarity_terms", ("similarity_terms",), _similarity_terms),
    Loss("similarity_lse", ("similarity_lse",), _similarity_lse),
    Loss("similarity_logsigmoid", ("similarity_logsigmoid",), _similarity_logsigmoid),
    Loss("NTXentLoss, memory bank", ("NTXentLoss",), _bank, waits=MADE_ANEW),
    Loss("CO2Regularizer", ("CO2Regularizer",), _regularizer, triton=False, waits=MADE_ANEW),
    Loss("MoCoLoss", ("MoCoLoss", "MemoryQueue"), _queue, waits=MADE_ANEW),
]

# ------------------------------------------------------------------------------------------------ redundancy reduction


def _columns(n: int, d: int) -> tuple[Tensor, Tensor]:
    """Related views whose columns have different means and deviations."""
    z = rows(n, d) * torch.linspace(0.5, 1.5, d, dtype=torch.float64) + torch.linspace(-1, 2, d, dtype=torch.float64)
    return z, z + 0.5 * rows(n, d, seed=1)


def of_columns(name: str, function: Callable[..., Any], **options: Any) -> Loss:
    return Loss(name, (name.partition(",")[0],), lambda n, d: Problem(function, _columns(n, d)), **options)


def _second_moment(form: str, scale: str, cross: bool) -> Callable[..., tuple[Tensor, ...]]:
    def function(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        found = sslfast.second_moment(a, b, cross=cross, scale=scale, form=form)
        return found.off_diagonal, found.diagonal

    return function


def _vicregl(n: int, d: int) -> Problem:
    def function(a: Tensor, b: Tensor, map_a: Tensor, map_b: Tensor, grid_a: Tensor, grid_b: Tensor) -> Tensor:
        return sslfast.vicregl([(a, map_a), (b, map_b)], [grid_a, grid_b], num_matches=(1, 1))

    maps = rows(n, 1, 2, d, seed=2), rows(n, 1, 2, d, seed=4)
    grids = tuple(rows(n, 1, 2, 2, seed=seed).to(torch.float32) for seed in (5, 6))
    return Problem(function, (*_columns(n, d), *maps), (), grids)


def _tico(z_a: Tensor, z_b: Tensor) -> tuple[Tensor, Tensor]:
    loss, covariance = sslfast.tico(z_a, z_b)
    return loss, covariance.detach()


def _w_mse(n: int, d: int) -> Problem:
    def function(x: Tensor) -> Tensor:
        torch.manual_seed(0)  # of the permutation of a batch, which is whitened whole
        return sslfast.WMSELoss(embedding_dim=8, w_size=n, w_iter=1, eps=1e-3).to(x.device)(x)

    return Problem(function, (torch.cat(_columns(n, 8)),))


def _views_of_samples(n: int, d: int) -> Problem:
    return Problem(lambda a, b: sslfast.mmcr(a, b), (rows(n, 2, d), rows(n, 2, d, seed=1)))


def _directions(d: int) -> Tensor:
    return F.normalize(rows(d, 12, seed=3), dim=0)


def _sigreg(n: int, d: int) -> Problem:
    return Problem(lambda z, a: sslfast.sigreg(z, slices=a), (rows(2, n, d),), (), (_directions(d),))


def _steps(n: int, d: int) -> Problem:
    """Modules whose directions are drawn, two steps of one: the counter moves on the device."""

    def function(z: Tensor) -> Tensor:
        sigreg = sslfast.SIGReg(num_vectors=12, seed=5).to(z.device)
        views = sslfast.LeJEPALoss(sigreg_num_vectors=12).to(z.device)(global_proj=z)
        shape = sslfast.VISRegLoss(num_slices=12).to(z.device)(global_proj=z)
        frames = z.transpose(0, 1)
        wm = sslfast.LeWMLoss(sigreg_num_vectors=12).to(z.device)(predicted=frames, target=frames, embeddings=frames)
        return sigreg(z) + sigreg(z) + views + shape + wm

    return Problem(function, (rows(2, max(n, 2), d),))


def _le_jepa(n: int, d: int) -> Problem:
    return Problem(
        lambda a, b, c: sslfast.le_jepa(a, b, slices=c), (rows(2, n, d), rows(3, n, d, seed=1)), (), (_directions(d),)
    )


def _le_wm(n: int, d: int) -> Problem:
    def function(predicted: Tensor, embeddings: Tensor, target: Tensor, slices: Tensor) -> Tensor:
        return sslfast.le_wm(predicted, target, embeddings, slices=slices)

    return Problem(function, (rows(n, 2, d), rows(n, 3, d, seed=1)), (), (rows(n, 2, d, seed=2), _directions(d)))


def _visreg(n: int, d: int) -> Problem:
    return Problem(lambda z, a: sslfast.visreg(z, slices=a), (rows(2, max(n, 2), d),), (), (_directions(d),))


MOMENTS = [
    *(
        of_columns(f"second_moment, {form} {scale}{' cross' * cross}", _second_moment(form, scale, cross))
        for form in ("primal", "dual")
        for scale, cross in (("none", False), ("variance", True))
    ),
    of_columns("barlow_twins", sslfast.barlow_twins),
    of_columns("cross_correlation_loss", lambda a, b: tuple(sslfast.cross_correlation_loss(a, b))),
    of_columns("vicreg", sslfast.vicreg),
    of_columns("vibcreg", sslfast.vibcreg),
    Loss("vicregl", ("vicregl",), _vicregl),
    of_columns("emp_ssl", lambda a, b: sslfast.emp_ssl([a, b]), triton=False),
    of_columns("frossl", lambda a, b: sslfast.frossl([a, b])),
    of_columns("spectral_contrastive", sslfast.spectral_contrastive),
    of_columns("tico", _tico),
    Loss("sigreg", ("sigreg",), _sigreg),
    Loss("SIGReg", ("SIGReg", "LeJEPALoss", "LeWMLoss", "VISRegLoss"), _steps),
    Loss("le_jepa", ("le_jepa",), _le_jepa),
    Loss("le_wm", ("le_wm",), _le_wm),
    Loss("visreg", ("visreg",), _visreg, triton=False),
    Loss("mmcr", ("mmcr",), _views_of_samples, triton=False, waits="eigenvalues come from a library that waits"),
    Loss("WMSELoss", ("WMSELoss", "Whitening2d"), _w_mse, triton=False, waits="it says so where a batch is singular"),
    of_columns("norm_mse_loss", sslfast.norm_mse_loss, triton=False),
    of_columns("invariance_loss", sslfast.invariance_loss, triton=False),
    of_columns("variance_loss", lambda a, b: sslfast.variance_loss(a) + sslfast.variance_loss(b), triton=False),
    of_columns("covariance_loss", lambda a, b: sslfast.covariance_loss(a) + sslfast.covariance_loss(b)),
]

# ------------------------------------------------------------------------------------------------------------- masked


def _patches(n: int, d: int) -> Problem:
    def function(prediction: Tensor, images: Tensor, mask: Tensor) -> Tensor:
        return sslfast.masked_patch_loss(images, prediction, mask, patch_size=4, target="mae")

    images, mask = rows(3, 3, 16, 24, seed=1), rows(3, 24, seed=2) > 0
    return Problem(function, (rows(3, 24, 48),), (), (images, mask))


def _features(n: int, d: int) -> Problem:
    ids = rows(3, 20, seed=2).argsort(1)[:, :5].contiguous()
    return Problem(sslfast.masked_feature_loss, (rows(3, 5, d),), (), (rows(3, 20, d, seed=1), ids))


def _blocks(n: int, d: int) -> Problem:
    def function(prediction: Tensor, layers: Tensor, ids: Tensor) -> Tensor:
        how = {"normalize_layers": "instance", "normalize_targets": "layer"}
        return sslfast.data2vec(prediction, layers, ids, top_k=2, **how)

    ids = rows(3, 20, seed=2).argsort(1)[:, :5].contiguous()
    return Problem(function, (rows(3, 5, d),), (), (rows(3, 3, 20, d, seed=1), ids))


def _tokens(n: int, d: int) -> Problem:
    def function(hidden: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
        return sslfast.masked_token_cross_entropy(hidden, weight, y, bias=bias, capacity=n)

    y = torch.where(rows(2, n, seed=2) > 0.5, labels(2 * n, 50).view(2, n), -100)
    return Problem(function, (rows(2, n, d), 0.1 * rows(50, d, seed=1), rows(50, seed=3)), (), (y,))


MASKED = [
    Loss("masked_patch_loss", ("masked_patch_loss", "MaskedPatchLoss"), _patches, triton=False),
    Loss("masked_feature_loss", ("masked_feature_loss", "MaskedFeatureLoss"), _features, triton=False),
    Loss("data2vec", ("data2vec", "Data2VecLoss"), _blocks, triton=False),
    Loss("masked_token_cross_entropy", ("masked_token_cross_entropy", "MaskedTokenLoss"), _tokens),
    Loss("l2_normalize", ("l2_normalize",), lambda n, d: Problem(sslfast.l2_normalize, (rows(n, d),)), triton=False),
]

# Each form of the gradient at every width: the cost model takes one of them for a width and dtype.
WITH_FORMS = ("nt_xent", "clip", "sig_lip", "moco", "similarity_terms", "prototype_cross_entropy")
FORMS = [
    loss._replace(name=f"{loss.name}, {form}", form=form)
    for loss in (*CONTRASTIVE, *DISTILLATION) if loss.name in WITH_FORMS for form in ("streamed", "banded")
]  # fmt: skip

LOSSES: Sequence[Loss] = [*CONTRASTIVE, *FORMS, *MOMENTS, *DISTILLATION, *MASKED]
# Modules without a state: nothing but their function's arguments, kept.
THIN = (
    *("BarlowTwinsLoss", "ClipLoss", "DCLLoss", "DCLWLoss", "FroSSLLoss", "HypersphereLoss", "InfoNCELoss", "MMCRLoss"),
    *("EMPSSLLoss", "PatchKernelAlignmentLoss"),
    *("KoLeoLoss", "MoCoV3Loss", "MultipleNegativesRankingLoss", "SigLipLoss", "SpectralContrastiveLoss", "SupConLoss"),
    *("DetConBLoss", "DetConSLoss", "DirectCLRLoss", "MACLLoss"),
    *(
        "TiCoLoss",
        "VICRegLLoss",
        "VICRegLoss",
        "VIbCRegLoss",
        "BYOLLoss",
        "GramLoss",
        "NegativeCosineLoss",
        "SimSiamLoss",
    ),
)
