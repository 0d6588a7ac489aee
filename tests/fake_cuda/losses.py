"""Calls of the losses, and of the operators under them: ``{name: function of an Inputs}``.

A name is that of a public object, and behind a ``/`` what is particular about the call. Modules, too, are made inside
the call, under the inputs' device as PyTorch's default.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import sslfast
from sslfast import masking, nn as nn_
from sslfast._checks import accumulator
from sslfast.ops.characteristic_sums import characteristic_sums
from sslfast.ops.koleo import koleo
from sslfast.ops.neighbour_distance import neighbour_distance, sums_by_index
from sslfast.ops.nt_xent import nt_xent
from sslfast.ops.unit_slices import unit_slices

from .calls import of_function, of_mixed, of_module
from .inputs import PATCH, B, Case, D, Inputs, L, N


def region_masks(x: Inputs) -> tuple[Tensor, Tensor]:
    """Of three regions of each image, in two views."""
    return x.labels(3 * N).view(N, 3), x.labels(3 * N).view(N, 3) // 2


def vicregl_views(x: Inputs, n: int = N, d: int = D) -> tuple[list[Any], list[Tensor]]:
    features = [(x.z(n, d), x.z(n, 3, 3, 8)) for _ in range(2)]
    return features, [x.fixed(n, 3, 3, 2) for _ in range(2)]


def _moments(x: Inputs, **options: Any) -> Any:
    return sslfast.second_moment(x.z(), x.z() if options.get("cross") else None, **options)


CONTRASTIVE: dict[str, Case] = {
    "nt_xent": of_function(sslfast.nt_xent),
    "nt_xent/a learnt temperature": lambda x: sslfast.nt_xent(x.z(), x.z(), x.number(0.5), normalize=False),
    "contrastive_diagnostics": lambda x: sslfast.contrastive_diagnostics(
        x.z(), x.z(30, D), row_ids=x.labels(), col_ids=x.labels(30), positives=x.ids(N)
    ),
    "NTXentLoss/diagnostics": of_module(sslfast.NTXentLoss, diagnostics=True),
    "NTXentLoss": of_module(sslfast.NTXentLoss, 0.3),
    "NTXentLoss/with a bank": of_module(sslfast.NTXentLoss, memory_bank_size=(40, D)),
    "NTXentLoss/a learnt temperature": lambda x: x.made(lambda: sslfast.NTXentLoss(nn.Parameter(torch.tensor(0.3))))(
        x.z(), x.z()
    ),
    "info_nce": of_function(sslfast.info_nce),
    "info_nce/fixed keys": lambda x: sslfast.info_nce(x.z(), x.fixed()),
    "info_nce/symmetric": of_module(sslfast.InfoNCELoss, symmetric=True, diagnostics=True),
    "smoothed_info_nce": of_function(sslfast.smoothed_info_nce),
    "debiased_info_nce": of_function(sslfast.debiased_info_nce),
    "symmetric_info_nce": of_function(sslfast.symmetric_info_nce, label_smoothing=0.1, tau_plus=0.1),
    "InfoNCELoss/smoothed and debiased": of_module(sslfast.InfoNCELoss, label_smoothing=0.1, tau_plus=0.1),
    "info_nce/negatives": lambda x: sslfast.info_nce(x.z(), x.z(), x.number(0.1), negatives=(x.z(9, D), x.z(N, 3, D))),
    "info_nce/several positives": lambda x: sslfast.info_nce(x.z(), x.z(), positives=x.ids(N, 2)),
    "info_nce/ids": lambda x: sslfast.info_nce(x.z(), x.z(), positives=x.ids(N), ids=(x.labels(), x.labels() + 1)),
    "InfoNCELoss": of_module(sslfast.InfoNCELoss, label_smoothing=0.1),
    "moco": lambda x: sslfast.moco(x.z(), x.fixed(), x.fixed(40, D)),
    "moco/a queue": lambda x: sslfast.moco(x.z(), x.fixed(), x.fixed(40, D), x.number(0.1)),
    "MoCoLoss/diagnostics": of_module(sslfast.MoCoLoss, 40, D, diagnostics=True),
    "MoCoLoss": of_module(sslfast.MoCoLoss, 40, D),
    "moco_v3": of_function(sslfast.moco_v3),
    "MoCoV3Loss": of_module(sslfast.MoCoV3Loss),
    "MemoryQueue": lambda x: _enqueued(x.made(lambda: sslfast.MemoryQueue(40, D)), x),
    "dcl": of_function(sslfast.dcl),
    "dcl/weights": of_function(sslfast.dcl, weight_fn=lambda a, b: (a * b).sum(1)),
    "dclw": of_function(sslfast.dclw),
    "DCLLoss": of_module(sslfast.DCLLoss),
    "DCLWLoss": of_module(sslfast.DCLWLoss),
    "direct_clr": of_function(sslfast.direct_clr, loss_dim=5),
    "DirectCLRLoss": of_module(sslfast.DirectCLRLoss, 5, memory_bank_size=(40, 5)),
    "macl": lambda x: sslfast.macl(x.z(), x.z(), x.number(0.5)),
    "MACLLoss": of_module(sslfast.MACLLoss, diagnostics=True),
    "det_con_s": lambda x: sslfast.det_con_s(x.z(N, 3, D), x.z(N, 3, D), *region_masks(x), x.number(0.5)),
    "det_con_b": lambda x: sslfast.det_con_b(*(x.z(N, 3, D) for _ in range(4)), *region_masks(x)),
    "det_con_b/fixed targets": lambda x: sslfast.det_con_b(
        *(x.z(N, 3, D) for _ in range(2)), *(x.fixed(N, 3, D) for _ in range(2)), *region_masks(x)
    ),
    "DetConSLoss": lambda x: sslfast.DetConSLoss()(x.z(N, 3, D), x.z(N, 3, D), *region_masks(x)),
    "DetConBLoss": lambda x: sslfast.DetConBLoss()(*(x.z(N, 3, D) for _ in range(4)), *region_masks(x)),
    "co2": lambda x: sslfast.co2(x.z(), x.z(), None, x.number(0.5)),
    "co2/a queue": lambda x: sslfast.co2(x.z(), x.z(), x.fixed(40, D)),
    "CO2Regularizer": of_module(sslfast.CO2Regularizer, 2.0, 0.5),
    "CO2Regularizer/with a bank": of_module(sslfast.CO2Regularizer, memory_bank_size=(40, D)),
    "clip": lambda x: sslfast.clip(x.z(), x.z(), x.number(10.0), x.number(-1.0)),
    "clip/a frozen tower": lambda x: sslfast.ClipLoss(diagnostics=True)(x.fixed(), x.z(), 10.0),
    "ClipLoss": lambda x: sslfast.ClipLoss()(x.z(), x.z(), x.number(10.0), output_dict=True),
    "sig_lip": lambda x: sslfast.sig_lip(x.z(), x.z(), x.number(10.0), x.number(-10.0)),
    "SigLipLoss": lambda x: sslfast.SigLipLoss()(x.z(), x.z(), 10.0, x.number(-10.0)),
    "sup_con": lambda x: sslfast.sup_con(x.z(N, 2, D), x.labels()),
    "sup_con/a mask": lambda x: sslfast.sup_con(x.z(N, 2, D), mask=(x.labels()[:, None] == x.labels()).float()),
    "sup_con/no labels": lambda x: sslfast.SupConLoss(normalize=True, diagnostics=True)(x.z(N, 2, D)),
    "sup_con/one view": lambda x: sslfast.sup_con(
        x.z(N, 2, D), x.labels(), contrast_mode="one", reduction="mean_nonzero"
    ),
    "SupConLoss": lambda x: sslfast.SupConLoss()(x.z(N, 2, D), x.labels()),
    "sup_con_keys": lambda x: sslfast.sup_con_keys(x.z(), x.labels()),
    "sup_con_keys/keys": lambda x: sslfast.sup_con_keys(
        x.z(), x.labels(), x.fixed(40, D), x.labels(40), own=x.ids(N), temperature=x.number(0.1)
    ),
    "labelled_nt_xent": lambda x: sslfast.labelled_nt_xent(x.z(), x.labels()),
    "pair_nt_xent": lambda x: sslfast.pair_nt_xent(x.z(), x.labels()),
    "multiple_negatives_ranking": of_function(sslfast.multiple_negatives_ranking),
    "multiple_negatives_ranking/all directions": lambda x: sslfast.multiple_negatives_ranking(
        x.z(), x.z(), x.z(N, 2, D), directions=("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")
    ),
    "multiple_negatives_ranking/apart": of_function(
        sslfast.multiple_negatives_ranking, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    ),
    "MultipleNegativesRankingLoss": lambda x: sslfast.MultipleNegativesRankingLoss(x.number(20.0))(
        x.z(), x.z(), x.z(N, 2, D)
    ),
    "hypersphere": of_function(sslfast.hypersphere),
    "HypersphereLoss": of_module(sslfast.HypersphereLoss),
    "alignment": of_function(sslfast.alignment, normalize=True),
    "uniformity": lambda x: sslfast.uniformity(x.z(), normalize=True),
    "uniformity/as they are": lambda x: sslfast.uniformity(x.z()),
    "similarity_lse": lambda x: sslfast.similarity_lse(x.z(), x.z(30, D), 5.0),
    "similarity_lse/fixed keys": lambda x: sslfast.similarity_lse(
        x.z(), x.fixed(30, D), x.number(5.0), bias=x.fixed(30), row_ids=x.labels(), col_ids=x.labels(30)
    ),
    "similarity_lse/columns": lambda x: sslfast.similarity_lse(
        x.z(), x.z(30, D), x.number(5.0), bias=x.z(30), columns=True
    ),
    "similarity_terms": lambda x: sslfast.similarity_terms(
        x.z(), x.z(30, D), 5.0, columns=True, positives=x.ids(N), hardest=True
    ),
    "similarity_terms/itself": lambda x: _terms_of_itself(x.z(), x.ids(N)),
    "similarity_logsigmoid": lambda x: sslfast.similarity_logsigmoid(
        x.z(), x.z(30, D), x.number(5.0), x.number(-5.0), row_ids=x.labels(), col_ids=x.labels(30)
    ),
    "l2_normalize": lambda x: sslfast.l2_normalize(x.z()),
    "nearest_neighbours": lambda x: sslfast.nearest_neighbours(x.z(), x.z(30, D), 3, normalize=True),
    "nearest_neighbours/by distance": lambda x: sslfast.nearest_neighbours(x.z(), x.z(30, D), 3, metric="euclidean"),
    "nearest_neighbours/itself": lambda x: sslfast.nearest_neighbours(x.z(), row_ids=x.labels()),
    "ops.nt_xent.nt_xent": of_function(nt_xent),
    "ops.neighbour_distance.neighbour_distance": lambda x: neighbour_distance(x.z(), x.z(30, D), x.ids(N, 3)),
    "ops.neighbour_distance.sums_by_index": lambda x: sums_by_index(x.fixed(), x.labels(), x.fixed(7, D)),
    "ops.koleo.koleo": lambda x: koleo(x.z(), 2, 1e-8),
    "nt_xent/in an autocast region": of_mixed(sslfast.nt_xent),
    "info_nce/in an autocast region": of_mixed(sslfast.info_nce),
    "clip/in an autocast region": of_mixed(sslfast.clip, 10.0),
}

DECORRELATION: dict[str, Case] = {
    "barlow_twins": of_function(sslfast.barlow_twins),
    "barlow_twins/in an autocast region": of_mixed(sslfast.barlow_twins),
    "barlow_twins/primal": of_function(sslfast.barlow_twins, form="primal"),
    "BarlowTwinsLoss": of_module(sslfast.BarlowTwinsLoss),
    "cross_correlation_loss": of_function(sslfast.cross_correlation_loss, form="dual"),
    "vicreg": of_function(sslfast.vicreg),
    "vicreg/wide": lambda x: sslfast.vicreg(x.z(N, 128), x.z(N, 128), variance_reduction="sum"),
    "VICRegLoss": of_module(sslfast.VICRegLoss),
    "vicregl/a local view": lambda x: sslfast.vicregl(*vicregl_views(x), *(part[:1] for part in vicregl_views(x))),
    "VICRegLLoss": lambda x: sslfast.VICRegLLoss()(*vicregl_views(x)),
    "vibcreg": of_function(sslfast.vibcreg),
    "VIbCRegLoss": of_module(sslfast.VIbCRegLoss),
    "covariance_loss": lambda x: sslfast.covariance_loss(x.z()),
    "variance_loss": lambda x: sslfast.variance_loss(x.z()),
    "invariance_loss": of_function(sslfast.invariance_loss),
    "emp_ssl": lambda x: sslfast.emp_ssl([x.z(), x.z(), x.z()]),
    "emp_ssl/wide": lambda x: sslfast.emp_ssl([x.z(N, 128), x.z(N, 128)], convention="paper"),
    "EMPSSLLoss": lambda x: sslfast.EMPSSLLoss()([x.z(), x.z()]),
    "frossl": lambda x: sslfast.frossl([x.z(), x.z(), x.z()]),
    "frossl/wide": lambda x: sslfast.frossl([x.z(N, 128), x.z(N, 128)]),
    "FroSSLLoss": lambda x: sslfast.FroSSLLoss()([x.z(), x.z()]),
    "spectral_contrastive": of_function(sslfast.spectral_contrastive),
    "SpectralContrastiveLoss": of_module(sslfast.SpectralContrastiveLoss, mu=None),
    "tico": of_function(sslfast.tico),
    "tico/covariance": lambda x: sslfast.tico(x.z(), x.z(), x.fixed(D, D)),
    "TiCoLoss": lambda x: _twice(x.made(sslfast.TiCoLoss), x),
    "ops.characteristic_sums.characteristic_sums": lambda x: _characteristic_sums(x.z(2, N, D), x.fixed(D, 9)),
    "ops.unit_slices.unit_slices": lambda x: unit_slices(x.ids(1)[0], 3, D, 9),
    "sigreg": lambda x: sslfast.sigreg(x.z(2, N, D), num_vectors=9),
    "sigreg/slices": lambda x: sslfast.sigreg(x.z(), slices=x.fixed(D, 9), knots=10, convention="eb_jepa"),
    "SIGReg": lambda x: x.made(lambda: sslfast.SIGReg(num_vectors=9))(x.z(2, 2, N, D)),
    "le_jepa": lambda x: sslfast.le_jepa(x.z(2, N, D), x.z(3, N, D), num_vectors=9),
    "LeJEPALoss": lambda x: x.made(lambda: sslfast.LeJEPALoss(sigreg_num_vectors=9))(
        global_proj=x.z(2, N, D), local_proj=x.z(3, N, D)
    ),
    "le_wm": lambda x: sslfast.le_wm(x.z(N, 2, D), x.fixed(N, 2, D), x.z(N, 3, D), num_vectors=9),
    "LeWMLoss": lambda x: x.made(lambda: sslfast.LeWMLoss(sigreg_num_vectors=9, normalize=True))(
        predicted=x.z(N, 2, D), target=x.fixed(N, 2, D), embeddings=x.z(N, 3, D)
    ),
    "visreg": lambda x: sslfast.visreg(x.z(2, N, D), x.z(3, N, D), num_slices=9),
    "VISRegLoss": lambda x: x.made(lambda: sslfast.VISRegLoss(num_slices=9))(global_proj=x.z(2, N, D)),
    "mmcr": lambda x: sslfast.mmcr(x.z(N, 3, D), x.z(N, 3, D)),
    "mmcr/few": lambda x: sslfast.mmcr(x.z(4, 20, D), x.z(4, 20, D)),
    "MMCRLoss": lambda x: sslfast.MMCRLoss()(x.z(N, 3, D), x.z(N, 3, D)),
    "norm_mse_loss": of_function(sslfast.norm_mse_loss),
    "Whitening2d": lambda x: x.made(lambda: sslfast.Whitening2d(D))(x.z()),
    "Whitening2d/evaluated": lambda x: x.made(lambda: sslfast.Whitening2d(D, eps=0.1)).eval()(x.z()),
    "WMSELoss": lambda x: x.made(lambda: sslfast.WMSELoss(4, w_size=12))(x.z(2 * N, 4)),
    "second_moment": lambda x: _moments(x, form="dual"),
    "second_moment/cross": lambda x: _moments(x, cross=True, scale="variance", form="primal"),
    "second_moment/wide": lambda x: sslfast.second_moment(x.z(N, 256), center=False),
}


def _enqueued(queue: Any, x: Inputs) -> list[Tensor]:
    queue.enqueue(x.z())
    queue.enqueue(x.z(50, D))
    return [queue.queue, queue.pointer, queue.nearest(x.z())]


def _characteristic_sums(z: Tensor, slices: Tensor) -> Tensor:
    return characteristic_sums(z, slices.to(accumulator(z)), 5, 0.5)


def _twice(module: Any, x: Inputs) -> list[Tensor]:
    return [module(x.z(), x.z()), module(x.z(), x.z()), module.C]


def _terms_of_itself(z: Tensor, ids: Tensor) -> Any:
    return sslfast.similarity_terms(z, None, 5.0, row_ids=ids, positives=ids.roll(1), hardest=True)


def _masks(x: Inputs) -> masking.Masks:
    return masking.random_masks(x.ids(B), L)


def _token_losses(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.where(x.ids(B, L) % 4 == 0, x.ids(B, L), -100)
    return x.z(B, L, D), x.z(50, D), labels


def _averaged(x: Inputs, momentum: Any, *, copied: bool = False) -> list[Tensor]:
    teacher, student = [x.fixed(3, 4), x.fixed(5)], [x.fixed(3, 4), x.fixed(5)]
    rounded = [torch.zeros_like(t, dtype=torch.float16) for t in teacher] if copied else None
    nn_.ema_update_(teacher, student, momentum, rounded=rounded)
    return [*teacher, *(rounded or [])]


AVERAGES: dict[str, Case] = {
    "nn.ema_update_": lambda x: _averaged(x, 0.9),
    "nn.ema_update_/a momentum that is a tensor": lambda x: _averaged(x, x.number(0.9).detach()),
    "nn.ema_update_/a rounded copy": lambda x: _averaged(x, 0.9, copied=True),
    "ops.ema_update.ema_update": lambda x: _averaged(x, 0.9),
}

MASKED: dict[str, Case] = {
    "masked_patch_loss": lambda x: sslfast.masked_patch_loss(
        x.images(), x.z(B, L, 48), _masks(x), patch_size=PATCH, target="mae"
    ),
    "masked_patch_loss/a mask": lambda x: sslfast.masked_patch_loss(
        x.pixels(), x.z(B, L, 48), x.mask(), patch_size=PATCH, mean=[0.5] * 3, std=[0.2] * 3
    ),
    "masked_patch_loss/ids": lambda x: sslfast.masked_patch_loss(
        x.pixels(), x.z(B, 5, 48), x.ids(B, 5), patch_size=PATCH
    ),
    "masked_patch_loss/numbers": lambda x: sslfast.masked_patch_loss(
        x.pixels(), x.z(B, L, 48), x.mask().float(), patch_size=PATCH
    ),
    "MaskedPatchLoss": lambda x: sslfast.MaskedPatchLoss(PATCH)(x.images(), x.z(B, L, 48), _masks(x)),
    "masking.compat.forward_loss": lambda x: masking.compat.forward_loss(
        x.pixels(), x.z(B, L, 48), x.mask().float(), patch_size=PATCH, norm_pix_loss=True
    ),
    "masked_feature_loss": lambda x: sslfast.masked_feature_loss(x.z(3, B, 5, D), x.fixed(B, L, D), x.ids(3, B, 5)),
    "masked_feature_loss/mse": lambda x: sslfast.masked_feature_loss(
        x.z(B, 5, D), x.fixed(B, L, D), x.ids(B, 5), loss="mse", layer_norm=False
    ),
    "MaskedFeatureLoss": lambda x: sslfast.MaskedFeatureLoss()(x.z(B, 5, D), x.fixed(B, L, D), x.ids(B, 5)),
    "data2vec": lambda x: sslfast.data2vec(x.z(3, B, 5, D), x.fixed(4, B, L, D), x.ids(3, B, 5), top_k=3),
    "data2vec/normalised": lambda x: sslfast.data2vec(
        x.z(B, 5, D), [x.fixed(B, L, D)], x.ids(B, 5), top_k=1, normalize_layers="instance", normalize_targets="layer"
    ),
    "Data2VecLoss": lambda x: sslfast.Data2VecLoss(2, normalize_targets="batch", diagnostics=True)(
        x.z(B, 5, D), x.fixed(2, B, L, D), x.ids(B, 5)
    ),
    "masked_token_cross_entropy": lambda x: sslfast.masked_token_cross_entropy(*_token_losses(x), bias=x.z(50)),
    "masked_token_cross_entropy/capacity": lambda x: sslfast.masked_token_cross_entropy(*_token_losses(x), capacity=12),
    "MaskedTokenLoss": lambda x: sslfast.MaskedTokenLoss()(*_token_losses(x)),
}
