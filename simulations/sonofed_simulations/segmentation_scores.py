"""Scores of a comparison's segmenters on disk, and what they were made of."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from sonofed_client.enclave.handlers.ensemble import predict_site
from sonofed_client.enclave.site import Site
from sonofed_client.settings import read_site
from sonofed_common.contract.actions import EvaluateSegmenter
from sonofed_common.contract.records import Array, Records, from_bytes, to_bytes
from sonofed_common.contract.study import Study
from sonofed_common.runtime import write_atomically
from sonofed_common.segmentation_metrics import ImageScores
from sonofed_simulations.segmentation_rows import MaskRow

MEASURES = tuple(field.name for field in fields(ImageScores))
MARK = "origin.json"
"""Says what a folder's scores are made of."""


@dataclass(frozen=True)
class MaskScores:
    """Scores of one row under one seed.

    Attributes
    ----------
    patients : dict of str to list of str (N,)
        Of each site's test images.
    scores : dict of str to ImageScores
        Of the same images.
    trained : dict of str to int
        Labelled images of each site that the row was trained on, where there are any.
    """

    patients: dict[str, list[str]]
    scores: dict[str, ImageScores]
    trained: dict[str, int] = field(default_factory=dict)


def scores_file(folder: Path, what: str) -> Path:
    """Where a variant's folder keeps the scores of one of its rows."""
    return folder / f"{what.replace(' ', '-')}.safetensors"


def mark_of(folder: Path) -> str:
    """What a folder's scores are made of; empty where it is not finished."""
    path = folder / MARK
    return path.read_text(encoding="utf-8") if path.exists() else ""


def begin(folder: Path, origin: str) -> None:
    """Empty a folder whose files are of another origin."""
    if mark_of(folder) != origin:
        shutil.rmtree(folder, ignore_errors=True)
        write_atomically(folder / MARK, origin.encode())


def score_row(
    study: Study,
    row: MaskRow,
    sites: list[Path],
    path: Path,
    trained: Mapping[str, int] | None = None,
) -> None:
    """Segment all sites' test images by one row, and write its `MaskScores`."""
    parameters = EvaluateSegmenter(
        study=study.name,
        seed=study.seed,
        bundle=row.bundle,
        image_size=study.image_size,
        branches=row.branches,
        infusion=row.infusion,
        batch_norm=row.batch_norm,
    )
    arrays: dict[str, Array] = {}
    patients: dict[str, list[str]] = {}
    for settings in sites:
        site = Site(read_site(settings))
        name = site.settings.name
        parts = list(predict_site(site, parameters, Records(row.arrays)))
        scores = ImageScores.join([part.scores() for part in parts])
        patients[name] = [image.group for part in parts for image in part.rows]
        arrays |= {f"{name}/{measure}": getattr(scores, measure) for measure in MEASURES}
    facts = {"patients": patients, "trained": dict(trained or {})}
    write_atomically(path, to_bytes(Records(arrays, facts)))


def read_scores(path: Path) -> MaskScores:
    """Read what `score_row` wrote."""
    records = from_bytes(path.read_bytes())
    patients = records.config["patients"]
    scores = {
        site: ImageScores(*(np.asarray(records.arrays[f"{site}/{name}"]) for name in MEASURES))
        for site in patients
    }
    return MaskScores(patients, scores, records.config["trained"])
