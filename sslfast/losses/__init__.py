"""The losses, one file each: a function over :mod:`sslfast.ops` and :mod:`sslfast.distributed`, and its module form.

The modules are here, the functions of the same files in :mod:`sslfast`.
"""

from .barlow_twins import BarlowTwinsLoss
from .clip import ClipLoss
from .dcl import DCLLoss, DCLWLoss
from .diagnostics import Diagnostics
from .frossl import FroSSLLoss
from .hypersphere import HypersphereLoss
from .info_nce import InfoNCELoss
from .masked_feature import MaskedFeatureLoss
from .masked_patch import MaskedPatchLoss
from .masked_token import MaskedTokenLoss
from .memory_queue import MemoryQueue
from .mmcr import MMCRLoss
from .moco import MoCoLoss, MoCoV3Loss
from .nt_xent import NTXentLoss
from .ranking import MultipleNegativesRankingLoss
from .sig_lip import SigLipLoss
from .spectral_contrastive import SpectralContrastiveLoss
from .sup_con import SupConLoss
from .tico import TiCoLoss
from .vibcreg import VIbCRegLoss
from .vicreg import VICRegLoss
from .vicregl import VICRegLLoss
from .w_mse import Whitening2d, WMSELoss

__all__ = [
    "BarlowTwinsLoss",
    "ClipLoss",
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
    "SigLipLoss",
    "SpectralContrastiveLoss",
    "SupConLoss",
    "TiCoLoss",
    "VICRegLLoss",
    "VICRegLoss",
    "VIbCRegLoss",
    "WMSELoss",
    "Whitening2d",
]
