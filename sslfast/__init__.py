"""sslfast: the expensive parts of self-supervised learning, made cheap."""

from . import _native as _native
from ._backends import use_backend
from .losses import NTXentLoss
from .ops import l2_normalize, nt_xent

__version__ = "0.1.0"
__all__ = ["NTXentLoss", "l2_normalize", "nt_xent", "use_backend"]
