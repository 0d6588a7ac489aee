"""sslfast: the expensive parts of self-supervised learning, made cheap."""

from . import _native as _native
from . import augment as augment
from . import masking as masking
from ._backends import use_backend, use_gradient_form
from .adapters import Patch, patch, unpatch
from .losses import (
    BarlowTwinsLoss,
    ClipLoss,
    DCLLoss,
    DCLWLoss,
    Diagnostics,
    FroSSLLoss,
    HypersphereLoss,
    InfoNCELoss,
    MaskedFeatureLoss,
    MaskedPatchLoss,
    MaskedTokenLoss,
    MemoryQueue,
    MMCRLoss,
    MoCoLoss,
    MoCoV3Loss,
    MultipleNegativesRankingLoss,
    NTXentLoss,
    SigLipLoss,
    SpectralContrastiveLoss,
    SupConLoss,
    TiCoLoss,
    VIbCRegLoss,
    VICRegLLoss,
    VICRegLoss,
    Whitening2d,
    WMSELoss,
)
from .losses.barlow_twins import CrossCorrelation, barlow_twins, cross_correlation_loss
from .losses.clip import clip
from .losses.dcl import dcl, dclw
from .losses.frossl import frossl
from .losses.hypersphere import alignment, hypersphere, uniformity
from .losses.info_nce import info_nce
from .losses.masked_token import masked_token_cross_entropy
from .losses.mmcr import mmcr
from .losses.moco import moco, moco_v3
from .losses.nt_xent import nt_xent
from .losses.pair_nt_xent import pair_nt_xent
from .losses.ranking import multiple_negatives_ranking
from .losses.sig_lip import sig_lip
from .losses.spectral_contrastive import spectral_contrastive
from .losses.sup_con import sup_con
from .losses.sup_con_keys import sup_con_keys
from .losses.tico import tico
from .losses.vibcreg import vibcreg
from .losses.vicreg import covariance_loss, invariance_loss, variance_loss, vicreg
from .losses.vicregl import vicregl
from .losses.w_mse import norm_mse_loss
from .ops import (
    l2_normalize,
    masked_feature_loss,
    masked_patch_loss,
    second_moment,
    similarity_logsigmoid,
    similarity_lse,
)
from .ops.similarity_lse import SimilarityTerms, similarity_terms
from .reference.second_moment import SecondMoment

__version__ = "0.1.0"
__all__ = [
    "BarlowTwinsLoss",
    "ClipLoss",
    "CrossCorrelation",
    "DCLLoss",
    "DCLWLoss",
    "Diagnostics",
    "FroSSLLoss",
    "HypersphereLoss",
    "InfoNCELoss",
    "MMCRLoss",
    "MaskedFeatureLoss",
    "MaskedPatchLoss",
    "MaskedTokenLoss",
    "MemoryQueue",
    "MoCoLoss",
    "MoCoV3Loss",
    "MultipleNegativesRankingLoss",
    "NTXentLoss",
    "Patch",
    "SecondMoment",
    "SigLipLoss",
    "SimilarityTerms",
    "SpectralContrastiveLoss",
    "SupConLoss",
    "TiCoLoss",
    "VICRegLLoss",
    "VICRegLoss",
    "VIbCRegLoss",
    "WMSELoss",
    "Whitening2d",
    "alignment",
    "barlow_twins",
    "clip",
    "covariance_loss",
    "cross_correlation_loss",
    "dcl",
    "dclw",
    "frossl",
    "hypersphere",
    "info_nce",
    "invariance_loss",
    "l2_normalize",
    "masked_feature_loss",
    "masked_patch_loss",
    "masked_token_cross_entropy",
    "mmcr",
    "moco",
    "moco_v3",
    "multiple_negatives_ranking",
    "norm_mse_loss",
    "nt_xent",
    "pair_nt_xent",
    "patch",
    "second_moment",
    "sig_lip",
    "similarity_logsigmoid",
    "similarity_lse",
    "similarity_terms",
    "spectral_contrastive",
    "sup_con",
    "sup_con_keys",
    "tico",
    "uniformity",
    "unpatch",
    "use_backend",
    "use_gradient_form",
    "variance_loss",
    "vibcreg",
    "vicreg",
    "vicregl",
]
