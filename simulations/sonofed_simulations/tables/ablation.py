"""What ADAptation's parts make of the hospitals' pools: points, their scores, and a selection."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.cluster import KMeans
from torch import Tensor

from sonofed_client.adaptation.clustering import cluster_sums, moments
from sonofed_client.adaptation.embedding import embed, train_round
from sonofed_client.adaptation.scoring import (
    distance_to_centroids,
    representativeness,
    uncertainty,
)
from sonofed_client.adaptation.spacing import BATCH_NORM_IMAGES, evenly_spaced
from sonofed_client.enclave.site import load_weights, weights_of
from sonofed_common.batch_norm import adapt_batch_norm
from sonofed_common.contract.selection import budget_count
from sonofed_common.contract.study import Clustering, Embedding
from sonofed_common.models.classifiers import Classifier
from sonofed_common.models.encoder import HypersphereEncoder, Predictor
from sonofed_common.runtime import Events, derive_seed, device
from sonofed_server.aggregation.fedavg import FedAvg
from sonofed_server.phases.clustering_math import (
    initial_centroids,
    largest_move,
    update_centroids,
)
from sonofed_simulations.tables.arms import Array
from sonofed_simulations.tables.features import features_of
from sonofed_simulations.tables.flat import FlatEncoder, FlatPredictor, train_flat_round
from sonofed_simulations.tables.start import Start

Stage = Literal["full", "without reconstruction", "without hypersphere", "without contrast"]


@dataclass(frozen=True)
class Pooled:
    """One site's pool, in [0, 1], and the source's reconstructions of it (N, 1, S, S)."""

    images: Tensor
    redrawn: Tensor


@dataclass(frozen=True)
class Points:
    """What a stage makes of all sites' pools, in the order of the sites.

    Attributes
    ----------
    z : ndarray of float32 (N, d)
        Unit vectors, but without hypersphere.
    r : ndarray of float32 (N,)
        Distance of each image to the source: small is source-like.
    """

    z: Array
    r: Array


def points_of(
    stage: Stage,
    start: Start,
    pools: Mapping[str, Pooled],
    settings: Embedding,
    seed: int,
    events: Events,
) -> Points:
    """Train what a stage trains, by federated averaging over the sites, and map the pools.

    Parameters
    ----------
    stage : str
        ``full``: pairs of image and reconstruction on the hypersphere; r is the angle between
        both. ``without reconstruction``: pairs of two augmentations; r is the angle to the nearest
        source centroid, as a study without that phase has it. ``without hypersphere``: as full,
        but vectors keep their lengths, and distances are Euclidean. ``without contrast``: features
        of the start model as unit vectors, under one set of normalisation statistics from all
        sites' reconstructions, as the trained encoder has it.
    start : Start
        The source's classifier.
    pools : mapping of str to Pooled
        By site.
    settings : Embedding
        Of a study.
    seed : int
        Of the networks' random parts and of the order of images.
    events : Events
        Progress.
    """
    if stage == "without contrast":
        model = _shared_statistics(start, pools)
        return _joined([_start_points(model, pool) for pool in pools.values()])
    flat = stage == "without hypersphere"
    encoder, predicting = (FlatEncoder, FlatPredictor) if flat else (HypersphereEncoder, Predictor)
    own = derive_seed(seed, "projector")
    student = encoder(start.model(), settings.dimension, own).to(device())
    predictor = predicting(settings.dimension, own).to(device())
    for number in range(settings.rounds):
        means = FedAvg(), FedAvg()
        for name in events.track(pools, f"{stage}, round {number + 1}", len(pools)):
            local, own_seed = copy.deepcopy((student, predictor)), derive_seed(seed, name, number)
            images, redrawn = pools[name].images, pools[name].redrawn
            if flat:
                train_flat_round(*local, images, redrawn, settings, number, own_seed, events)
            else:
                partners = redrawn if stage == "full" else None
                train_round(*local, images, partners, settings, number, own_seed, events)
            for mean, network in zip(means, local, strict=True):
                mean.add(weights_of(network), len(images))
        for network, mean in zip((student, predictor), means, strict=True):
            load_weights(network, mean.mean())
    return _joined([_embedded(stage, start, student, pool) for pool in pools.values()])


def select(points: Points, clusters: int, share: float, flat: bool, seed: int) -> Array:
    """Choose by rank of the margin plus rank of r, over all sites' images together.

    Parameters
    ----------
    points : Points
        N images.
    clusters : int
        k.
    share : float
        Of the N images that may be labelled.
    flat : bool
        Whether distances are Euclidean.
    seed : int
        Of k-means where it is Euclidean.

    Returns
    -------
    ndarray of int64
        Indices of the images with the smallest sums.
    """
    if flat:
        found = KMeans(clusters, n_init=10, random_state=seed % 2**32).fit_transform(points.z)
        nearest = np.sort(found, axis=1)
        u = nearest[:, 1] - nearest[:, 0]
    else:
        z = torch.from_numpy(points.z)
        u = uncertainty(z, _centroids(z, clusters), "margin").numpy()
    score = rankdata(u, method="min") + rankdata(points.r, method="min")
    order = np.argsort(score, kind="stable")
    return np.asarray(order[: budget_count(share, len(score))])


def _centroids(z: Tensor, clusters: int) -> Tensor:
    """Spherical k-means as the coordinator and the sites do it together."""
    settings = Clustering(clusters=clusters)
    total, second, count = moments(z)
    found = initial_centroids(total.numpy(), second.numpy(), count, clusters)
    for _ in range(settings.iterations):
        sums, counts = cluster_sums(z, torch.from_numpy(found))
        moved = update_centroids(sums.numpy(), counts.numpy(), found)
        rest = largest_move(found, moved) <= settings.tolerance
        found = moved
        if rest:
            break
    return torch.from_numpy(found)


def _embedded(stage: Stage, start: Start, student: HypersphereEncoder, pool: Pooled) -> Points:
    z = embed(student, pool.images)
    if stage == "without reconstruction":
        features = _unit(features_of(start.model(), pool.images))
        r = distance_to_centroids(torch.from_numpy(features), torch.from_numpy(start.centroids))
        return Points(z.numpy(), r.numpy())
    redrawn = embed(student, pool.redrawn)
    if stage == "without hypersphere":
        return Points(z.numpy(), (z - redrawn).norm(dim=1).numpy())
    return Points(z.numpy(), representativeness(z, redrawn).numpy())


def _shared_statistics(start: Start, pools: Mapping[str, Pooled]) -> Classifier:
    """The start model, its normalisation statistics averaged over the sites."""
    mean, model = FedAvg(), start.model()
    for pool in pools.values():
        own = copy.deepcopy(model)
        adapt_batch_norm(own, evenly_spaced(pool.redrawn, BATCH_NORM_IMAGES))
        mean.add(weights_of(own), len(pool.redrawn))
    load_weights(model, mean.mean())
    return model


def _start_points(model: Classifier, pool: Pooled) -> Points:
    z, redrawn = (_unit(features_of(model, images)) for images in (pool.images, pool.redrawn))
    r = representativeness(torch.from_numpy(z), torch.from_numpy(redrawn))
    return Points(z, r.numpy())


def _unit(features: Array) -> Array:
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return np.asarray(features / np.maximum(lengths, 1e-12))


def _joined(parts: list[Points]) -> Points:
    return Points(np.concatenate([p.z for p in parts]), np.concatenate([p.r for p in parts]))
