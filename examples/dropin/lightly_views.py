"""SimCLR, Barlow Twins and VICReg with lightly: its losses and projection heads on a small encoder, real images.

python -m examples.dropin.lightly_views --method vicreg               # lightly as it is
python -m examples.dropin.lightly_views --method vicreg --sslfast     # one line more: sslfast.patch("lightly")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lightly.loss import BarlowTwinsLoss, NTXentLoss, VICRegLoss
from lightly.models.modules.heads import BarlowTwinsProjectionHead, SimCLRProjectionHead, VICRegProjectionHead
from torch import Tensor, nn

import sslfast

from . import common

WIDTH = 2048  # of the projectors without negatives, as in lightly's own examples; the papers' is 8192


class Method(NamedTuple):
    """``head`` takes the width of its input, of its hidden layer, and of its output."""

    head: Callable[[int, int, int], nn.Module]
    hidden: int
    output: int
    loss: Callable[[], nn.Module]
    batch_size: int


METHODS = {
    "simclr": Method(SimCLRProjectionHead, 512, 128, lambda: NTXentLoss(temperature=0.2), batch_size=2048),
    "barlow_twins": Method(
        BarlowTwinsProjectionHead, WIDTH, WIDTH, lambda: BarlowTwinsLoss(lambda_param=5e-3), batch_size=256
    ),
    "vicreg": Method(VICRegProjectionHead, WIDTH, WIDTH, VICRegLoss, batch_size=256),
}


class Model(nn.Module):
    def __init__(self, channels: int, method: Method) -> None:
        super().__init__()
        self.backbone = common.Encoder(channels)
        self.projection_head = method.head(self.backbone.features, method.hidden, method.output)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = common.parse(arguments, __doc__, {name: method.batch_size for name, method in METHODS.items()})
    if options.sslfast:
        sslfast.patch("lightly")

    torch.manual_seed(options.seed)
    images = common.images(options).train
    method = METHODS[options.method]
    model = Model(images.shape[1], method)
    criterion = method.loss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)

    meter = common.Meter(f"lightly_{options.method}", options)
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
