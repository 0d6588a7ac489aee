"""SwAV's prototypes: the last layer of SwAV and DeepCluster-v2, one head or several."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import whole_number
from ..ops.l2_normalize import l2_normalize


class SwAVPrototypes(nn.Module):
    """K prototypes of each head: linear layers on features of norm 1, whose rows :meth:`normalize` puts on the sphere.

    The constructor, ``forward`` and ``normalize`` are those of lightly 1.6.0's ``SwaVPrototypes``, and so are the keys,
    ``heads.<h>.weight``. What facebookresearch/swav (``weight``, or ``prototypes<h>.weight`` of several heads) and
    solo-learn (``<h>.weight``) save is loaded too. :attr:`prototypes` are what losses from features take.

    Args:
        input_dim: width of the features (default 128).
        n_prototypes: K, or K of each head (default 3000).
        n_steps_frozen_prototypes: steps in which the prototypes get no gradient (default 0); ``step`` is then needed.
            (With ``DistributedDataParallel`` they are unused parameters in these steps: ``find_unused_parameters``.)
        bias: as lightly's layers have, whose checkpoints hold it; ``False`` (default), as published.

    Shapes:
        input: [..., input_dim]; output: [..., K], of several heads a list.

    Raises:
        ValueError: a size is not a whole number of at least 1.

    Source: Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", section
    3.1.

    Example:
        >>> head = sslfast.SwAVPrototypes(4, 6)
        >>> z = torch.nn.functional.normalize(torch.randn(2, 5, 4), dim=2)  # two crops of five images
        >>> head.normalize()  # before the first forward of a step
        >>> loss = sslfast.swav(head(z).unbind(0))
        >>> sorted(head.state_dict())
        ['heads.0.weight']
    """

    def __init__(
        self,
        input_dim: int = 128,
        n_prototypes: int | Sequence[int] = 3000,
        n_steps_frozen_prototypes: int = 0,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.is_single = not isinstance(n_prototypes, Sequence)
        counts: Sequence[Any] = [n_prototypes] if self.is_single else n_prototypes  # type: ignore[assignment]
        width = whole_number("input_dim", input_dim, 1)
        self.n_prototypes = [whole_number("n_prototypes", count, 1) for count in counts]
        if not self.n_prototypes:
            raise ValueError("n_prototypes must name at least one head, got none")
        self.n_steps_frozen_prototypes = whole_number("n_steps_frozen_prototypes", n_steps_frozen_prototypes, 0)
        self.heads = nn.ModuleList(nn.Linear(width, count, bias=bias) for count in self.n_prototypes)
        self.register_load_state_dict_pre_hook(_renamed)  # type: ignore[no-untyped-call]

    def _linears(self) -> list[nn.Linear]:
        return cast("list[nn.Linear]", list(self.heads))

    @property
    def prototypes(self) -> Tensor | list[Tensor]:
        """[K, D], of several heads a list."""
        return self.prototypes_at(None)

    def prototypes_at(self, step: int | None) -> Tensor | list[Tensor]:
        """:attr:`prototypes`, without gradient in the first ``n_steps_frozen_prototypes`` steps."""
        frozen = step is not None and step < self.n_steps_frozen_prototypes
        weights = [head.weight.detach() if frozen else head.weight for head in self._linears()]
        return weights[0] if self.is_single else weights

    def forward(self, x: Tensor, step: int | None = None) -> Tensor | list[Tensor]:
        """Scores [..., K].

        Raises:
            ValueError: prototypes are frozen at first, and ``step`` is not given.
        """
        if step is None and self.n_steps_frozen_prototypes > 0:
            raise ValueError("step must be given where n_steps_frozen_prototypes is not 0, got None")
        weights = self.prototypes_at(step)
        rows = [weights] if isinstance(weights, Tensor) else weights
        frozen = step is not None and step < self.n_steps_frozen_prototypes
        scores = []
        for head, weight in zip(self._linears(), rows, strict=True):
            bias: Tensor | None = head.bias.detach() if frozen and head.bias is not None else head.bias
            scores.append(F.linear(x, weight, bias))
        return scores[0] if self.is_single else scores

    @torch.no_grad()
    def normalize(self) -> None:
        """Divide every prototype by its norm, in place: before the first forward of a step, as backwards need them."""
        for head in self._linears():
            head.weight.copy_(l2_normalize(head.weight))


def _renamed(head: SwAVPrototypes, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The published names as this module's."""
    for key in [key for key in state if key.startswith(prefix)]:
        found = re.fullmatch(r"(?:(?:prototypes)?(\d+)\.)?(weight|bias)", key[len(prefix) :])
        if found is not None:
            state[f"{prefix}heads.{found[1] or 0}.{found[2]}"] = state.pop(key)
