"""One file an operation: schema, fake kernel, autograd, choice of backend, and the public function."""

from .l2_normalize import l2_normalize
from .nt_xent import nt_xent

__all__ = ["l2_normalize", "nt_xent"]
