"""sslfast: the expensive parts of self-supervised learning, made cheap."""

from . import _native as _native
from ._backends import use_backend
from .losses import NTXentLoss
from .ops import l2_normalize, nt_xent, similarity_logsigmoid, similarity_lse
from .ops.similarity_lse import SimilarityTerms, similarity_terms

__version__ = "0.1.0"
__all__ = [
    "NTXentLoss",
    "SimilarityTerms",
    "l2_normalize",
    "nt_xent",
    "similarity_logsigmoid",
    "similarity_lse",
    "similarity_terms",
    "use_backend",
]
