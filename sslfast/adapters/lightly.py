"""lightly's losses (``lightly.loss``) and functions (``lightly.models.utils``) with sslfast's kernels in them.

Names, constructors, ``forward`` and results are lightly's. ``docs/lightly.md`` says what is served, and what is left to
lightly's own code.
"""

from __future__ import annotations

from typing import Any

import lightly.loss.barlow_twins_loss as barlow_twins_loss
import lightly.loss.capi_loss as capi_loss
import lightly.loss.dcl_loss as dcl_loss
import lightly.loss.detcon_loss as detcon_loss
import lightly.loss.dino_loss as dino_loss
import lightly.loss.emp_ssl_loss as emp_ssl_loss
import lightly.loss.frossl_loss as frossl_loss
import lightly.loss.hypersphere_loss as hypersphere_loss
import lightly.loss.ibot_loss as ibot_loss
import lightly.loss.koleo_loss as koleo_loss
import lightly.loss.lejepa_loss as lejepa_loss
import lightly.loss.macl_loss as macl_loss
import lightly.loss.mmcr_loss as mmcr_loss
import lightly.loss.msn_loss as msn_loss
import lightly.loss.negative_cosine_similarity as negative_cosine_similarity
import lightly.loss.ntx_ent_loss as ntx_ent_loss
import lightly.loss.patch_kernel_alignment_loss as patch_kernel_alignment_loss
import lightly.loss.pmsn_loss as pmsn_loss
import lightly.loss.regularizer.co2 as co2
import lightly.loss.swav_loss as swav_loss
import lightly.loss.tico_loss as tico_loss
import lightly.loss.vicreg_loss as vicreg_loss
import lightly.loss.vicregl_loss as vicregl_loss
import lightly.loss.wmse_loss as wmse_loss
import lightly.models.modules.nn_memory_bank as nn_memory_bank
import lightly.models.utils as utils
import torch
from torch import Tensor

from ..losses.distillation.koleo import koleo
from ..masking import compat
from . import (
    _cosine as cosine,
    _lightly_contrastive as contrastive,
    _lightly_dense as dense,
    _lightly_models as models,
    _lightly_moments as moments,
    _lightly_prototypes as prototypes,
    _lightly_slices as slices,
    _lightly_tokens as tokens_,
)
from ._serve import Package, Unserved, served, unserved_distance, unserved_tensors


def _fast_koleo(self: Any, x: Tensor) -> Tensor | Unserved:
    unserved = unserved_tensors(x, dim=2)
    if unserved:
        return unserved
    unserved = unserved_distance(self.pairwise_distance, self.eps)
    if unserved or self.p != 2:
        return unserved or Unserved("a distance that is not Euclidean")
    if len(x) < 2:
        return Unserved("one row, which has no neighbour but itself")
    return contrastive.in_dtype_of(x, koleo(x, eps=self.eps))


class NTXentLoss(ntx_ent_loss.NTXentLoss):
    """``lightly.loss.NTXentLoss``: no 2N × 2N matrix; with a memory bank, no N × K one."""

    forward = served(ntx_ent_loss.NTXentLoss.forward, contrastive.fast_nt_xent)


class DCLLoss(dcl_loss.DCLLoss):
    """``lightly.loss.DCLLoss``, without a ``weight_fn`` or with lightly's own."""

    forward = served(dcl_loss.DCLLoss.forward, contrastive.fast_dcl)


class DCLWLoss(dcl_loss.DCLWLoss, DCLLoss):
    """``lightly.loss.DCLWLoss``."""


class MACLLoss(macl_loss.MACLLoss):
    """``lightly.loss.MACLLoss``: no 2N × 2N matrix."""

    forward = served(macl_loss.MACLLoss.forward, contrastive.fast_macl)


class DetConBLoss(detcon_loss.DetConBLoss):
    """``lightly.loss.DetConBLoss``: no matrix of all regions against all."""

    forward = served(detcon_loss.DetConBLoss.forward, contrastive.fast_det_con_b)


class DetConSLoss(detcon_loss.DetConSLoss):
    """``lightly.loss.DetConSLoss``: half of the similarities, none of which is stored."""

    forward = served(detcon_loss.DetConSLoss.forward, contrastive.fast_det_con_s)


class CO2Regularizer(co2.CO2Regularizer):
    """``lightly.loss.regularizer.CO2Regularizer``, which has no gradient: the value, block by block."""

    forward = served(co2.CO2Regularizer.forward, contrastive.fast_co2)


class HypersphereLoss(hypersphere_loss.HypersphereLoss):
    """``lightly.loss.hypersphere_loss.HypersphereLoss``: no distance of a pair is stored."""

    forward = served(hypersphere_loss.HypersphereLoss.forward, contrastive.fast_hypersphere)


class BarlowTwinsLoss(barlow_twins_loss.BarlowTwinsLoss):
    """``lightly.loss.BarlowTwinsLoss``: no D × D matrix where the batch is smaller than D."""

    forward = served(barlow_twins_loss.BarlowTwinsLoss.forward, moments.fast_barlow_twins)


class VICRegLoss(vicreg_loss.VICRegLoss):
    """``lightly.loss.VICRegLoss``: all terms from one pass; no D × D matrices where the batch is smaller than D."""

    forward = served(vicreg_loss.VICRegLoss.forward, moments.fast_vicreg)


class VICRegLLoss(vicregl_loss.VICRegLLoss):
    """``lightly.loss.VICRegLLoss``."""

    forward = served(vicregl_loss.VICRegLLoss.forward, moments.fast_vicregl)


class TiCoLoss(tico_loss.TiCoLoss):
    """``lightly.loss.TiCoLoss``; ``C`` stays its attribute."""

    forward = served(tico_loss.TiCoLoss.forward, moments.fast_tico)


class MMCRLoss(mmcr_loss.MMCRLoss):
    """``lightly.loss.MMCRLoss``: eigenvalues of small Gram matrices instead of singular value decompositions."""

    forward = served(mmcr_loss.MMCRLoss.forward, moments.fast_mmcr)


class FroSSLLoss(frossl_loss.FroSSLLoss):
    """``lightly.loss.FroSSLLoss``."""

    forward = served(frossl_loss.FroSSLLoss.forward, moments.fast_frossl)


class EMPSSLLoss(emp_ssl_loss.EMPSSLLoss):
    """``lightly.loss.EMPSSLLoss``: the determinant of the smaller Gram matrix, by a Cholesky factor."""

    forward = served(emp_ssl_loss.EMPSSLLoss.forward, moments.fast_emp_ssl)


class PatchKernelAlignmentLoss(patch_kernel_alignment_loss.PatchKernelAlignmentLoss):
    """``lightly.loss.PatchKernelAlignmentLoss``: tokens are centred, not kernels, and the smaller matrices taken."""

    forward = served(patch_kernel_alignment_loss.PatchKernelAlignmentLoss.forward, dense.fast_patch_kernel_alignment)


class Whitening2d(wmse_loss.Whitening2d):
    """``lightly.loss.Whitening2d``: one triangular solve, no inverse and no convolution."""

    forward = served(wmse_loss.Whitening2d.forward, moments.fast_whitening)


class WMSELoss(wmse_loss.WMSELoss):
    """``lightly.loss.WMSELoss``: all sub-batches are whitened at once."""

    forward = served(wmse_loss.WMSELoss.forward, moments.fast_w_mse)


class SIGReg(lejepa_loss.SIGReg):
    """``lightly.loss.lejepa_loss.SIGReg``, also inside ``LeJEPALoss`` and ``LeWMLoss``: one cosine a row and slice."""

    forward = served(lejepa_loss.SIGReg.forward, slices.fast_sigreg)


class NegativeCosineSimilarity(negative_cosine_similarity.NegativeCosineSimilarity):
    """``lightly.loss.NegativeCosineSimilarity``: one read of each row, and no normalised copies."""

    forward = served(negative_cosine_similarity.NegativeCosineSimilarity.forward, cosine.fast_similarity)


class KoLeoLoss(koleo_loss.KoLeoLoss):
    """``lightly.loss.KoLeoLoss``: neighbours from half of the similarities, none of which is stored."""

    forward = served(koleo_loss.KoLeoLoss.forward, _fast_koleo)


class SwaVLoss(swav_loss.SwaVLoss):
    """``lightly.loss.SwaVLoss``: assignments are K numbers a view, and neither they nor a softmax is stored."""

    forward = served(swav_loss.SwaVLoss.forward, prototypes.fast_swav)


class DINOLoss(dino_loss.DINOLoss):
    """``lightly.loss.DINOLoss``: every view is read once each way; ``center`` is updated by lightly's own code."""

    forward = served(dino_loss.DINOLoss.forward, prototypes.fast_dino)


class IBOTPatchLoss(ibot_loss.IBOTPatchLoss):
    """``lightly.loss.IBOTPatchLoss``; ``center`` is lightly's own module."""

    forward = served(ibot_loss.IBOTPatchLoss.forward, tokens_.fast_ibot)


class IBOTPlusPlusPatchLoss(ibot_loss.IBOTPlusPlusPatchLoss, IBOTPatchLoss):
    """``lightly.loss.ibot_loss.IBOTPlusPlusPatchLoss``; ``center`` is lightly's own module."""

    forward = served(ibot_loss.IBOTPlusPlusPatchLoss.forward, tokens_.fast_ibot_plus_plus)


class CAPILoss(capi_loss.CAPILoss):
    """``lightly.loss.CAPILoss``: assignments are K numbers a position, and the predicted tokens are read in place."""

    forward = served(capi_loss.CAPILoss.forward, tokens_.fast_capi)


class NNMemoryBankModule(nn_memory_bank.NNMemoryBankModule):
    """``lightly.models.modules.NNMemoryBankModule``: no N × K matrix of similarities."""

    forward = served(nn_memory_bank.NNMemoryBankModule.forward, models.fast_nearest)


class MSNLoss(msn_loss.MSNLoss):
    """``lightly.loss.MSNLoss``: the anchors' logits are read once each way; the regulariser is lightly's own code."""

    forward = served(msn_loss.MSNLoss.forward, prototypes.fast_msn)


class PMSNLoss(pmsn_loss.PMSNLoss, MSNLoss):
    """``lightly.loss.PMSNLoss``."""


class PMSNCustomLoss(pmsn_loss.PMSNCustomLoss, MSNLoss):
    """``lightly.loss.PMSNCustomLoss``."""


def _mask_at_index(tokens: Any, index: Any, mask_token: Any) -> Tensor | Unserved:
    unserved = unserved_tensors(tokens, dim=3) or unserved_tensors(mask_token, dim=3)
    if unserved:
        return unserved
    if mask_token.shape != (1, 1, tokens.shape[2]) or mask_token.device != tokens.device:
        return Unserved("a mask token that is not (1, 1, D) on the tokens' device")
    if not isinstance(index, Tensor) or index.dim() != 2 or index.dtype != torch.int64:
        return Unserved("an index that is not [B, K] int64")
    return compat.mask_at_index(tokens, index, mask_token)


sinkhorn = served(swav_loss.sinkhorn, prototypes.fast_sinkhorn)
sinkhorn_knopp = served(capi_loss.sinkhorn_knopp, tokens_.fast_sinkhorn_knopp)
covariance_loss = served(vicreg_loss.covariance_loss, moments.fast_covariance_loss)
get_at_index = served(utils.get_at_index, compat.get_at_index)
set_at_index = served(utils.set_at_index, compat.set_at_index)
mask_at_index = served(utils.mask_at_index, _mask_at_index)
update_momentum = served(utils.update_momentum, models.fast_update_momentum)

_NO_KERNEL = "sslfast has no faster form"
_ONE_PASS = "one pass over the inputs already"
_UNCHANGED = {
    _NO_KERNEL: ("DSERegularizer",),
    _ONE_PASS: ("invariance_loss", "norm_mse_loss", "repeat_token", "variance_loss"),
    "VICRegLoss and VICRegLLoss do not call it any more": ("covariance_loss",),
    "a sort, which sslfast would do too": ("VISRegLoss", "random_token_mask"),
}


def contents() -> Package:
    """What :func:`sslfast.patch` replaces in lightly, and what stays lightly's own."""
    return Package(
        classes=(
            NTXentLoss,
            DCLLoss,
            DCLWLoss,
            MACLLoss,
            DetConSLoss,
            DetConBLoss,
            CO2Regularizer,
            HypersphereLoss,
            BarlowTwinsLoss,
            VICRegLoss,
            VICRegLLoss,
            TiCoLoss,
            MMCRLoss,
            FroSSLLoss,
            EMPSSLLoss,
            PatchKernelAlignmentLoss,
            KoLeoLoss,
            Whitening2d,
            WMSELoss,
            SIGReg,
            NegativeCosineSimilarity,
            SwaVLoss,
            DINOLoss,
            IBOTPatchLoss,
            IBOTPlusPlusPatchLoss,
            CAPILoss,
            NNMemoryBankModule,
            MSNLoss,
            PMSNLoss,
            PMSNCustomLoss,
        ),
        functions=(get_at_index, set_at_index, mask_at_index, sinkhorn, sinkhorn_knopp, update_momentum),
        through={"DirectCLRLoss": "NTXentLoss", "LeJEPALoss": "SIGReg", "LeWMLoss": "SIGReg"},
        unchanged={name: reason for reason, names in _UNCHANGED.items() for name in names},
    )
