"""Calibrate branches on the pool; test their infusion on the site's own test masks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sonofed_client.adaptation.ensemble import branch_probabilities, consensus_log_temperatures
from sonofed_client.adaptation.spacing import BATCH_NORM_IMAGES, evenly_spaced
from sonofed_client.enclave.release import SMALLEST_MEASURED
from sonofed_client.enclave.site import Site
from sonofed_client.enclave.store import CataloguedImage
from sonofed_common.batch_norm import adapt_batch_norm, statistics_of
from sonofed_common.contract.actions import EvaluateSegmenter, TrainEnsemble
from sonofed_common.contract.errors import DivergenceError, ParameterError, SiteEmptyError
from sonofed_common.contract.records import Records
from sonofed_common.models.infusion import InfusionHead
from sonofed_common.models.segmenter import Segmenter
from sonofed_common.runtime import derive_seed
from sonofed_common.segmentation_metrics import (
    ImageScores,
    score_images,
    segmentation_intervals,
    segmentation_metrics,
)

BATCH = 16


@dataclass(frozen=True)
class Prediction:
    """Test images of a site, and what the infused branches say of them.

    Attributes
    ----------
    rows : list of CataloguedImage
        B images.
    images : Tensor (B, 1, S, S)
        In [0, 1].
    masks : Tensor (B, 1, S, S)
        True classes, uint8.
    probabilities : Tensor (B, C, S, S)
        Infused class probabilities.
    weights : Tensor (K, B, S, S)
        Weight of each branch.
    """

    rows: list[CataloguedImage]
    images: Tensor
    masks: Tensor
    probabilities: Tensor
    weights: Tensor

    def scores(self) -> ImageScores:
        """Score each image."""
        return score_images(self.probabilities, self.masks)


def train_ensemble(site: Site, parameters: TrainEnsemble, request: Records) -> Records:
    """Logarithm of each branch's temperature, by consensus of the branches on the pool."""
    rows, images = site.images("pool", parameters.image_size)
    if len(rows) < SMALLEST_MEASURED:
        nothing = np.zeros(len(parameters.branches))
        return Records({"log_temperatures": nothing}, config={"examples": 0})
    models = _branches(site, parameters, images)
    found = consensus_log_temperatures(models, images)
    return Records({"log_temperatures": found}, config={"examples": len(rows)})


def evaluate_segmenter(site: Site, parameters: EvaluateSegmenter, request: Records) -> Records:
    """Metrics with patient-clustered intervals on the site's own test masks; none of too few."""
    if len(site.masks("test", parameters.image_size)[0]) < SMALLEST_MEASURED:
        return Records(config={"examples": 0})
    groups: list[str] = []
    parts: list[ImageScores] = []
    for prediction in predict_site(site, parameters, request):
        groups += [row.group for row in prediction.rows]
        parts.append(prediction.scores())
    scores = ImageScores.join(parts)
    metrics = segmentation_metrics(scores)
    if parameters.replicates:
        seed = derive_seed(parameters.seed, site.settings.name, "bootstrap")
        intervals = segmentation_intervals(scores, groups, parameters.replicates, seed)
        for name, (low, high) in intervals.items():
            metrics[f"{name}_low"], metrics[f"{name}_high"] = low, high
    return Records(config={"examples": len(scores)}, metrics=dict(metrics))


def predict_site(
    site: Site, parameters: EvaluateSegmenter, request: Records
) -> Iterator[Prediction]:
    """Segment the site's test images that have masks, batch by batch.

    Parameters
    ----------
    site : Site
        Keeps images and bundle.
    parameters : EvaluateSegmenter
        Name the bundle, its branches and the infusion.
    request : Records
        ``temperatures`` and ``gate/...``, see `InfusionHead.load`.

    Raises
    ------
    SiteEmptyError
        No test image has a mask.
    ParameterError
        The records do not fit, or the masks hold classes that the segmenters do not know.
    DivergenceError
        A branch predicts what is not a number.
    """
    rows, images = site.images("test", parameters.image_size)
    index, masks = site.masks("test", parameters.image_size)
    if not index:
        raise SiteEmptyError(
            f"site {site.settings.name} has no test image with a mask; add masks, or leave the "
            "phase 'evaluate' out"
        )
    facts = site.segmentation(parameters.bundle)
    classes, mirrored = facts.classes, parameters.infusion.mirrored
    if int(masks.max()) >= classes:
        raise ParameterError(
            f"masks of site {site.settings.name} hold class {int(masks.max())}, but the segmenters "
            f"know {classes}, background included; train the source on the same classes"
        )
    if mirrored and not facts.flips:
        raise ParameterError(
            "infusion.mirrored is on, but the segmenters know classes that have a side; leave it "
            "off, or train the source with flips"
        )
    head = InfusionHead(len(parameters.branches), parameters.infusion, classes)
    head.load(request.arrays)
    _, pool = site.images("pool", parameters.image_size)
    models = _branches(site, parameters, pool)
    tested = images[index]
    for number, stacked in enumerate(branch_probabilities(models, tested, BATCH, mirrored)):
        part = slice(number * BATCH, number * BATCH + stacked.shape[1])
        with torch.inference_mode():
            probabilities, weights = head(stacked)
        if not bool(torch.isfinite(probabilities).all()):
            raise DivergenceError(
                "a segmenter's predictions are not finite; lower the learning rate and train again"
            )
        held = [rows[n] for n in index[part]]
        yield Prediction(held, tested[part], masks[part], probabilities, weights)


def _branches(
    site: Site, parameters: TrainEnsemble | EvaluateSegmenter, pool: Tensor
) -> list[Segmenter]:
    """Branches of a bundle, with the normalisation statistics that the request asks for."""
    models = [
        site.segmenter(parameters.bundle, branch, parameters.image_size)
        for branch in parameters.branches
    ]
    if parameters.batch_norm != "global":
        sample = evenly_spaced(pool, BATCH_NORM_IMAGES)
        for model in models:
            prior = statistics_of(model) if parameters.batch_norm == "mixed" else None
            adapt_batch_norm(model, sample, prior=prior)
    return models
