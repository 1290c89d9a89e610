"""Adapt a segmenter to the site's unlabelled images."""

from __future__ import annotations

from sonofed_client.adaptation.pseudo_labels import adapt_round, starting_shares
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
    first = None
    if weights := request.group("weights"):
        # The bundle's weights are what the first round of the first strategy began with.
        first = starting_shares(model, images, parameters.batch_norm)
        load_weights(model, weights)
    # Over the whole chain: its strategies must not draw the same orders and views.
    rounds_done = parameters.earlier_rounds + parameters.round
    with site.checkpoint(parameters, request) as checkpoint:
        report = adapt_round(
            model,
            images,
            parameters.settings,
            site.segmentation(parameters.bundle),
            parameters.round,
            derive_seed(parameters.seed, site.settings.name, parameters.branch, rounds_done),
            checkpoint,
            site.events,
            parameters.batch_norm,
            first,
        )
    return Records(
        grouped("weights", weights_of(model)),
        config={"examples": len(rows)},
        metrics=dict(report),
    )
