"""The formulas in plain PyTorch: any dtype, any device, differentiable twice; they share no code with a kernel."""

from .l2_normalize import l2_normalize
from .nt_xent import nt_xent

__all__ = ["l2_normalize", "nt_xent"]
