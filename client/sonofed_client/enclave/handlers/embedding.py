"""Train the embedding for a round; report its moments and per-cluster sums."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor

from sonofed_client.adaptation.clustering import cluster_sums, moments
from sonofed_client.adaptation.embedding import (
    collapse_statistics,
    embed,
    fedema_merge,
    train_round,
)
from sonofed_client.adaptation.scoring import distance_to_centroids, representativeness
from sonofed_client.enclave.handlers.reconstruction import reconstructions
from sonofed_client.enclave.rounds import keep, kept_before
from sonofed_client.enclave.site import Site, load_weights, weights_of
from sonofed_client.enclave.views import redrawn_as_seen_by, seen_by
from sonofed_common.contract.actions import Cluster, Embed, Encode
from sonofed_common.contract.errors import ParameterError
from sonofed_common.contract.records import Array, Records, from_bytes, grouped
from sonofed_common.contract.study import MAX_CLUSTERS
from sonofed_common.models.encoder import HypersphereEncoder, Predictor
from sonofed_common.runtime import derive_seed
from sonofed_common.security import sha256

UNIT_LENGTH_TOLERANCE = 1e-3


def train_embedding(site: Site, parameters: Embed, request: Records) -> Records:
    """One federated round of hypersphere contrastive learning on the pool."""
    rows, images = seen_by(
        parameters.classifier, site, "pool", parameters.bundle, parameters.image_size
    )
    student, predictor = networks(site, parameters)
    if student_weights := request.group("student"):
        load_weights(student, student_weights)
        load_weights(predictor, request.group("predictor"))
    fedema = parameters.settings.merge == "fedema"
    scale = _merge(site, parameters, student) if fedema else None
    partners = None
    if parameters.pairs == "reconstruction":
        partners = _redrawn(site, parameters)
    seed = derive_seed(parameters.seed, site.settings.name, "embed", parameters.round)
    with site.checkpoint(parameters, request) as checkpoint:
        report = train_round(
            student,
            predictor,
            images,
            partners,
            parameters.settings,
            parameters.round,
            seed,
            site.events,
            checkpoint,
        )
    arrays = weights_of(student)
    if fedema:
        kept = Records(arrays, config={"scale": scale})
        keep(site, parameters.study, "student", parameters.round, kept)
    return Records(
        {**grouped("student", arrays), **grouped("predictor", weights_of(predictor))},
        config={"examples": len(rows)},
        metrics=dict(report),
    )


def _merge(site: Site, parameters: Embed, student: HypersphereEncoder) -> float | None:
    """Merge the student with the one that this site ended its last round with."""
    previous = kept_before(site, parameters.study, "student", parameters.round)
    if previous is None:
        return None
    local = {name: torch.from_numpy(np.array(a)) for name, a in previous.arrays.items()}
    merged, scale = fedema_merge(local, student.state_dict(), previous.config["scale"])
    student.load_state_dict(merged)
    return scale


def cluster(site: Site, parameters: Cluster, request: Records) -> Records:
    """Moments of the final embedding, or sums and counts under given centroids.

    The first call brings the student and embeds the pool; later calls bring centroids.
    """
    kept = site.study_artifact(parameters.study, "embedding")
    if "centroids" in request.arrays:
        embedding = torch.from_numpy(np.array(site.need(kept, "embedding").arrays["embedding"]))
        sums, counts = cluster_sums(embedding, received_centroids(request, embedding))
        return Records({"sums": sums.numpy(), "counts": counts.numpy()})
    arrays = _embedding(site, parameters, request)
    site.store.put(kept, Records(arrays))
    embedding = torch.from_numpy(np.array(arrays["embedding"]))
    total, second, count = moments(embedding)
    return Records(
        {"sum": total.numpy(), "second": second.numpy()},
        config={"examples": count},
        metrics=dict(collapse_statistics(embedding)),
    )


def received_centroids(request: Records, embedding: Tensor) -> Tensor:
    """Return the centroids (k, d) of a request, for vectors (N, d): k unit vectors, 2 to 64.

    Raises
    ------
    ParameterError
        There are none, or they do not fit the vectors.
    """
    centroids = request.arrays.get("centroids")
    if centroids is None:
        raise ParameterError("this action needs the centroids; cluster first")
    fit = (
        centroids.dtype.kind == "f"
        and centroids.ndim == 2
        and centroids.shape[1] == embedding.shape[1]
    )
    if not fit or not np.isfinite(centroids).all():
        raise ParameterError("the centroids do not fit this site's embedding; cluster again")
    if not 2 <= len(centroids) <= MAX_CLUSTERS:
        raise ParameterError(f"{len(centroids)} centroids; a site takes 2 to {MAX_CLUSTERS}")
    if np.any(np.abs(np.linalg.norm(centroids, axis=1) - 1) > UNIT_LENGTH_TOLERANCE):
        raise ParameterError("the centroids are not unit vectors; cluster again")
    return torch.from_numpy(np.array(centroids))


def _embedding(site: Site, parameters: Cluster, request: Records) -> dict[str, Array]:
    """Embed the pool, or find what the same student made of it before."""
    made_of = parameters.model_dump_json(exclude={"study"})
    facts = (version("sonofed"), made_of, request.digest(), site.snapshot)
    key = sha256(" ".join(facts).encode())
    before = site.store.get(f"embedding/{key}")
    if before is None:
        _, images = seen_by(
            parameters.classifier, site, "pool", parameters.bundle, parameters.image_size
        )
        student, _ = networks(site, parameters)
        load_weights(student, request.group("student"))
        embedding = embed(student, images)
        distance = _representativeness(site, parameters, student, images, embedding)
        before = Records({"embedding": embedding.numpy(), "representativeness": distance.numpy()})
        site.store.put(f"embedding/{key}", before)
        site.store.trim("embedding/")
    return before.arrays


def networks(site: Site, parameters: Encode) -> tuple[HypersphereEncoder, Predictor]:
    """Student and predictor as every site starts with them."""
    # Every site draws the same projector and predictor, so round 0 needs no broadcast.
    dimension = parameters.settings.dimension
    backbone = site.classifier(parameters.bundle, parameters.classifier)
    seed = derive_seed(parameters.seed, "projector")
    student = HypersphereEncoder(backbone, dimension, seed).to(site.device)
    return student, Predictor(dimension, seed).to(site.device)


def _redrawn(site: Site, parameters: Encode) -> Tensor:
    redrawn = reconstructions(site, parameters, parameters.reconstruction)
    return redrawn_as_seen_by(parameters.classifier, site, redrawn, parameters.bundle)


def _representativeness(
    site: Site, parameters: Cluster, student: HypersphereEncoder, images: Tensor, embedding: Tensor
) -> Tensor:
    if parameters.pairs == "reconstruction":
        return representativeness(embedding, embed(student, _redrawn(site, parameters)))
    path = f"source/{parameters.classifier}.safetensors"
    centroids = from_bytes(site.blob(parameters.bundle, path)).arrays.get("centroids")
    if centroids is None:
        raise ParameterError("the bundle holds no source centroids; train the source again")
    features = site.source_features(parameters.bundle, parameters.classifier, images)
    return distance_to_centroids(features, torch.from_numpy(np.array(centroids)))
