"""Cells of the aggregation table: whole networks, trained round by round by the product's code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sonofed_client.adaptation.drift import Variate
from sonofed_client.adaptation.evaluation import predict
from sonofed_client.adaptation.local_round import local_round
from sonofed_client.adaptation.spacing import BATCH_NORM_IMAGES, evenly_spaced
from sonofed_client.enclave.handlers.control import to_arrays
from sonofed_client.enclave.site import load_weights, weights_of
from sonofed_common.batch_norm import adapt_batch_norm, layers_of
from sonofed_common.contract.records import Array, Records, grouped
from sonofed_common.contract.study import Aggregation, Finetuning
from sonofed_common.models.classifiers import Classifier
from sonofed_common.runtime import derive_seed, device
from sonofed_server.aggregation.strategies import STRATEGIES
from sonofed_server.aggregation.strategy import Round, Weights
from sonofed_server.aggregation.weights import weight_of
from sonofed_simulations.tables.arms import Prediction
from sonofed_simulations.tables.start import Start


@dataclass(frozen=True)
class SiteImages:
    """A site's images under one seed.

    Attributes
    ----------
    name : str
    pool : Tensor (P, 1, S, S)
        All images of the pool.
    chosen : Tensor of int64 (n,)
        Which of them are labelled.
    labels : Tensor of int64 (n,)
        Their classes.
    test : Tensor (M, 1, S, S)
    test_labels : ndarray of int64 (M,)
    test_groups : ndarray of str (M,)
        Patient of each test image.
    """

    name: str
    pool: Tensor
    chosen: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Array
    test_groups: Array


@dataclass(frozen=True)
class Trained:
    """What a training ended with.

    Attributes
    ----------
    weights : dict of str to ndarray
        After the last round; where layers stay at the sites, all others.
    state : Records
        Of the strategy, after the last round.
    layers : dict of str to dict of str to ndarray
        Layers that stayed, by site.
    """

    weights: Weights
    state: Records
    layers: dict[str, Weights] = field(default_factory=dict)


def union(sites: Sequence[SiteImages]) -> SiteImages:
    """Return one site that has the labelled images of all."""
    images = torch.cat([site.pool[site.chosen] for site in sites])
    return SiteImages(
        "all",
        images,
        torch.arange(len(images)),
        torch.cat([site.labels for site in sites]),
        images[:0],
        np.empty(0, np.int64),
        np.empty(0, str),
    )


def train(
    start: Start,
    sites: Sequence[SiteImages],
    settings: Finetuning,
    aggregation: Aggregation,
    seed: int,
) -> Trained:
    """Train a classifier round by round, as a study's sites and coordinator do.

    Parameters
    ----------
    start : Start
        The source's classifier.
    sites : sequence of SiteImages
        Who takes part; one alone trains by itself.
    settings, aggregation
        Of a study.
    seed : int
        Of the cell; the same for all arms.
    """
    end = Trained(weights_of(start.model()), Records())
    kept: dict[str, Variate] = {}
    own_layers = layers_of(start.model()) if settings.batch_norm == "local" else frozenset()
    for number in range(settings.rounds):
        strategy = STRATEGIES[aggregation.strategy](
            Round(aggregation, number, settings.rounds, partial(dict, end.weights), end.state)
        )
        common = {
            name: torch.from_numpy(array).to(device())
            for name, array in strategy.broadcast().get("control", {}).items()
        }
        for site in sites:
            model = starting_model(start, end, site, settings)
            own = derive_seed(seed, site.name, number)
            torch.manual_seed(own)
            images = site.pool[site.chosen]
            update = local_round(
                model,
                images,
                site.labels,
                settings,
                aggregation,
                number,
                own,
                common,
                kept.get(site.name),
            )
            kept[site.name] = update.variate
            trained = weights_of(model)
            end.layers[site.name] = {name: trained.pop(name) for name in own_layers}
            arrays = grouped("weights", trained)
            arrays |= grouped("control", to_arrays(update.change))
            reply = Records(arrays, {"examples": len(images)}, dict(update.metrics))
            strategy.add(site.name, reply, weight_of(reply, aggregation))
        end = Trained(*strategy.finish(), end.layers)
    return end


def starting_model(
    start: Start, end: Trained, site: SiteImages, settings: Finetuning
) -> Classifier:
    """Return a site's classifier, normalised as the study's setting says."""
    model = start.model().to(device())
    load_weights(model, {**weights_of(model), **end.weights, **end.layers.get(site.name, {})})
    if settings.batch_norm == "site":
        adapt_batch_norm(model, evenly_spaced(site.pool, BATCH_NORM_IMAGES))
    return model


def test(start: Start, end: Trained, site: SiteImages, settings: Finetuning) -> Prediction:
    """Return labels, P(malignant) and patients of a site's test images."""
    model = starting_model(start, end, site, settings)
    return site.test_labels, predict(model, site.test), site.test_groups
