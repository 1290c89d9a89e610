"""Features of a start model, extracted once a split and site and kept for all cells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sonofed_client.adaptation.spacing import BATCH_NORM_IMAGES, evenly_spaced
from sonofed_common.batch_norm import adapt_batch_norm
from sonofed_common.contract.records import Records, to_bytes
from sonofed_common.data.augmentation import Augmentation
from sonofed_common.models.classifiers import Classifier
from sonofed_common.runtime import Events, derive_seed, device, write_atomically
from sonofed_simulations.tables.hospitals import HospitalImages, places_of, split_of
from sonofed_simulations.tables.records import read_records
from sonofed_simulations.tables.settings import SelectionTable, SplitName
from sonofed_simulations.tables.start import Start

BATCH = 64
Array = NDArray[Any]


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
        Features that the plain test images are judged by.
    unmirrored : ndarray of float32 (M, F)
        Features of these images alone.
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
    unmirrored: Array
    unadapted: Array
    test_labels: Array
    test_groups: tuple[str, ...]


def features_origin(
    start: Start, hospital: HospitalImages, table: SelectionTable, name: SplitName
) -> dict[str, Any]:
    """What a site's features are made of: they are made anew when any of it changes."""
    return {
        **start.origin,
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
    kept = read_records(path, origin)
    if kept is not None:
        return _decode(hospital.name, kept)
    split = split_of(hospital, table, name)
    places = places_of(hospital, split)
    seen = start.seen(hospital, places[0], events)
    pool, test = (seen[part] for part in places)
    task = f"features {hospital.name}"
    events.progress(task, 0, table.views, split=str(name))
    model = start.model().to(device())
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
        "test": judged_features(model, test),
        "unadapted": unadapted,
        "test_labels": np.array([s.label for s in split.test], dtype=np.int64),
    }
    if model.views == 2:
        arrays["unmirrored"] = features_of(model, test)
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
        # One view is judged alone.
        arrays.get("unmirrored", arrays["test"]),
        arrays["unadapted"],
        arrays["test_labels"],
        tuple(records.config["groups"]),
    )


@torch.inference_mode()
def features_of(
    model: Classifier, images: Tensor, shown: Callable[[Tensor], Tensor] | None = None
) -> Array:
    """Features (N, F) of images (N, V, S, S), or of what is shown of them."""
    return _in_batches(model, model.features, images, shown or (lambda batch: batch))


@torch.inference_mode()
def judged_features(model: Classifier, images: Tensor) -> Array:
    """Features (N, F) that a prediction of images (N, V, S, S) is made of."""
    return _in_batches(model, model.judged, images, lambda batch: batch)


def _in_batches(
    model: Classifier,
    features: Callable[[Tensor], Tensor],
    images: Tensor,
    shown: Callable[[Tensor], Tensor],
) -> Array:
    where = next(model.parameters()).device
    parts = [features(shown(batch.to(where))).cpu().numpy() for batch in torch.split(images, BATCH)]
    return np.concatenate(parts).astype(np.float32)
