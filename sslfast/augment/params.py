"""``ViewParams``: what was drawn for each view of each image, as one tensor that can be stored, edited and replayed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data._utils.collate import default_collate_fn_map

from .._library import towards
from ..ops.view_params import COLUMNS


@dataclass(eq=False)
class ViewParams:
    """The random choices behind a batch of views.

    Everything is in ``table`` [V, B, 16], float32: V views of B images, one column a choice. The properties are views
    into it, so ``params.sigma[0] = 0`` switches the blur of the first view off, and ``torch.save(params.table, …)``
    with ``ViewParams(torch.load(…))`` replays. A ``DataLoader`` joins those of its items to those of the batch.

    Attributes:
        table: [V, B, 16].
        box: [V, B, 4]: top, left, height, width of the crop in pixels of the source; whole numbers.
        flip: [V, B], 1 where the view is mirrored.
        brightness, contrast, saturation, hue: [V, B] factors.
        order: [V, B, 4], which of them (0, 1, 2, 3) comes first, second, …; −1: none.
        grey: [V, B], 1 where the view is grey.
        sigma: [V, B], standard deviation of the blur in pixels of the view; 0: none.
        solarize: [V, B], 1 where the view is solarised.

    Raises:
        ValueError: the table's shape or dtype is another.

    Example:
        >>> images, views = torch.zeros(4, 3, 32, 32), sslfast.augment.recipe("simclr")
        >>> params = sslfast.augment.sample_params(images, views, ids=[0, 1, 2, 3])
        >>> params.table.shape, params.box.shape
        (torch.Size([2, 4, 16]), torch.Size([2, 4, 4]))
        >>> params.sigma[0] = 0  # no blur in the first view
    """

    table: Tensor
    COLUMNS = COLUMNS

    def __post_init__(self) -> None:
        if self.table.dim() != 3 or self.table.shape[2] != len(COLUMNS) or self.table.dtype != torch.float32:
            raise ValueError(
                f"table must be [views, images, {len(COLUMNS)}] of float32, "
                f"got {tuple(self.table.shape)} of {self.table.dtype}"
            )

    def _column(self, name: str) -> Tensor:
        return self.table[:, :, COLUMNS.index(name)]

    @property
    def box(self) -> Tensor:
        return self.table[:, :, :4]

    @property
    def flip(self) -> Tensor:
        return self._column("flip")

    @property
    def brightness(self) -> Tensor:
        return self._column("brightness")

    @property
    def contrast(self) -> Tensor:
        return self._column("contrast")

    @property
    def saturation(self) -> Tensor:
        return self._column("saturation")

    @property
    def hue(self) -> Tensor:
        return self._column("hue")

    @property
    def order(self) -> Tensor:
        return self.table[:, :, 9:13]

    @property
    def grey(self) -> Tensor:
        return self._column("grey")

    @property
    def sigma(self) -> Tensor:
        return self._column("sigma")

    @property
    def solarize(self) -> Tensor:
        return self._column("solarize")

    def __len__(self) -> int:
        """How many views."""
        return self.table.shape[0]

    def __getitem__(self, views: int | slice) -> ViewParams:
        """The parameters of some views, sharing memory; one view is [1, B, 16]."""
        if isinstance(views, slice):
            return ViewParams(self.table[views])
        chosen = range(len(self))[views]  # IndexError where there is none
        return ViewParams(self.table[chosen : chosen + 1])

    def to(self, device: torch.device | str) -> ViewParams:
        """On another device; the same object's memory where it is there already."""
        return ViewParams(towards(self.table, device))

    def pin_memory(self) -> ViewParams:
        """A copy in pinned memory, for ``DataLoader(pin_memory=True)``."""
        return ViewParams(self.table.pin_memory())

    def clone(self) -> ViewParams:
        """A copy to edit."""
        return ViewParams(self.table.clone())


def _joined(batch: Sequence[ViewParams], *, collate_fn_map: Any = None) -> ViewParams:
    """The parameters of several images, or batches of them, as those of one batch."""
    return ViewParams(torch.cat([params.table for params in batch], dim=1))


default_collate_fn_map[ViewParams] = _joined  # so that a DataLoader takes a data set whose items hold them
