"""Actions: everything a coordinator can ask of a site, with the parameters each one takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from sonofed_common.contract.configuration import Model
from sonofed_common.contract.errors import ConfigurationError, ParameterError, UnknownActionError
from sonofed_common.contract.records import Records
from sonofed_common.contract.study import Clustering, Embedding, Finetuning, Reconstruction, Selection
from sonofed_common.contract.configuration import validate

Column = Literal["uncertainty", "representativeness", "informativeness", "identity"]


class Parameters(Model):
    """What every action carries."""

    study: str = Field(description="study name")
    seed: int = Field(ge=0, description="study seed")
    image_size: int = Field(default=128, ge=16, le=1024)


class Describe(Parameters):
    """Versions, device and rounded counts of a site."""

    study_digest: str


class Missing(Parameters):
    """Which blobs of a bundle a site lacks. The manifest travels as the array ``manifest``."""


class Install(Parameters):
    """Install a signed bundle. Arrays: ``manifest``, ``signature`` and ``blobs/<sha256>`` (uint8)."""


class Reconstruct(Parameters):
    """Advance the site's reconstruction for a slice of time; poll until ``state`` is ``done``."""

    bundle: str
    settings: Reconstruction
    slice_seconds: float = Field(default=10.0, gt=0)


class Embed(Parameters):
    """One round of hypersphere contrastive learning. Arrays: ``student/...``, absent at round 0."""

    bundle: str
    classifier: str
    round: int = Field(ge=0)
    pairs: Literal["reconstruction", "augmentation"]
    settings: Embedding
    reconstruction: Reconstruction


class Cluster(Parameters):
    """Per-cluster sums and counts. Arrays: ``student/...`` in the first call, ``centroids`` (k, d)."""

    bundle: str
    classifier: str
    pairs: Literal["reconstruction", "augmentation"]
    settings: Clustering
    dimension: int
    reconstruction: Reconstruction


class Score(Parameters):
    """Score the pool against final centroids and remember it under the study. Arrays: ``centroids``."""

    settings: Selection


class Histogram(Parameters):
    """Count the pool's scores in bins. Arrays: ``edges`` (m, 2) uint64 intervals [low, high)."""

    column: Column
    split: int = Field(ge=1, le=65536, description="equal parts per interval")


class Select(Parameters):
    """Map scores to global ranks or mark the selection."""

    settings: Selection


class Annotations(Parameters):
    """How many of the selected images are labelled."""


class TrainClassifier(Parameters):
    """One round of fine-tuning. Arrays: ``weights/...``."""

    bundle: str
    classifier: str
    round: int = Field(ge=0)
    budget: int = Field(ge=0, description="index into the study's budgets")
    settings: Finetuning


class EvaluateClassifier(Parameters):
    """Test a classifier on the site's own test images. Arrays: ``weights/...``, absent for the source's."""

    bundle: str
    classifier: str
    batch_norm: Literal["site", "global"]
    replicates: int = Field(default=2000, ge=0, description="bootstrap replicates of the intervals")


