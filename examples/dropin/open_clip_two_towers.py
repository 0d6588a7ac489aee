"""Two towers with open_clip's ClipLoss: which lower half belongs to which upper half of an image, a learnt scale.

python -m examples.dropin.open_clip_two_towers               # open_clip as it is
python -m examples.dropin.open_clip_two_towers --sslfast     # one line more: sslfast.patch("open_clip")
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from open_clip import ClipLoss
from torch import Tensor, nn
from torch.nn import functional as F

import sslfast

from . import common

WIDTH = 512  # of the embeddings, as ViT-B's in CLIP


class TwoTowers(nn.Module):
    """Named and called as open_clip's models are."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.upper, self.lower = (self._tower(channels) for _ in range(2))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def _tower(self, channels: int) -> nn.Sequential:
        return nn.Sequential(common.Encoder(channels), nn.Linear(common.Encoder.features, WIDTH, bias=False))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        upper, lower = images.chunk(2, dim=2)
        features = (F.normalize(tower(x), dim=-1) for tower, x in ((self.upper, upper), (self.lower, lower)))
        return (*features, self.logit_scale.exp())


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = common.parse(arguments, __doc__, batch_size=4096)
    if options.sslfast:
        sslfast.patch("open_clip")

    torch.manual_seed(options.seed)
    images = common.images(options).train
    model = TwoTowers(images.shape[1])
    criterion = ClipLoss(cache_labels=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.1)

    meter = common.Meter("open_clip_two_towers", options)
    for batch in meter.steps(common.batches(len(images), options)):
        upper, lower, logit_scale = model(images[batch])
        optimizer.zero_grad()
        meter.loss_begins(upper, lower)
        loss = criterion(upper, lower, logit_scale)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        meter.losses.append(loss.item())
    return meter.report(logit_scale=model.logit_scale.exp().item())


if __name__ == "__main__":
    main()
