"""Loss modules: thin ``torch.nn.Module`` classes over the functions in ``sslfast.ops``."""

from .nt_xent import NTXentLoss

__all__ = ["NTXentLoss"]
