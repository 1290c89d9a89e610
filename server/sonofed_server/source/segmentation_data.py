"""The source images with masks, split by patient."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sonofed_common.contract.bundle import DataProvenance
from sonofed_common.contract.errors import ConfigurationError, DataMissingError, OneClassError
from sonofed_common.contract.names import CLASSES
from sonofed_common.data.images import decodable_masks, load_images, load_masks
from sonofed_common.data.sample import Reading, Sample
from sonofed_common.runtime import SILENT, Events
from sonofed_server.source.data import SourceSet, provenance_of, read_data, split_source
from sonofed_server.source.settings import SourceSettings


@dataclass(frozen=True)
class SegmentationPart:
    """One side of the split, with masks.

    Attributes
    ----------
    samples : tuple of Sample
        In the order of the images.
    images : Tensor
        (N, 1, S, S) float32 in [0, 1].
    masks : Tensor
        (N, 1, S, S) uint8, 0 background.
    """

    samples: tuple[Sample, ...]
    images: Tensor
    masks: Tensor


@dataclass(frozen=True)
class SegmentationSet:
    """Images with masks to train on, and held-out ones of other patients.

    Attributes
    ----------
    pool, test : SegmentationPart
        No patient or group of duplicates is in both.
    provenance : DataProvenance
        Counts and digest of both parts together, masks included.
    """

    pool: SegmentationPart
    test: SegmentationPart
    provenance: DataProvenance


def load_segmentation(
    settings: SourceSettings, root: Path, events: Events = SILENT, reading: Reading | None = None
) -> SegmentationSet:
    """Read, filter, split and load the images that have masks; no class label is needed.

    Images labelled normal are left out, as the sites leave them out: a segmenter that learns their
    empty masks misses lesions.

    Parameters
    ----------
    settings, root, events, reading
        See `load_source`.

    Raises
    ------
    DataMissingError
        The set is not there, or no image has a mask that decodes.
    OneClassError
        The masks of the training or of the held-out part are all background.
    ConfigurationError
        ``settings.segmentation`` is absent or counts fewer classes than the masks hold.
    """
    if settings.segmentation is None:
        raise ConfigurationError("the source settings have no section 'segmentation'; add one")
    reading = reading or read_data(settings, root, events)
    lesions = [s for s in reading.samples if s.label is None or s.label in range(len(CLASSES))]
    samples, without = decodable_masks(lesions)
    if not samples:
        raise DataMissingError("the source data holds no image with a mask; add masks to some")
    split = split_source(samples, settings)
    pool, pool_skipped = _load_with_masks(split.pool, settings.image_size)
    test, test_skipped = _load_with_masks(split.test, settings.image_size)
    for part, name in ((pool, "training"), (test, "held-out")):
        _check_masks(part, name, settings.segmentation.classes)
    events.emit(
        "source masks",
        training=len(pool.samples),
        held_out=len(test.samples),
        skipped=len(reading.skipped) + len(without) + pool_skipped + test_skipped,
    )
    provenance = provenance_of(settings.data, pool.samples + test.samples, masks=True)
    return SegmentationSet(pool, test, provenance)


def united_provenance(
    settings: SourceSettings, source: SourceSet | None, segmentation: SegmentationSet | None
) -> DataProvenance:
    """Provenance of weights from one set or from both; an image in both counts once."""
    if segmentation is None and source is not None:
        return source.provenance
    sets = [s for s in (source, segmentation) if s is not None]
    samples = {x.name: x for s in sets for part in (s.pool, s.test) for x in part.samples}
    united = provenance_of(settings.data, tuple(samples.values()))
    digests = " ".join(s.provenance.digest for s in sets)
    return united.model_copy(update={"digest": hashlib.sha256(digests.encode()).hexdigest()})


def _load_with_masks(samples: Sequence[Sample], image_size: int) -> tuple[SegmentationPart, int]:
    images, kept, skipped = load_images(samples, image_size)
    return SegmentationPart(tuple(kept), images, load_masks(kept, image_size)), len(skipped)


def _check_masks(part: SegmentationPart, name: str, classes: int) -> None:
    largest = int(part.masks.max()) if len(part.masks) else 0
    if largest == 0:
        raise OneClassError(
            f"the masks of the {name} part of the source data are all background; "
            "add images with something to segment, of more patients"
        )
    if largest >= classes:
        raise ConfigurationError(
            f"the masks of the source data hold class {largest}; set segmentation.classes to "
            f"{largest + 1}, background included"
        )
