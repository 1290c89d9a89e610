"""Metrics of masks, per image and over images, with patient-clustered bootstrap intervals.

Empty masks: a class that is absent in both truth and prediction is left out of its image's mean
over classes; an image without any class in either scores Dice 1, NSD 1 and HD95 0. A class that is
absent in one of the two only scores Dice 0, NSD 0 and, as HD95, the diagonal of the image.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from sonofed_common.contract.results import SEGMENTATION_METRICS
from sonofed_common.metrics import Floats

CALIBRATION_BINS = 15
TOLERANCE = 1 / 64
"""Of the NSD, as a share of the image's side: 2 pixels at 128."""

_CHUNK = 2_000_000


@dataclass(frozen=True)
class ImageScores:
    """What each of N images adds to the metrics.

    Attributes
    ----------
    dice, nsd : ndarray (N,)
        Dice and normalised surface Dice (Nikolov et al., JMIR 2021) at a tolerance of `TOLERANCE`,
        in [0, 1], means over the foreground classes.
    hd95 : ndarray (N,)
        95% Hausdorff distance in pixels: the larger of both directions, mean over the classes.
    residuals : ndarray (N, 15)
        Sum over the pixels in each bin of confidence less correctness.
    pixels : ndarray (N,)
        Pixels of each image.
    """

    dice: Floats
    nsd: Floats
    hd95: Floats
    residuals: Floats
    pixels: Floats

    def __len__(self) -> int:
        return len(self.dice)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Put the scores of batches together, in their order; at least one batch."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))


def score_images(probabilities: Tensor, masks: Tensor) -> ImageScores:
    """Score predicted class probabilities against masks.

    Parameters
    ----------
    probabilities : Tensor (N, C, S, S)
        In [0, 1], sum 1 over C; the largest is the predicted class.
    masks : Tensor (N, 1, S, S)
        True classes 0 to C - 1; 0 is background.
    """
    confidence, predictions = probabilities.max(dim=1)
    truths = masks[:, 0].to(probabilities.device).long()
    dice, nsd, hd95 = _overlap(predictions.cpu(), truths.cpu(), probabilities.shape[1])
    gap = confidence.double() - (predictions == truths).double()
    bins = (confidence * CALIBRATION_BINS).long().clamp_(max=CALIBRATION_BINS - 1)
    residuals = torch.zeros(len(gap), CALIBRATION_BINS, dtype=torch.double, device=gap.device)
    residuals.scatter_add_(1, bins.flatten(1), gap.flatten(1))
    pixels = np.full(len(gap), float(math.prod(gap.shape[1:])))
    return ImageScores(dice, nsd, hd95, residuals.cpu().numpy(), pixels)


def image_dice(probabilities: Tensor, masks: Tensor) -> Floats:
    """Dice (N,) of each image alone: as in `score_images`, without the cost of the distances."""
    predictions, truths = probabilities.argmax(dim=1).cpu(), masks[:, 0].cpu().long()
    found, true = _foreground(predictions, truths, probabilities.shape[1])
    dice, either = _dice(found, true)
    return _class_mean(dice, either, 1.0)


def segmentation_metrics(scores: ImageScores) -> dict[str, float]:
    """Compute the metrics over images.

    Parameters
    ----------
    scores : ImageScores
        Of N images.

    Returns
    -------
    dict of str to float
        `SEGMENTATION_METRICS`: means of ``dice``, ``nsd`` and ``hd95``, and ``ece``, the expected
        calibration error of the pixels' largest probability (15 equal-width bins; Guo et al., ICML
        2017) over the pixels of all images. NaN without images.
    """
    values = weighted_metrics(scores, np.ones((1, len(scores))))
    return {name: float(value[0]) for name, value in values.items()}


def segmentation_intervals(
    scores: ImageScores, groups: Sequence[str] | ArrayLike, replicates: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Compute 95% bootstrap percentile intervals, drawing whole patients.

    Parameters
    ----------
    scores : ImageScores
        Of N images.
    groups : sequence (N,)
        Patient of each image; images of a patient are drawn together.
    replicates : int
        Number of bootstrap samples.
    seed : int
        Seed of the draws.

    Returns
    -------
    dict of str to (float, float)
        Low and high end of each metric of `segmentation_metrics`; NaN without images or replicates.
    """
    if not len(scores) or not replicates:
        return dict.fromkeys(SEGMENTATION_METRICS, (math.nan, math.nan))
    names, members = np.unique(np.asarray(groups), return_inverse=True)
    generator = np.random.default_rng(seed)
    step = max(_CHUNK // len(scores), 1)
    drawn: dict[str, list[Floats]] = {name: [] for name in SEGMENTATION_METRICS}
    for start in range(0, replicates, step):
        size = min(step, replicates - start)
        counts = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size)
        weights = counts.astype(np.float64)[:, members]
        for name, value in weighted_metrics(scores, weights).items():
            drawn[name].append(value)
    return {name: _percentiles(np.concatenate(values)) for name, values in drawn.items()}


def _percentiles(values: Floats) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def weighted_metrics(scores: ImageScores, weights: Floats) -> dict[str, Floats]:
    """Compute the metrics under several weightings of the images.

    Parameters
    ----------
    scores : ImageScores
        Of N images.
    weights : ndarray (R, N)
        How often each image counts.

    Returns
    -------
    dict of str to ndarray (R,)
        As `segmentation_metrics`; NaN where nothing counts.
    """
    if not len(scores):
        return {name: np.full(len(weights), np.nan) for name in SEGMENTATION_METRICS}
    images, pixels = weights.sum(axis=1), weights @ scores.pixels
    means = {n: weights @ getattr(scores, n) / images for n in ("dice", "nsd", "hd95")}
    return {**means, "ece": np.abs(weights @ scores.residuals).sum(axis=1) / pixels}


def _overlap(predictions: Tensor, truths: Tensor, classes: int) -> tuple[Floats, Floats, Floats]:
    """Dice, NSD and HD95 of class maps (N, S, S): arrays (N,)."""
    found, true = _foreground(predictions, truths, classes)
    dice, either = _dice(found, true)
    height, width = predictions.shape[1:]
    nsd, hd95 = np.zeros(dice.shape), np.full(dice.shape, math.hypot(height, width))
    both = found.flatten(2).any(2) & true.flatten(2).any(2)
    for n, c in both.nonzero().tolist():
        nsd[n, c], hd95[n, c] = _surfaces(found[n, c], true[n, c], height * TOLERANCE)
    return (
        _class_mean(dice, either, 1.0),
        _class_mean(nsd, either, 1.0),
        _class_mean(hd95, either, 0.0),
    )


def _surfaces(found: Tensor, true: Tensor, tolerance: float) -> tuple[float, float]:
    """NSD and HD95 of two masks (S, S), neither of them empty.

    As MONAI's own two metrics, which would measure the same distances twice.
    """
    from sonofed_common.monai import get_edge_surface_distance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        _, distances, _ = get_edge_surface_distance(found, true, symmetric=True)
    near = torch.cat(distances) <= tolerance
    return near.float().mean().item(), max(d.quantile(0.95).item() for d in distances)


def _foreground(predictions: Tensor, truths: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Class maps (N, S, S) as bool (N, C - 1, S, S)."""
    foreground = torch.arange(1, classes)[None, :, None, None]
    return predictions[:, None] == foreground, truths[:, None] == foreground


def _dice(found: Tensor, true: Tensor) -> tuple[Floats, NDArray[np.bool_]]:
    """Dice (N, K) of masks (N, K, S, S), and where either of the two has the class."""
    from sonofed_common.monai import compute_dice

    either = (found | true).flatten(2).any(2).numpy()
    dice = np.zeros(either.shape)
    if len(dice):
        dice[:] = compute_dice(found.float(), true.float(), ignore_empty=False)
    return dice, either


def _class_mean(values: Floats, counted: NDArray[np.bool_], without: float) -> Floats:
    """Mean over the counted classes of values (N, K); ``without`` where there is none."""
    counts = counted.sum(axis=1)
    sums: Floats = (values * counted).sum(axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), without)
