"""Adapt a segmenter to the site's unlabelled images."""

from __future__ import annotations

from sonofed_client.adaptation.pseudo_labels import adapt_round
from sonofed_client.enclave.site import Site, load_weights, weights_of
from sonofed_common.contract.actions import TrainSegmenter
from sonofed_common.contract.records import Records, grouped
from sonofed_common.runtime import derive_seed


def train_segmenter(site: Site, parameters: TrainSegmenter, request: Records) -> Records:
    """One federated round of source-free adaptation of a branch on the pool; uses no label.

    A single image trains nothing, and nothing is answered.
    """
    rows, images = site.images("pool", parameters.image_size)
    if len(rows) == 1:
        return Records(config={"examples": 0})
    model = site.segmenter(parameters.bundle, parameters.branch, parameters.image_size)
    if weights := request.group("weights"):
        load_weights(model, weights)
    with site.checkpoint(parameters, request) as checkpoint:
        report = adapt_round(
            model,
            images,
            parameters.settings,
            site.segmentation(parameters.bundle),
            parameters.round,
            derive_seed(parameters.seed, site.settings.name, parameters.branch, parameters.round),
            checkpoint,
            site.events,
            parameters.batch_norm,
        )
    return Records(
        grouped("weights", weights_of(model)),
        config={"examples": len(rows)},
        metrics=dict(report),
    )
