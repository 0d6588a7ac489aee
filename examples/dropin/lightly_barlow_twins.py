"""Barlow Twins with lightly: its BarlowTwinsLoss and its projection head on a small encoder, real images.

python -m examples.dropin.lightly_barlow_twins               # lightly as it is
python -m examples.dropin.lightly_barlow_twins --sslfast     # one line more: sslfast.patch("lightly")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightly.loss import BarlowTwinsLoss
from lightly.models.modules.heads import BarlowTwinsProjectionHead
from torch import Tensor, nn

import sslfast

from . import common

WIDTH = 2048  # of the projector, as in lightly's own examples; the paper's is 8192


class BarlowTwins(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.backbone = common.Encoder(channels)
        self.projection_head = BarlowTwinsProjectionHead(self.backbone.features, WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = common.parse(arguments, __doc__, batch_size=256)
    if options.sslfast:
        sslfast.patch("lightly")

    torch.manual_seed(options.seed)
    images = common.images(options).train
    model = BarlowTwins(images.shape[1])
    criterion = BarlowTwinsLoss(lambda_param=5e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)

    meter = common.Meter("lightly_barlow_twins", options)
    for batch in meter.steps(common.batches(len(images), options)):
        z0, z1 = model(common.two_views(images[batch])).chunk(2)
        optimizer.zero_grad()
        meter.loss_begins(z0, z1)
        loss = criterion(z0, z1)
        loss.backward()
        optimizer.step()
        meter.losses.append(loss.item())
    return meter.report()


if __name__ == "__main__":
    main()
