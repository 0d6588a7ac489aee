"""sslfast: the expensive parts of self-supervised learning, made cheap."""

from . import _native as _native
from ._backends import use_backend
from .losses import (
    ClipLoss,
    DCLLoss,
    DCLWLoss,
    Diagnostics,
    HypersphereLoss,
    InfoNCELoss,
    MemoryQueue,
    MoCoLoss,
    MoCoV3Loss,
    MultipleNegativesRankingLoss,
    NTXentLoss,
    SigLipLoss,
    SupConLoss,
)
from .losses.clip import clip
from .losses.dcl import dcl, dclw
from .losses.hypersphere import alignment, hypersphere, uniformity
from .losses.info_nce import info_nce
from .losses.moco import moco, moco_v3
from .losses.nt_xent import nt_xent
from .losses.ranking import multiple_negatives_ranking
from .losses.sig_lip import sig_lip
from .losses.sup_con import sup_con
from .ops import l2_normalize, second_moment, similarity_logsigmoid, similarity_lse
from .ops.similarity_lse import SimilarityTerms, similarity_terms
from .reference.second_moment import SecondMoment

__version__ = "0.1.0"
__all__ = [
    "ClipLoss",
    "DCLLoss",
    "DCLWLoss",
    "Diagnostics",
    "HypersphereLoss",
    "InfoNCELoss",
    "MemoryQueue",
    "MoCoLoss",
    "MoCoV3Loss",
    "MultipleNegativesRankingLoss",
    "NTXentLoss",
    "SecondMoment",
    "SigLipLoss",
    "SimilarityTerms",
    "SupConLoss",
    "alignment",
    "clip",
    "dcl",
    "dclw",
    "hypersphere",
    "info_nce",
    "l2_normalize",
    "moco",
    "moco_v3",
    "multiple_negatives_ranking",
    "nt_xent",
    "second_moment",
    "sig_lip",
    "similarity_logsigmoid",
    "similarity_lse",
    "similarity_terms",
    "sup_con",
    "uniformity",
    "use_backend",
]
