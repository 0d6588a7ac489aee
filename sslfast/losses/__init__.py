"""The losses, one file each: a function over :mod:`sslfast.ops` and :mod:`sslfast.distributed`, and its module form.

The modules are here, the functions of the same files in :mod:`sslfast`.
"""

from .clip import ClipLoss
from .dcl import DCLLoss, DCLWLoss
from .diagnostics import Diagnostics
from .hypersphere import HypersphereLoss
from .info_nce import InfoNCELoss
from .memory_queue import MemoryQueue
from .moco import MoCoLoss, MoCoV3Loss
from .nt_xent import NTXentLoss
from .ranking import MultipleNegativesRankingLoss
from .sig_lip import SigLipLoss
from .sup_con import SupConLoss

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
    "SigLipLoss",
    "SupConLoss",
]
