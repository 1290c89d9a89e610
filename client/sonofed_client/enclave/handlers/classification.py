"""Fine-tune a classifier on the labelled selection; test it on the site's own test images."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from sonofed_client.adaptation.evaluation import evaluate
from sonofed_client.adaptation.finetuning import draw_replay
from sonofed_client.adaptation.local_round import local_round
from sonofed_client.adaptation.spacing import BATCH_NORM_IMAGES, evenly_spaced
from sonofed_client.enclave.handlers.control import keep_variate, to_arrays, variates
from sonofed_client.enclave.handlers.layers import keep_layers, own_layers
from sonofed_client.enclave.handlers.selection import labelled
from sonofed_client.enclave.release import MEASURED
from sonofed_client.enclave.site import Site, load_weights, weights_of
from sonofed_client.enclave.store import CataloguedImage
from sonofed_client.enclave.views import seen_by
from sonofed_common.batch_norm import adapt_batch_norm
from sonofed_common.contract.actions import EvaluateClassifier, Score, TrainClassifier
from sonofed_common.contract.errors import OneClassError, ParameterError
from sonofed_common.contract.manifest import SHARED_IMAGES, SYNTHETIC_IMAGES
from sonofed_common.contract.records import Records, from_bytes, grouped
from sonofed_common.models.classifiers import Classifier
from sonofed_common.runtime import derive_seed, seed_everything


def train_classifier(site: Site, parameters: TrainClassifier, request: Records) -> Records:
    """One federated round of fine-tuning on the images labelled so far of one budget."""
    rows, images = _seen(site, parameters, "pool")
    labels = labelled(site, parameters.study, parameters.budget)
    if not labels:
        return Records(config={"examples": 0})
    seed = derive_seed(
        parameters.seed,
        site.settings.name,
        parameters.classifier,
        parameters.budget,
        parameters.round,
    )
    seed_everything(seed)
    model = starting_model(site, parameters, request, images, parameters.settings.batch_norm)
    index = [n for n, row in enumerate(rows) if row.id in labels]
    targets = torch.tensor([labels[rows[n].id] for n in index])
    replay = _replay(site, parameters, len(index), seed)
    common, own = variates(site, parameters, request, model)
    with site.checkpoint(parameters, request, labels) as checkpoint:
        update = local_round(
            model,
            images[index],
            targets,
            parameters.settings,
            parameters.aggregation,
            parameters.round,
            seed,
            common,
            own,
            site.events,
            replay,
            checkpoint,
        )
    local = parameters.settings.batch_norm == "local"
    shared = keep_layers(site, parameters, model) if local else weights_of(model)
    arrays = grouped("weights", shared)
    if update.variate:
        keep_variate(site, parameters, update.variate)
        arrays |= grouped("control", to_arrays(update.change))
    return Records(arrays, config={"examples": len(index)}, metrics=dict(update.metrics))


def _seen(
    site: Site, parameters: TrainClassifier | EvaluateClassifier, part: str
) -> tuple[list[CataloguedImage], Tensor]:
    return seen_by(parameters.classifier, site, part, parameters.bundle, parameters.image_size)


def _replay(
    site: Site, parameters: TrainClassifier, labels: int, seed: int
) -> tuple[Tensor, Tensor] | None:
    """Draw the round's synthetic images (M, 1, S, S) in [0, 1] and their classes (M,)."""
    if not parameters.settings.replay:
        return None
    bundle, path = parameters.bundle, SYNTHETIC_IMAGES
    if parameters.synthetic_bundle is not None:
        bundle, path = parameters.synthetic_bundle, SHARED_IMAGES
    elif path not in site.manifest(bundle).files:
        raise ParameterError(
            "the study replays synthetic source images and the bundle holds none; train the source "
            "with a section 'synthetic', or set finetuning.replay to 0"
        )
    kept = from_bytes(site.blob(bundle, path)).arrays
    classes = torch.from_numpy(np.array(kept["labels"]))
    if not len(classes):
        return None
    drawn = draw_replay(
        classes, round(parameters.settings.replay * labels), derive_seed(seed, "replay")
    )
    images = torch.from_numpy(np.array(kept["images"]))[drawn, None].to(torch.float32) / 255
    if images.shape[-1] != parameters.image_size:
        shrinks = images.shape[-1] > parameters.image_size
        images = interpolate(images, parameters.image_size, mode="area" if shrinks else "bilinear")
    return images, classes[drawn]


def evaluate_classifier(site: Site, parameters: EvaluateClassifier, request: Records) -> Records:
    """Metrics with patient-clustered intervals on the site's own test images."""
    rows, images = _seen(site, parameters, "test")
    if not rows or any(row.label is None for row in rows):
        raise OneClassError(
            f"site {site.settings.name} has no labelled test images; leave the phase 'classifier' "
            "out"
        )
    _, pool = _seen(site, parameters, "pool")
    model = starting_model(site, parameters, request, pool, parameters.batch_norm)
    thresholds = site.facts(parameters.bundle)["classifiers"][parameters.classifier]
    metrics = evaluate(
        model,
        images,
        [int(row.label == 1) for row in rows],
        [row.group for row in rows],
        thresholds["threshold_at_specificity_90"],
        parameters.replicates,
        derive_seed(parameters.seed, site.settings.name, "bootstrap"),
    )
    # Sensitivity over one malignant image is that patient's outcome; over none it is no number.
    fewest = min(Counter(row.label for row in rows).values())
    return Records(config={"examples": len(rows), MEASURED: fewest}, metrics=dict(metrics))


def starting_model(
    site: Site,
    parameters: TrainClassifier | EvaluateClassifier | Score,
    request: Records,
    pool: Tensor,
    batch_norm: str,
) -> Classifier:
    """Return the classifier that a request starts from.

    Parameters
    ----------
    site : Site
        Keeps the bundle.
    parameters : TrainClassifier, EvaluateClassifier or Score
        Name the bundle and the classifier.
    request : Records
        ``weights/...``, or none for the source's.
    pool : Tensor
        (N, V, S, S) unlabelled images of the site, as the classifier sees them.
    batch_norm : str
        ``site`` re-estimates the normalisation statistics on the pool, ``global`` keeps them,
        ``local`` takes whole layers from the site's own last round in place of the request.
    """
    model = site.classifier(parameters.bundle, parameters.classifier)
    weights = request.group("weights")
    # What scores a pool, nobody has trained.
    if batch_norm == "local" and not isinstance(parameters, Score):
        weights = {**weights_of(model), **weights, **own_layers(site, parameters)}
    if weights:
        load_weights(model, weights)
    if batch_norm == "site":
        adapt_batch_norm(model, evenly_spaced(pool, BATCH_NORM_IMAGES))
    return model
