"""Read what the report shows of each site's masks out of the simulated sites' stores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sonofed_client.enclave.handlers.ensemble import Prediction, predict_site
from sonofed_client.enclave.site import Site
from sonofed_client.settings import read_site
from sonofed_common.contract.actions import EvaluateSegmenter
from sonofed_common.contract.records import Array, Records
from sonofed_common.contract.study import Study
from sonofed_common.contract.study_segmentation import PLAIN_MEAN, Infusion
from sonofed_common.models.infusion import confidence
from sonofed_common.segmentation_metrics import image_dice
from sonofed_server.phases.branches import Origin, joined
from sonofed_server.study.workspace import StudyState, Workspace, identity_of
from sonofed_simulations.report.view import SegmentationView


@dataclass(frozen=True)
class _Model:
    """What segments: branches of a bundle and how they are infused."""

    bundle: str
    branches: tuple[str, ...]
    infusion: Infusion
    arrays: dict[str, Array]


def segmentation_views(
    workspace: Workspace, study: Study, bundle: str, sites: list[Path]
) -> list[SegmentationView]:
    """Segment the test images of a finished study's sites, as its evaluation did.

    Parameters
    ----------
    workspace : Workspace
        Of the study.
    study : Study
        What was run.
    bundle : str
        Id of the source bundle.
    sites : list of Path
        Settings files of the sites that have test masks.
    """
    state = StudyState.load(workspace.checkpoint, identity_of(study, bundle))
    result = _result(state, study, bundle)
    return [_view(Site(read_site(path)), study, bundle, result) for path in sites]


def _result(state: StudyState, study: Study, bundle: str) -> _Model:
    """Return the last stage that the study has."""
    origin: Origin = "adapted" if "adapted" in state.facts else "branches"
    known = state.facts.get(origin, {"bundle": bundle, "names": ["source"]})
    return _Model(known["bundle"], tuple(known["names"]), *joined(study, state, origin))


def _view(site: Site, study: Study, bundle: str, result: _Model) -> SegmentationView:
    before = _predict(site, study, _Model(bundle, ("source",), PLAIN_MEAN, {}), "global")
    after = _predict(site, study, result, study.segmenter_batch_norm)
    return SegmentationView(
        name=site.settings.name,
        images=np.concatenate([(p.images[:, 0] * 255).round().byte().numpy() for p in after]),
        truth=np.concatenate([p.masks[:, 0].numpy() for p in after]),
        source=_masks(before),
        ours=_masks(after),
        confidence=np.concatenate([confidence(p.probabilities).numpy() for p in after]),
        weights=np.concatenate([p.weights.numpy() for p in after], axis=1),
        branches=result.branches,
        dice_source=np.concatenate([image_dice(p.probabilities, p.masks) for p in before]),
        dice_ours=np.concatenate([image_dice(p.probabilities, p.masks) for p in after]),
    )


def _predict(site: Site, study: Study, model: _Model, batch_norm: str) -> list[Prediction]:
    parameters = EvaluateSegmenter.model_validate(
        {
            "study": study.name,
            "seed": study.seed,
            "bundle": model.bundle,
            "image_size": study.image_size,
            "branches": model.branches,
            "infusion": model.infusion,
            "batch_norm": batch_norm,
        }
    )
    return list(predict_site(site, parameters, Records(model.arrays)))


def _masks(predictions: list[Prediction]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.concatenate([p.probabilities.argmax(1).byte().numpy() for p in predictions])
