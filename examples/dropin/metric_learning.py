"""Metric learning with pytorch-metric-learning: its NTXentLoss on labelled images, then nearest neighbours.

python -m examples.dropin.metric_learning               # the package as it is
python -m examples.dropin.metric_learning --sslfast     # one line more: sslfast.patch("pytorch_metric_learning")
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from pytorch_metric_learning import losses
from torch import nn

import sslfast
from examples.common.evaluate import encode, knn_accuracy

from . import common


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    # The package compares every positive pair with every negative pair: 256 images of ten classes take several GB.
    options = common.parse(arguments, __doc__, batch_size=128)
    if options.sslfast:
        sslfast.patch("pytorch_metric_learning")

    torch.manual_seed(options.seed)
    data = common.images(options)
    if data.train_labels is None:
        sys.exit(f"--data {options.data}: metric learning needs labels, one subfolder a class")
    images, labels = data.train, torch.as_tensor(data.train_labels)
    model = nn.Sequential(common.Encoder(images.shape[1]), nn.Linear(common.Encoder.features, 128))
    criterion = losses.NTXentLoss(temperature=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)

    meter = common.Meter("metric_learning", options)
    for batch in meter.steps(common.batches(len(images), options)):
        embeddings = model(images[batch])
        optimizer.zero_grad()
        meter.loss_begins(embeddings)
        loss = criterion(embeddings, labels[batch])
        loss.backward()
        optimizer.step()
        meter.losses.append(loss.item())
    return meter.report(knn_accuracy=knn_accuracy(encode(model, data), data))


if __name__ == "__main__":
    main()
