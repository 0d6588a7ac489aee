"""How good features are, without fine-tuning: nearest neighbours, a linear classifier, and a picture of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from .data import Dataset

NEIGHBOURS = 20
PICTURE_MOST = 1000


@dataclass(frozen=True)
class Features:
    """What an encoder makes of a data set: ``train`` [n, D] and ``test`` [m, D], float32."""

    train: np.ndarray
    test: np.ndarray


@torch.no_grad()
def encode(encoder: nn.Module, data: Dataset, batch_size: int = 512) -> Features:
    """Features of the plain (not augmented) images, in evaluation mode; the encoder's mode is restored."""
    was_training = encoder.training
    encoder.eval()
    parts = [torch.cat([encoder(batch) for batch in x.split(batch_size)]).numpy() for x in (data.train, data.test)]
    encoder.train(was_training)
    return Features(*parts)


def raw_pixels(data: Dataset) -> Features:
    """The pixels themselves, as the features that need no encoder."""
    return Features(data.train.flatten(1).numpy(), data.test.flatten(1).numpy())


def knn_accuracy(features: Features, data: Dataset) -> float:
    """Part of the test images whose class wins among the 20 nearest training images by cosine (all, where fewer)."""
    k = min(NEIGHBOURS, len(features.train))
    classifier = KNeighborsClassifier(n_neighbors=k, metric="cosine", algorithm="brute")
    return float(classifier.fit(features.train, data.train_labels).score(features.test, data.test_labels))


def linear_accuracy(features: Features, data: Dataset) -> float:
    """Test accuracy of logistic regression on standardised features (scikit-learn's default penalty)."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return float(classifier.fit(features.train, data.train_labels).score(features.test, data.test_labels))


def accuracies(features: dict[str, Features], data: Dataset) -> dict[str, dict[str, float]] | None:
    """``{"knn": {name: accuracy}, "linear": {...}}`` for each set of features, or ``None`` without labels."""
    if data.train_labels is None:
        return None
    return {
        "knn": {name: knn_accuracy(each, data) for name, each in features.items()},
        "linear": {name: linear_accuracy(each, data) for name, each in features.items()},
    }


def picture(features: Features, seed: int) -> np.ndarray:
    """[m, 2]: t-SNE of the test features by cosine, at most the first 1,000 of them."""
    x = features.test[:PICTURE_MOST]
    perplexity = min(30.0, (len(x) - 1) / 3)  # scikit-learn requires less than the number of points
    return TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=seed).fit_transform(x)
