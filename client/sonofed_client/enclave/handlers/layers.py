"""FedBN at a site: its normalisation layers stay in its store, all other weights are shared."""

from __future__ import annotations

from collections.abc import Mapping

from sonofed_client.enclave.rounds import keep, kept_before, kept_last
from sonofed_client.enclave.site import Site, weights_of
from sonofed_common.batch_norm import layers_of
from sonofed_common.contract.actions import EvaluateClassifier, TrainClassifier
from sonofed_common.contract.records import Array, Records
from sonofed_common.models.classifiers import Classifier


def own_layers(site: Site, parameters: TrainClassifier | EvaluateClassifier) -> Mapping[str, Array]:
    """Return the site's own layers, of the round before or, for a test, of its last round.

    Empty before the site's first round: then they are the source's.
    """
    if isinstance(parameters, TrainClassifier):
        kept = kept_before(site, parameters.study, _name(parameters), parameters.round)
    else:
        kept = kept_last(site, parameters.study, _name(parameters))
    return {} if kept is None else kept.arrays


def keep_layers(site: Site, parameters: TrainClassifier, model: Classifier) -> dict[str, Array]:
    """Keep a trained model's layers for the next round, and return all its other weights."""
    weights, own = weights_of(model), layers_of(model)
    layers = Records({name: weights.pop(name) for name in own})
    keep(site, parameters.study, _name(parameters), parameters.round, layers)
    return weights


def _name(parameters: TrainClassifier | EvaluateClassifier) -> str:
    return f"layers/{parameters.classifier}/{parameters.budget}"
