"""Evaluation of a classifier on a site's own test images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from sonofed_common.contract.errors import DivergenceError
from sonofed_common.metrics import classification_metrics, clustered_intervals


def predict(model: nn.Module, images: Tensor, batch_size: int = 64) -> NDArray[np.float64]:
    """Compute P(malignant) of images.

    Parameters
    ----------
    model : Module
        Maps (B, 1, S, S) to logits (B, C); class 1 is malignant. Its mode is restored.
    images : Tensor (N, V, S, S)
        In [0, 1].
    batch_size : int
        Images at once.

    Returns
    -------
    ndarray (N,)
        In [0, 1].
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            parts = [
                torch.softmax(model(batch.to(device)).double(), dim=1)[:, 1].cpu().numpy()
                for batch in torch.split(images, batch_size)
                if len(batch)
            ]
    finally:
        model.train(was_training)
    return np.concatenate(parts) if parts else np.empty(0)


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: ArrayLike,
    groups: Sequence[str],
    threshold_at_specificity_90: float | None,
    replicates: int,
    seed: int,
) -> dict[str, float]:
    """Test a classifier.

    Parameters
    ----------
    model : Module
        Maps (B, 1, S, S) to logits (B, C); class 1 is malignant.
    images : Tensor (N, V, S, S)
        In [0, 1].
    labels : array (N,)
        0 benign, 1 malignant.
    groups : sequence of str (N,)
        Patient of each image.
    threshold_at_specificity_90 : float or None
        Operating point found on source data.
    replicates : int
        Bootstrap replicates of the intervals; 0 leaves them out.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    dict of str to float
        The metrics of `classification_metrics`, ``<metric>_low`` and ``<metric>_high`` (95%,
        patient-clustered) and ``images``. What one class alone cannot tell is NaN.

    Raises
    ------
    DivergenceError
        The model predicts what is not a number.
    """
    probabilities = predict(model, images)
    if not np.isfinite(probabilities).all():
        raise DivergenceError(
            "the classifier's predictions are not finite; lower the learning rate and train again"
        )
    metrics = classification_metrics(labels, probabilities, threshold_at_specificity_90)
    result = dict(metrics)
    if replicates:
        intervals = clustered_intervals(
            labels, probabilities, groups, replicates, seed, threshold_at_specificity_90
        )
        for name, (low, high) in intervals.items():
            result[f"{name}_low"], result[f"{name}_high"] = low, high
    return {**result, "images": float(len(images))}
