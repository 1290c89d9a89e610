"""Starts: the arrays that an update begins from, where a policy clips the change to them."""

from __future__ import annotations

from collections.abc import Mapping

from sonofed_client.adaptation.drift import zeros
from sonofed_client.adaptation.pretraining import PretrainingModel
from sonofed_client.enclave.handlers.embedding import networks
from sonofed_client.enclave.handlers.pretraining import starting_encoder
from sonofed_client.enclave.site import Site, weights_of
from sonofed_common.batch_norm import layers_of
from sonofed_common.contract.actions import (
    Embed,
    Parameters,
    Pretrain,
    TrainClassifier,
    TrainSegmenter,
)
from sonofed_common.contract.records import Array, Records, grouped
from sonofed_common.runtime import derive_seed


def start_of(site: Site, parameters: Parameters, request: Records) -> Mapping[str, Array]:
    """Return the named arrays that a reply to a request may be compared with.

    They came with the request or, in a first round, are what every site starts from: weights of the
    bundle, or seeded ones. They hold nothing of the site's images.

    Parameters
    ----------
    site : Site
        Keeps the bundle.
    parameters : Parameters
        Of the request.
    request : Records
        Its arrays.
    """
    if isinstance(parameters, TrainClassifier) and parameters.aggregation.strategy == "scaffold":
        model = site.classifier(parameters.bundle, parameters.classifier)
        none = {name: tensor.cpu().numpy() for name, tensor in zeros(model).items()}
        weights = request.group("weights") or weights_of(model)
        # What comes back of a control variate is its change.
        return {**grouped("weights", weights), **grouped("control", none)}
    if any("/" in name for name in request.arrays):
        return request.arrays
    if isinstance(parameters, TrainClassifier):
        model = site.classifier(parameters.bundle, parameters.classifier)
        own = layers_of(model) if parameters.settings.batch_norm == "local" else frozenset()
        weights = {name: array for name, array in weights_of(model).items() if name not in own}
        return grouped("weights", weights)
    if isinstance(parameters, TrainSegmenter):
        segmenter = site.segmenter(parameters.bundle, parameters.branch, parameters.image_size)
        return grouped("weights", weights_of(segmenter))
    if isinstance(parameters, Pretrain):
        pretrained = PretrainingModel(
            starting_encoder(site, parameters),
            parameters.settings,
            parameters.image_size,
            derive_seed(parameters.seed, "pretraining"),
        )
        return grouped("weights", weights_of(pretrained))
    if isinstance(parameters, Embed):
        student, predictor = networks(site, parameters)
        return {
            **grouped("student", weights_of(student)),
            **grouped("predictor", weights_of(predictor)),
        }
    return request.arrays
