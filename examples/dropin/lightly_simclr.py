"""SimCLR with lightly: its NTXentLoss and its projection head on a small encoder, real images.

python -m examples.dropin.lightly_simclr               # lightly as it is
python -m examples.dropin.lightly_simclr --sslfast     # one line more: sslfast.patch("lightly")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules.heads import SimCLRProjectionHead
from torch import Tensor, nn

import sslfast

from . import common


class SimCLR(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.backbone = common.Encoder(channels)
        self.projection_head = SimCLRProjectionHead(self.backbone.features, hidden_dim=512, output_dim=128)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = common.parse(arguments, __doc__, batch_size=2048)
    if options.sslfast:
        sslfast.patch("lightly")

    torch.manual_seed(options.seed)
    images = common.images(options).train
    model = SimCLR(images.shape[1])
    criterion = NTXentLoss(temperature=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)

    meter = common.Meter("lightly_simclr", options)
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
