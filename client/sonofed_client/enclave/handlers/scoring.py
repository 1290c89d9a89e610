"""Score the pool by the study's strategy; nothing of it leaves but the number of images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sonofed_client.adaptation.entropy import certainty
from sonofed_client.adaptation.scoring import uncertainty
from sonofed_client.adaptation.typiclust import places
from sonofed_client.enclave.handlers.classification import starting_model
from sonofed_client.enclave.handlers.embedding import received_centroids
from sonofed_client.enclave.labelling import admit_scores
from sonofed_client.enclave.site import FEATURE_BATCH, Site
from sonofed_client.enclave.views import seen_by
from sonofed_common.contract.actions import Score
from sonofed_common.contract.records import Array, Records
from sonofed_common.contract.selection import budget_count
from sonofed_common.runtime import derive_seed


def score(site: Site, parameters: Score, request: Records) -> Records:
    """Score every image of the pool, and forget what earlier scores had selected."""
    settings = parameters.selection
    facts: dict[str, Any] = {"settings": settings.model_dump(mode="json"), "seed": parameters.seed}
    made = Records(_scores(site, parameters, request), facts)
    admit_scores(site, parameters.study, made)
    for earlier in ("ranks", "selected"):
        site.store.remove(site.study_artifact(parameters.study, earlier))
    site.store.put(site.study_artifact(parameters.study, "scores"), made)
    return Records(config={"examples": len(site.store.images("pool"))})


def _scores(site: Site, parameters: Score, request: Records) -> dict[str, Array]:
    """Arrays (n,) as `PoolSelector` takes them."""
    settings = parameters.selection
    if settings.strategy == "dual_score":
        kept = site.need(site.study_artifact(parameters.study, "embedding"), "embedding").arrays
        embedding = torch.from_numpy(np.array(kept["embedding"]))
        centroids = received_centroids(request, embedding)
        return {
            "uncertainty": uncertainty(embedding, centroids, settings.uncertainty).numpy(),
            "representativeness": np.array(kept["representativeness"]),
        }
    if settings.strategy == "entropy":
        _, logits = _seen_by_classifier(site, parameters, request)
        return {"informativeness": certainty(logits.numpy())}
    if settings.strategy == "typiclust":
        features, _ = _seen_by_classifier(site, parameters, request)
        unit = torch.nn.functional.normalize(features, dim=1).numpy()
        sizes = [budget_count(share, len(unit)) for share in settings.budgets]
        seed = derive_seed(parameters.seed, settings.draw, site.settings.name, "typiclust")
        return {"informativeness": places(unit, sizes, seed)}
    return {}


def _seen_by_classifier(site: Site, parameters: Score, request: Records) -> tuple[Tensor, Tensor]:
    """Features (n, F) and logits (n, C) of the pool under the classifier that a study starts with.

    The one that `bn_adapted` tests, or with ``global`` statistics `source`.
    """
    _, images = seen_by(
        parameters.classifier, site, "pool", parameters.bundle, parameters.image_size
    )
    model = starting_model(site, parameters, request, images, parameters.batch_norm).eval()
    batches = torch.split(images, FEATURE_BATCH)
    track = site.events.track(batches, "score", len(batches))
    with torch.inference_mode():
        features = torch.cat([model.features(batch.to(site.device)) for batch in track])
        return features.cpu(), model.head(features).cpu()
