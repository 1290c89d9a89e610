"""Read what the report shows of each site out of the simulated sites' stores."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sonofed_client.adaptation.reconstruction import quality, reconstruct
from sonofed_client.adaptation.scoring import uncertainty
from sonofed_client.enclave.handlers.reconstruction import quality_classifier, reconstructions
from sonofed_client.enclave.handlers.selection import selected
from sonofed_client.enclave.site import Site
from sonofed_client.enclave.views import redrawn_as_seen_by, seen_by
from sonofed_client.settings import read_site
from sonofed_common.contract.actions import Encode
from sonofed_common.contract.results import ReconstructionQuality
from sonofed_common.contract.study import Study
from sonofed_common.data.lesions import with_lesions
from sonofed_common.models.classifiers import sees_lesions
from sonofed_common.runtime import derive_seed
from sonofed_server.source.data import boxes_of, lesions_beside, load_source
from sonofed_server.study.workspace import StudyState, Workspace, identity_of
from sonofed_simulations.report.view import ScoredView, SiteView, SourceView
from sonofed_simulations.scenarios.scenario import Scenario


def site_views(
    workspace: Workspace, study: Study, bundle: str, sites: list[Path]
) -> list[SiteView]:
    """Assemble the views of a finished study's sites; none where it did not score its images."""
    if study.selection.strategy == "random" or "select" not in study.phases:
        return []
    centroids = None
    if study.selection.strategy == "dual_score":
        state = StudyState.load(workspace.checkpoint, identity_of(study, bundle))
        centroids = torch.from_numpy(np.array(state.arrays["centroids"]))
    parameters = _parameters(study, bundle)
    return [_view(Site(read_site(path)), study, parameters, centroids) for path in sites]


def source_view(
    scenario: Scenario, data: Path, sites: list[Path], study: Study, bundle: str
) -> SourceView:
    """Features of the source's training images under the shipped classifier."""
    site = Site(read_site(sites[0]))
    pool, classifier = load_source(scenario.source, data).pool, study.classifiers[0]
    images = (lesions_beside(pool) if sees_lesions(classifier) else pool).images
    return SourceView(site.source_features(bundle, classifier, images).numpy())


def source_quality(
    scenario: Scenario, data: Path, sites: list[Path], study: Study, bundle: str
) -> ReconstructionQuality:
    """How well held-out source images are redrawn: what the sites' quality is measured against."""
    site = Site(read_site(sites[0]))
    test = load_source(scenario.source, data).test
    images = test.images
    seeds = [derive_seed(bundle, number) for number in range(len(images))]
    redrawn = reconstruct(
        site.diffusion(bundle), images.to(site.device), study.reconstruction, seeds
    )
    # As the sites choose it: their numbers stand beside this one.
    name = quality_classifier(site, bundle)
    shown = [images, redrawn]
    if sees_lesions(name):
        shown = [lesions_beside(test).images, with_lesions(redrawn, redrawn, boxes_of(test))]
    features = (site.source_features(bundle, name, seen) for seen in shown)
    return ReconstructionQuality.model_validate(quality(images, redrawn, *features))


def _parameters(study: Study, bundle: str) -> Encode:
    return Encode(
        study=study.name,
        seed=study.seed,
        bundle=bundle,
        image_size=study.image_size,
        classifier=study.classifiers[0],
        pairs=study.pairs,
        settings=study.embedding,
        reconstruction=study.reconstruction,
    )


def _view(site: Site, study: Study, parameters: Encode, centroids: Tensor | None) -> SiteView:
    rows, images = site.images("pool", study.image_size)
    labels = [row.label for row in rows if row.label is not None]
    redrawn = None
    if "reconstruct" in study.phases:
        redrawn = reconstructions(site, parameters, study.reconstruction)
    chosen = set(selected(site, study.name)[-1])
    bundle, name = parameters.bundle, parameters.classifier
    _, seen = seen_by(name, site, "pool", bundle, study.image_size)
    features = partial(site.source_features, bundle, name)
    view = SiteView(
        name=site.settings.name,
        images=_pictures(images),
        reconstructions=None if redrawn is None else _pictures(redrawn),
        features=features(seen).numpy(),
        reconstruction_features=(
            None
            if redrawn is None
            else features(redrawn_as_seen_by(name, site, redrawn, bundle)).numpy()
        ),
        selected=np.array([row.id in chosen for row in rows]),
        labels=np.array(labels) if len(labels) == len(rows) else None,
    )
    if centroids is None:
        return view
    kept = site.need(site.study_artifact(study.name, "embedding"), "embedding").arrays
    embedding = torch.from_numpy(np.array(kept["embedding"]))
    return ScoredView(
        **vars(view),
        embeddings=embedding.numpy(),
        uncertainty=uncertainty(embedding, centroids, study.selection.uncertainty).numpy(),
        representativeness=np.array(kept["representativeness"]),
    )


def _pictures(images: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return (images[:, 0] * 255).round().to(torch.uint8).numpy()
