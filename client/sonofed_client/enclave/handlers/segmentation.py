"""Adapt a segmenter to the site's unlabelled images."""

from __future__ import annotations

from importlib.metadata import version

from sonofed_client.adaptation.pseudo_labels import adapt_round
from sonofed_client.enclave.site import Site, load_weights, weights_of
from sonofed_common.contract.actions import TrainSegmenter
from sonofed_common.contract.errors import SonoFedError
from sonofed_common.contract.records import Records, grouped
from sonofed_common.runtime import derive_seed
from sonofed_common.security import sha256


def train_segmenter(site: Site, parameters: TrainSegmenter, request: Records) -> Records:
    """One federated round of source-free adaptation of a branch on the pool; uses no label."""
    rows, images = site.images("pool", parameters.image_size)
    model = site.segmenter(parameters.bundle, parameters.branch, parameters.image_size)
    if weights := request.group("weights"):
        load_weights(model, weights)
    made_of = parameters.model_dump_json(exclude={"study"})
    run = sha256(" ".join((version("sonofed"), made_of, request.digest(), site.snapshot)).encode())
    checkpoint = site.store.folder / "checkpoints" / f"{run}.safetensors"
    try:
        report = adapt_round(
            model,
            images,
            parameters.settings,
            site.segmentation(parameters.bundle),
            parameters.round,
            derive_seed(parameters.seed, site.settings.name, parameters.branch, parameters.round),
            checkpoint,
            site.events,
        )
    except SonoFedError:
        # The same request would fail again; an interruption, in contrast, goes on from the file.
        checkpoint.unlink(missing_ok=True)
        raise
    checkpoint.unlink(missing_ok=True)
    return Records(
        grouped("weights", weights_of(model)),
        config={"examples": len(rows)},
        metrics=dict(report),
    )
