"""Pretrain a segmenter's encoder on the site's unlabelled pool."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sonofed_client.adaptation.pretraining import PretrainingModel, pretrain_round
from sonofed_client.enclave.site import Site, load_weights, weights_of
from sonofed_common.contract.actions import Pretrain
from sonofed_common.contract.records import Records, grouped
from sonofed_common.data.sector import sectors
from sonofed_common.models.encoders import Encoder, build_encoder
from sonofed_common.runtime import derive_seed


def pretrain(site: Site, parameters: Pretrain, request: Records) -> Records:
    """One federated round of target-informed pretraining on the pool.

    A round that was killed goes on from its last epoch when the same request returns. A single
    image trains nothing, and nothing is answered.
    """
    rows, images = site.images("pool", parameters.image_size)
    if len(rows) == 1:
        return Records(config={"examples": 0})
    # Every site draws the same decoder and projector, so round 0 needs no broadcast.
    model = PretrainingModel(
        starting_encoder(site, parameters),
        parameters.settings,
        parameters.image_size,
        derive_seed(parameters.seed, "pretraining"),
        site.segmentation(parameters.bundle).flips,
    ).to(site.device)
    if weights := request.group("weights"):
        load_weights(model, weights)
    with site.checkpoint(parameters, request) as checkpoint:
        report = pretrain_round(
            model,
            images,
            pool_sectors(site, images),
            [row.group for row in rows],
            parameters.settings,
            parameters.round,
            derive_seed(parameters.seed, site.settings.name, "pretrain", parameters.round),
            checkpoint,
            site.events,
        )
    return Records(
        grouped("weights", weights_of(model)),
        config={"examples": len(rows)},
        metrics=dict(report),
    )


def pool_sectors(site: Site, images: Tensor) -> Tensor:
    """Return the sectors, bool (N, 1, S, S), of the pool's images, found once a snapshot."""
    prefix = f"sectors/{images.shape[-1]}/"
    name = prefix + site.snapshot
    kept = site.store.get(name)
    if kept is None:
        kept = Records({"sectors": np.packbits(sectors(images).numpy())})
        site.store.remove(prefix)
        site.store.put(name, kept)
    bits = np.unpackbits(kept.arrays["sectors"], count=images.numel())
    return torch.from_numpy(bits.astype(np.bool_)).view(images.shape)


def starting_encoder(site: Site, parameters: Pretrain) -> Encoder:
    """Return the encoder that every site starts from."""
    if parameters.settings.start == "source":
        return site.segmenter(parameters.bundle, "source", parameters.image_size).encoder
    name = site.segmentation(parameters.bundle).encoder
    return build_encoder(name, pretrained=True, seed=derive_seed(parameters.seed, "encoder"))
