"""sslfast: the expensive parts of self-supervised learning, made cheap."""

from types import ModuleType as _ModuleType

from . import (
    _native as _native,
    augment as augment,
    distributed as distributed,
    masking as masking,
    nn as nn,
    pretext as pretext,
)
from ._backends import use_backend as use_backend, use_gradient_form as use_gradient_form
from ._version import __version__ as __version__
from .adapters import Patch as Patch, patch as patch, unpatch as unpatch
from .clustering.k_means import Clusters as Clusters, k_means as k_means
from .clustering.self_labelling import self_labelling as self_labelling
from .grad_cache import grad_cache_step as grad_cache_step
from .losses.contrastive.clip import ClipLoss as ClipLoss, clip as clip
from .losses.contrastive.co2 import CO2Regularizer as CO2Regularizer, co2 as co2
from .losses.contrastive.dcl import DCLLoss as DCLLoss, DCLWLoss as DCLWLoss, dcl as dcl, dclw as dclw
from .losses.contrastive.det_con import (
    DetConBLoss as DetConBLoss,
    DetConSLoss as DetConSLoss,
    det_con_b as det_con_b,
    det_con_s as det_con_s,
)
from .losses.contrastive.diagnostics import (
    Diagnostics as Diagnostics,
    contrastive_diagnostics as contrastive_diagnostics,
)
from .losses.contrastive.direct_clr import DirectCLRLoss as DirectCLRLoss, direct_clr as direct_clr
from .losses.contrastive.hypersphere import (
    HypersphereLoss as HypersphereLoss,
    alignment as alignment,
    hypersphere as hypersphere,
    uniformity as uniformity,
)
from .losses.contrastive.info_nce import (
    InfoNCELoss as InfoNCELoss,
    debiased_info_nce as debiased_info_nce,
    info_nce as info_nce,
    smoothed_info_nce as smoothed_info_nce,
    symmetric_info_nce as symmetric_info_nce,
)
from .losses.contrastive.labelled_nt_xent import labelled_nt_xent as labelled_nt_xent
from .losses.contrastive.macl import MACLLoss as MACLLoss, macl as macl
from .losses.contrastive.moco import MoCoLoss as MoCoLoss, MoCoV3Loss as MoCoV3Loss, moco as moco, moco_v3 as moco_v3
from .losses.contrastive.nt_xent import NTXentLoss as NTXentLoss, nt_xent as nt_xent
from .losses.contrastive.pair_nt_xent import pair_nt_xent as pair_nt_xent
from .losses.contrastive.ranking import (
    MultipleNegativesRankingLoss as MultipleNegativesRankingLoss,
    multiple_negatives_ranking as multiple_negatives_ranking,
)
from .losses.contrastive.sig_lip import SigLipLoss as SigLipLoss, sig_lip as sig_lip
from .losses.contrastive.sup_con import SupConLoss as SupConLoss, sup_con as sup_con
from .losses.contrastive.sup_con_keys import sup_con_keys as sup_con_keys
from .losses.decorrelation.barlow_twins import (
    BarlowTwinsLoss as BarlowTwinsLoss,
    CrossCorrelation as CrossCorrelation,
    barlow_twins as barlow_twins,
    cross_correlation_loss as cross_correlation_loss,
)
from .losses.decorrelation.emp_ssl import EMPSSLLoss as EMPSSLLoss, emp_ssl as emp_ssl
from .losses.decorrelation.frossl import FroSSLLoss as FroSSLLoss, frossl as frossl
from .losses.decorrelation.le_jepa import (
    LeJEPALoss as LeJEPALoss,
    LeWMLoss as LeWMLoss,
    le_jepa as le_jepa,
    le_wm as le_wm,
)
from .losses.decorrelation.mmcr import MMCRLoss as MMCRLoss, mmcr as mmcr
from .losses.decorrelation.sigreg import SIGReg as SIGReg, sigreg as sigreg
from .losses.decorrelation.spectral_contrastive import (
    SpectralContrastiveLoss as SpectralContrastiveLoss,
    spectral_contrastive as spectral_contrastive,
)
from .losses.decorrelation.tico import TiCoLoss as TiCoLoss, tico as tico
from .losses.decorrelation.vibcreg import VIbCRegLoss as VIbCRegLoss, vibcreg as vibcreg
from .losses.decorrelation.vicreg import (
    VICRegLoss as VICRegLoss,
    covariance_loss as covariance_loss,
    invariance_loss as invariance_loss,
    variance_loss as variance_loss,
    vicreg as vicreg,
)
from .losses.decorrelation.vicregl import VICRegLLoss as VICRegLLoss, vicregl as vicregl
from .losses.decorrelation.visreg import (
    VISRegComponents as VISRegComponents,
    VISRegLoss as VISRegLoss,
    visreg as visreg,
)
from .losses.decorrelation.w_mse import Whitening2d as Whitening2d, WMSELoss as WMSELoss, norm_mse_loss as norm_mse_loss
from .losses.distillation.capi import CAPILoss as CAPILoss, capi as capi
from .losses.distillation.cross_entropy import (
    assignment_cross_entropy as assignment_cross_entropy,
    distillation_cross_entropy as distillation_cross_entropy,
)
from .losses.distillation.deep_cluster_v2 import (
    DeepClusterV2Loss as DeepClusterV2Loss,
    deep_cluster_v2 as deep_cluster_v2,
)
from .losses.distillation.diagnostics import PrototypeDiagnostics as PrototypeDiagnostics
from .losses.distillation.dino import DINOLoss as DINOLoss
from .losses.distillation.gram_anchor import GramLoss as GramLoss, gram_anchor as gram_anchor
from .losses.distillation.ibot import (
    IBOTPatchLoss as IBOTPatchLoss,
    IBOTPlusPlusPatchLoss as IBOTPlusPlusPatchLoss,
)
from .losses.distillation.koleo import KoLeoLoss as KoLeoLoss, koleo as koleo
from .losses.distillation.mean_assignment import mean_assignment as mean_assignment
from .losses.distillation.msn import MSNLoss as MSNLoss, PMSNLoss as PMSNLoss, msn as msn, pmsn as pmsn
from .losses.distillation.negative_cosine import (
    BYOLLoss as BYOLLoss,
    CosineDiagnostics as CosineDiagnostics,
    NegativeCosineLoss as NegativeCosineLoss,
    SimSiamLoss as SimSiamLoss,
    byol as byol,
    negative_cosine as negative_cosine,
    sim_siam as sim_siam,
)
from .losses.distillation.patch_kernel_alignment import (
    PatchKernelAlignmentLoss as PatchKernelAlignmentLoss,
    patch_kernel_alignment as patch_kernel_alignment,
)
from .losses.distillation.prototype_loss import PrototypeLoss as PrototypeLoss
from .losses.distillation.prototype_usage import (
    PrototypeUsage as PrototypeUsage,
    duplicate_prototypes as duplicate_prototypes,
    prototype_usage as prototype_usage,
)
from .losses.distillation.re_ssl import ReSSLLoss as ReSSLLoss, re_ssl as re_ssl
from .losses.distillation.sinkhorn import sinkhorn as sinkhorn, sinkhorn_bias as sinkhorn_bias
from .losses.distillation.swav import SwAVLoss as SwAVLoss, swav as swav
from .losses.distillation.teacher_bias import (
    center_update_ as center_update_,
    prototype_sinkhorn as prototype_sinkhorn,
)
from .losses.masked.data2vec import (
    Data2VecDiagnostics as Data2VecDiagnostics,
    Data2VecLoss as Data2VecLoss,
    data2vec as data2vec,
)
from .losses.masked.masked_feature import MaskedFeatureLoss as MaskedFeatureLoss
from .losses.masked.masked_patch import MaskedPatchLoss as MaskedPatchLoss
from .losses.masked.masked_token import (
    MaskedTokenLoss as MaskedTokenLoss,
    masked_token_cross_entropy as masked_token_cross_entropy,
)
from .losses.memory_queue import MemoryQueue as MemoryQueue
from .nn.dino_head import DINOHead as DINOHead
from .nn.swav_prototypes import SwAVPrototypes as SwAVPrototypes
from .ops.l2_normalize import l2_normalize as l2_normalize
from .ops.masked_feature_loss import masked_feature_loss as masked_feature_loss
from .ops.masked_patch_loss import masked_patch_loss as masked_patch_loss
from .ops.nearest_neighbours import Neighbours as Neighbours, nearest_neighbours as nearest_neighbours
from .ops.prototype_cross_entropy import prototype_cross_entropy as prototype_cross_entropy
from .ops.second_moment import second_moment as second_moment
from .ops.similarity_logsigmoid import similarity_logsigmoid as similarity_logsigmoid
from .ops.similarity_lse import similarity_lse as similarity_lse, similarity_terms as similarity_terms
from .ops.types import (
    NormalizedPrototypes as NormalizedPrototypes,
    SecondMoment as SecondMoment,
    SimilarityTerms as SimilarityTerms,
)

# What stands above, without the modules.
__all__ = sorted(
    name for name, value in globals().items() if not name.startswith("_") and not isinstance(value, _ModuleType)
)
