"""The formulas in plain PyTorch: any dtype, any device, differentiable twice; they share no code with a kernel."""

from .augment_views import augment_views
from .l2_normalize import l2_normalize
from .nt_xent import nt_xent
from .second_moment import second_moment
from .similarity_logsigmoid import similarity_logsigmoid
from .similarity_lse import similarity_lse, similarity_terms
from .view_params import view_params

__all__ = [
    "augment_views",
    "l2_normalize",
    "nt_xent",
    "second_moment",
    "similarity_logsigmoid",
    "similarity_lse",
    "similarity_terms",
    "view_params",
]
