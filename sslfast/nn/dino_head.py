"""DINO's projection head, whose last layer is left to the loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import reference
from .._checks import whole_number
from ..ops.l2_normalize import l2_normalize
from ..ops.types import NormalizedPrototypes


class DINOHead(nn.Module):
    """An MLP, rows of norm 1, and K prototypes: the head of DINO, iBOT, DINOv2 and DINOv3.

    ``forward`` ends at the bottleneck. Its features and :attr:`prototypes` are what
    :func:`sslfast.prototype_cross_entropy` takes; :meth:`logits` are there for all else. Checkpoints fit both ways:
    the keys are ``mlp.*`` and ``last_layer.weight_g``, ``last_layer.weight_v``, or ``last_layer.weight`` without
    weight normalisation. The weights are plain parameters, normalised where they are used: the module can be copied,
    compiled and averaged at any time.

    Args:
        in_dim: width of the backbone's features.
        out_dim: K, the number of prototypes.
        use_bn: batch normalisation after each hidden layer (default ``False``).
        norm_last_layer: the prototypes' norms stay 1 (default; DINO, iBOT); ``False``: they learn (DINOv2).
        nlayers: of the MLP, at least 1 (default 3).
        hidden_dim, bottleneck_dim: widths inside (2048) and of the features (256).
        mlp_bias: biases in the MLP (default).
        weight_norm: normalise the prototypes (default); ``False``: DINOv3's plain last layer, and ``norm_last_layer``
            has no effect.

    Shapes:
        input: [..., in_dim]; output: [..., bottleneck_dim], rows of norm 1.

    Raises:
        ValueError: a size is not a whole number of at least 1.

    Source: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", section 3.1; initialised as
    facebookresearch/dino's ``DINOHead`` (dinov3's without weight normalisation).

    Example:
        >>> student, teacher = sslfast.DINOHead(32, 64), sslfast.DINOHead(32, 64).requires_grad_(False)
        >>> crops = torch.randn(4, 8, 32)  # four crops of eight images, of which the teacher sees two
        >>> loss = sslfast.prototype_cross_entropy(
        ...     student(crops), teacher(crops[:2]), student.prototypes, teacher.prototypes
        ... )
        >>> sorted(name for name in student.state_dict() if "last" in name)
        ['last_layer.weight_g', 'last_layer.weight_v']
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        mlp_bias: bool = True,
        *,
        weight_norm: bool = True,
    ) -> None:
        super().__init__()
        sizes = {"in_dim": in_dim, "out_dim": out_dim, "nlayers": nlayers, "hidden_dim": hidden_dim}
        for name, size in {**sizes, "bottleneck_dim": bottleneck_dim}.items():
            whole_number(name, size, 1)
        widths = [in_dim, *[hidden_dim] * (nlayers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for i, (width, following) in enumerate(zip(widths, widths[1:], strict=False)):
            linear = nn.Linear(width, following, bias=mlp_bias)
            nn.init.normal_(linear.weight, std=0.02)  # published: cut off at 100 deviations
            if mlp_bias:
                nn.init.zeros_(linear.bias)
            layers.append(linear)
            if i + 1 < nlayers:
                layers += [nn.BatchNorm1d(hidden_dim), nn.GELU()] if use_bn else [nn.GELU()]
        self.mlp = layers[0] if nlayers == 1 else nn.Sequential(*layers)
        self.last_layer = _Prototypes(out_dim, bottleneck_dim, weight_norm, norm_last_layer)

    @property
    def prototypes(self) -> Tensor | NormalizedPrototypes:
        """The last layer as :func:`sslfast.prototype_cross_entropy` takes it."""
        return self.last_layer.prototypes

    def forward(self, x: Tensor) -> Tensor:
        """Features of norm 1 [..., bottleneck_dim]."""
        h = self.mlp(x.reshape(-1, x.shape[-1]))
        return l2_normalize(h).view(*x.shape[:-1], -1)

    def logits(self, x: Tensor) -> Tensor:
        """What the published head returns, [..., out_dim]."""
        return F.linear(self(x), self.last_layer.weights())


class _Prototypes(nn.Module):
    """Weights [K, D], as they are or as gain and direction."""

    def __init__(self, count: int, width: int, normalized: bool, fixed_norm: bool) -> None:
        super().__init__()
        rows = torch.empty(count, width)
        if not normalized:
            nn.init.normal_(rows, std=0.02)
            self.weight = nn.Parameter(rows)
            return
        nn.init.kaiming_uniform_(rows, a=5**0.5)  # as a linear layer's: only the direction counts
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=not fixed_norm)
        self.weight_v = nn.Parameter(rows)

    @property
    def prototypes(self) -> Tensor | NormalizedPrototypes:
        if hasattr(self, "weight"):
            return self.weight
        return NormalizedPrototypes(self.weight_v, self.weight_g)

    def weights(self) -> Tensor:
        if hasattr(self, "weight"):
            return self.weight
        return reference.normalized_prototypes(self.weight_v, self.weight_g.flatten())
