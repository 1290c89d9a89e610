"""Features of the start model, extracted once a split and site and kept for all cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load as load_safetensors
from torch import Tensor

from sonofed_client.adaptation.spacing import BATCH_NORM_IMAGES, evenly_spaced
from sonofed_common.batch_norm import adapt_batch_norm
from sonofed_common.contract.bundle import Bundle, DataProvenance
from sonofed_common.contract.errors import SiteEmptyError
from sonofed_common.contract.records import Records, from_bytes, to_bytes
from sonofed_common.data.augmentation import Augmentation
from sonofed_common.data.images import load_images
from sonofed_common.data.readers import read
from sonofed_common.data.sample import Sample
from sonofed_common.data.splits import Split, check_no_leak, folds_by_group
from sonofed_common.models.classifiers import Classifier, build_classifier
from sonofed_common.runtime import Events, derive_seed, write_atomically
from sonofed_server.source.data import provenance_of
from sonofed_server.source.settings import SourceData
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.tables.settings import SelectionTable, SplitName

BATCH = 64
Array = NDArray[Any]


@dataclass(frozen=True)
class Begin:
    """The head that every cell of one kind starts from, on features of F values.

    Attributes
    ----------
    head : mapping of str to Tensor
        State of the linear layer: ``weight`` (C, F) and ``bias`` (C,).
    dropped : float
        Share of the features that is dropped in training.
    centroids : ndarray of float32 (k, F)
        Unit vectors of the source's images; none where no strategy asks for them.
    """

    head: Mapping[str, Tensor]
    dropped: float
    centroids: Array


@dataclass(frozen=True)
class Start:
    """The source's classifier, as every cell starts from it.

    Attributes
    ----------
    bundle : str
        Id of the signed bundle.
    name : str
        The classifier.
    weights : dict of str to Tensor
        Its state.
    centroids : ndarray of float32 (k, F)
        Unit vectors of the source's images.
    threshold : float
        Of P(malignant), at a specificity of .90 on held-out source images.
    """

    bundle: str
    name: str
    weights: dict[str, Tensor]
    centroids: Array
    threshold: float

    def model(self) -> Classifier:
        """Build the classifier anew, in evaluation mode."""
        model = build_classifier(self.name, pretrained=False)
        model.load_state_dict(self.weights)
        return model.eval()

    def begin(self) -> Begin:
        """Return the head that cells start from."""
        model = self.model()
        return Begin(model.head.state_dict(), model.dropout.p, self.centroids)


@dataclass(frozen=True)
class HospitalImages:
    """A hospital's labelled images."""

    name: str
    samples: tuple[Sample, ...]
    images: Tensor
    provenance: DataProvenance


@dataclass(frozen=True)
class SiteFeatures:
    """What the cells of one split know of one site.

    Attributes
    ----------
    name : str
        The site.
    views : ndarray of float32 (K, N, F)
        Features of the pool's images, plain first, then augmented.
    labels : ndarray of int64 (N,)
        Their classes, which a cell sees of selected images only.
    test : ndarray of float32 (M, F)
        Features of the plain test images.
    unadapted : ndarray of float32 (M, F)
        The same with the source's normalisation statistics.
    test_labels : ndarray of int64 (M,)
    test_groups : tuple of str (M,)
        Patient of each test image.
    """

    name: str
    views: Array
    labels: Array
    test: Array
    unadapted: Array
    test_labels: Array
    test_groups: tuple[str, ...]


def read_start(bundle: Path, classifier: str) -> Start:
    """Read the start model from the source's bundle."""
    opened = Bundle.open(bundle)
    facts = opened.manifest.facts["classifiers"][classifier]
    statistics = from_bytes(opened.read(f"source/{classifier}.safetensors"))
    return Start(
        opened.id,
        classifier,
        load_safetensors(opened.read(f"classifiers/{classifier}.safetensors")),
        statistics.arrays["centroids"],
        facts["threshold_at_specificity_90"],
    )


def read_hospitals(laboratory: Laboratory, image_size: int) -> list[HospitalImages]:
    """Decode the images labelled benign or malignant of every hospital of the scenario.

    Raises
    ------
    DataMissingError
        A data set is not there.
    SiteEmptyError
        A hospital has no such image.
    """
    found = []
    hospitals = laboratory.scenario.hospitals
    for name in laboratory.events.track(hospitals, "hospitals", len(hospitals)):
        data = laboratory.site(name, 0)[0].data
        wanted = [
            sample
            for sample in read(data.kind, data.path).samples
            if sample.label in (0, 1)
            and (not data.devices or sample.device.startswith(tuple(data.devices)))
        ]
        images, samples, _ = load_images(wanted, image_size)
        if not samples:
            raise SiteEmptyError(f"hospital {name} has no image labelled benign or malignant")
        described = SourceData(kind=data.kind, path=data.path, devices=data.devices)
        provenance = provenance_of(described, samples)
        found.append(HospitalImages(name, tuple(samples), images, provenance))
    return found


def split_of(hospital: HospitalImages, table: SelectionTable, name: SplitName) -> Split:
    """Split a hospital's images into pool and test part of one fold."""
    split = folds_by_group(hospital.samples, table.folds, name.seed)[name.fold]
    check_no_leak(split)
    return split


def features_origin(
    start: Start, hospital: HospitalImages, table: SelectionTable, name: SplitName
) -> dict[str, Any]:
    """What a site's features are made of: they are made anew when any of it changes."""
    return {
        "bundle": start.bundle,
        "classifier": start.name,
        "data": hospital.provenance.digest,
        "image_size": hospital.images.shape[-1],
        "views": table.views,
        "folds": table.folds,
        "seed": name.seed,
        "fold": name.fold,
    }


def site_features(
    start: Start,
    hospital: HospitalImages,
    table: SelectionTable,
    name: SplitName,
    path: Path,
    events: Events,
) -> SiteFeatures:
    """Return a site's features, from the file that keeps them or extracted now.

    Notes
    -----
    Normalisation statistics are re-estimated on the pool's images alone, on as many as a study
    takes.
    """
    origin = features_origin(start, hospital, table, name)
    if path.exists():
        kept = from_bytes(path.read_bytes())
        if kept.config["origin"] == origin:
            return _decode(hospital.name, kept)
    split = split_of(hospital, table, name)
    places = {sample.name: n for n, sample in enumerate(hospital.samples)}
    pool, test = (
        hospital.images[[places[s.name] for s in part]] for part in (split.pool, split.test)
    )
    task = f"features {hospital.name}"
    events.progress(task, 0, table.views, split=str(name))
    model = start.model()
    unadapted = features_of(model, test)
    adapt_batch_norm(model, evenly_spaced(pool, BATCH_NORM_IMAGES))
    augmentation = Augmentation(derive_seed(name.seed, name.fold, hospital.name, "views"))
    views = []
    for view in range(table.views):
        views.append(features_of(model, pool, augmentation if view else None))
        events.progress(task, view + 1, table.views, split=str(name))
    arrays = {
        "views": np.stack(views),
        "labels": np.array([s.label for s in split.pool], dtype=np.int64),
        "test": features_of(model, test),
        "unadapted": unadapted,
        "test_labels": np.array([s.label for s in split.test], dtype=np.int64),
    }
    records = Records(arrays, {"origin": origin, "groups": [s.group for s in split.test]})
    write_atomically(path, to_bytes(records))
    return _decode(hospital.name, records)


def _decode(name: str, records: Records) -> SiteFeatures:
    arrays = records.arrays
    return SiteFeatures(
        name,
        arrays["views"],
        arrays["labels"],
        arrays["test"],
        arrays["unadapted"],
        arrays["test_labels"],
        tuple(records.config["groups"]),
    )


@torch.inference_mode()
def features_of(
    model: Classifier, images: Tensor, shown: Callable[[Tensor], Tensor] | None = None
) -> Array:
    """Features (N, F) of images (N, 1, S, S), or of what is shown of them."""
    parts = [
        model.features(batch if shown is None else shown(batch)).numpy()
        for batch in torch.split(images, BATCH)
    ]
    return np.concatenate(parts).astype(np.float32)
