"""Supervised training and testing of the source classifiers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sonofed_common.data.augmentation import Augmentation
from sonofed_common.metrics import classification_metrics, threshold_at_specificity
from sonofed_common.models.classifiers import (
    TWO_VIEWS,
    Classifier,
    TwoViewClassifier,
    build_classifier,
)
from sonofed_common.runtime import SILENT, Events, derive_seed, device
from sonofed_common.training import Training, fit
from sonofed_server.source.data import Part
from sonofed_server.source.settings import ClassifierTraining

BATCH = 64


def train_classifier(
    name: str,
    pool: Part,
    settings: ClassifierTraining,
    seed: int,
    checkpoint: Path | None = None,
    events: Events = SILENT,
) -> Classifier:
    """Train one classifier with class-weighted cross-entropy and augmentation.

    Parameters
    ----------
    name : str
        One of `CLASSIFIERS`; ImageNet weights are the start where an installed package has them.
    pool : Part
        Labelled images of both classes.
    settings : ClassifierTraining
        Length, step size and batch.
    seed : int
        Of the weights, the order and the augmentation.
    checkpoint : Path or None
        See `training.fit`.
    events : Events
        Gets the progress.

    Returns
    -------
    Classifier
        In evaluation mode.
    """
    model = build_classifier(name, seed=derive_seed(seed, "weights")).to(device())
    weights = class_weights(pool.labels).to(device())
    augmentation = Augmentation(seed)

    def renew(epoch: int) -> None:
        nonlocal augmentation
        augmentation = Augmentation(derive_seed(seed, "augmentation", epoch))

    def loss(indices: Tensor) -> Tensor:
        logits = model(augmentation(pool.images[indices]).to(device()))
        return cross_entropy(logits, pool.labels[indices].to(device()), weights)

    training = Training(settings.epochs, settings.learning_rate, settings.batch_size, seed)
    count = len(pool.labels)
    fit(model, count, loss, training, checkpoint, events, f"train {name}", before_epoch=renew)
    return model.eval()


def train_two_views(
    name: str,
    pool: Part,
    settings: ClassifierTraining,
    seed: int,
    checkpoint: Path | None = None,
    events: Events = SILENT,
) -> Classifier:
    """Train a classifier of whole images and one of lesions, each on its own, and join them.

    Parameters
    ----------
    name : str
        One of `CLASSIFIERS` that `sees_lesions`.
    pool : Part
        Images (N, 2, S, S), from `with_lesions`.
    settings, seed, events
        See `train_classifier`; both have the same training.
    checkpoint : Path or None
        Each of both has its own beside it.
    """
    kind, parts = name.removesuffix(TWO_VIEWS), []
    for n, view in enumerate(("whole", "lesion")):
        part = Part(pool.samples, pool.images[:, n : n + 1], pool.labels)
        own = None if checkpoint is None else checkpoint.with_suffix(f".{view}.safetensors")
        own_seed = derive_seed(seed, view)
        parts.append(train_classifier(kind, part, settings, own_seed, own, events))
    return TwoViewClassifier(*parts).eval()


def class_weights(labels: Tensor) -> Tensor:
    """Weights inverse to class frequency, of mean 1 over the images.

    Parameters
    ----------
    labels : Tensor
        (N,) int64, every class present.
    """
    counts = torch.bincount(labels)
    return len(labels) / (len(counts) * counts.float())


@torch.inference_mode()
def probabilities(model: Classifier, images: Tensor) -> Tensor:
    """P(malignant) (N,) of images (N, V, S, S), on CPU."""
    parts = [
        model(batch.to(device())).softmax(1)[:, 1].cpu() for batch in torch.split(images, BATCH)
    ]
    return torch.cat(parts)


@torch.inference_mode()
def features(model: Classifier, images: Tensor) -> Tensor:
    """Backbone features (N, F) of images (N, V, S, S), on CPU."""
    return torch.cat(
        [model.features(batch.to(device())).cpu() for batch in torch.split(images, BATCH)]
    )


def classifier_facts(model: Classifier, test: Part) -> dict[str, Any]:
    """Test a classifier on held-out source images and freeze its operating point.

    Parameters
    ----------
    model : Classifier
        In evaluation mode.
    test : Part
        Held-out images of both classes.

    Returns
    -------
    dict
        ``threshold_at_specificity_90`` (float) and ``metrics`` (dict, see
        `metrics.classification_metrics`; None where a metric is undefined). The threshold is found
        on the same images, so the sensitivity at it is optimistic here and honest elsewhere.
    """
    predicted = probabilities(model, test.images).numpy()
    labels = test.labels.numpy()
    threshold = threshold_at_specificity(labels, predicted)
    metrics = classification_metrics(labels, predicted, threshold)
    return {
        "threshold_at_specificity_90": threshold,
        "metrics": {k: v if math.isfinite(v) else None for k, v in metrics.items()},
    }
