"""The labelled source images, split by patient."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sonofed_common.contract.bundle import DataProvenance
from sonofed_common.contract.errors import DataMissingError, OneClassError
from sonofed_common.contract.names import CLASSES
from sonofed_common.data.images import load_images, load_masks
from sonofed_common.data.lesions import ENLARGED, lesion_boxes, with_lesions
from sonofed_common.data.readers import read
from sonofed_common.data.sample import Reading, Sample
from sonofed_common.data.splits import Split, check_no_leak, split_by_group
from sonofed_common.runtime import SILENT, Events, derive_seed
from sonofed_common.security import sha256_file
from sonofed_common.synthesis.synthetic import Labelled
from sonofed_server.source.settings import SourceData, SourceSettings


@dataclass(frozen=True)
class Part:
    """One side of the split.

    Attributes
    ----------
    samples : tuple of Sample
        In the order of the images.
    images : Tensor
        (N, 1, S, S) float32 in [0, 1]; (N, 2, S, S) with lesions.
    labels : Tensor
        (N,) int64, 0 benign, 1 malignant.
    """

    samples: tuple[Sample, ...]
    images: Tensor
    labels: Tensor

    @property
    def labelled(self) -> Labelled:
        """Without the files that they come from."""
        return Labelled(self.images, self.labels, [sample.group for sample in self.samples])


@dataclass(frozen=True)
class SourceSet:
    """Labelled images to train on, and held-out ones of other patients.

    Attributes
    ----------
    pool, test : Part
        No patient or group of duplicates is in both.
    provenance : DataProvenance
        Counts and digest of both parts together.
    """

    pool: Part
    test: Part
    provenance: DataProvenance


def read_data(settings: SourceSettings, root: Path, events: Events = SILENT) -> Reading:
    """Read the source data without decoding its images, and keep the wanted devices.

    Raises
    ------
    DataMissingError
        The set is not there, or holds no image of the wanted devices.
    """
    data = settings.data
    events.progress("read source data", 0, 1)
    reading = read(data.kind, root / data.path)
    events.progress("read source data", 1, 1)
    wanted = [
        sample
        for sample in reading.samples
        if not data.devices or sample.device.startswith(tuple(data.devices))
    ]
    if not wanted:
        known = ", ".join(sorted({sample.device for sample in reading.samples if sample.device}))
        raise DataMissingError(
            f"the source data holds no image of the devices {', '.join(data.devices)}; "
            f"its devices are: {known or 'not named'}"
        )
    return Reading(tuple(wanted), reading.skipped)


def load_source(
    settings: SourceSettings, root: Path, events: Events = SILENT, reading: Reading | None = None
) -> SourceSet:
    """Read, filter, split and load the images labelled benign or malignant.

    Parameters
    ----------
    settings : SourceSettings
        Names the reader and the path under ``root``.
    root : Path
        Data folder.
    events : Events
        Gets the counts.
    reading : Reading, optional
        What `read_data` returned, to read once where it is needed twice.

    Raises
    ------
    DataMissingError
        The set is not there, or none of its images is benign or malignant.
    OneClassError
        The training or the held-out part holds one class only.
    """
    reading = reading or read_data(settings, root, events)
    samples = [sample for sample in reading.samples if sample.label in range(len(CLASSES))]
    if not samples:
        raise DataMissingError(
            "the source data holds no image labelled benign or malignant; label some first"
        )
    split = split_source(samples, settings)
    pool, pool_skipped = _load(split.pool, settings.image_size)
    test, test_skipped = _load(split.test, settings.image_size)
    for part, name in ((pool, "training"), (test, "held-out")):
        _check_classes(part, name)
    events.emit(
        "source data",
        training=len(pool.samples),
        held_out=len(test.samples),
        skipped=len(reading.skipped) + pool_skipped + test_skipped,
    )
    return SourceSet(pool, test, provenance_of(settings.data, pool.samples + test.samples))


def split_source(samples: Sequence[Sample], settings: SourceSettings) -> Split:
    """Split images by patient into those to train on and held-out ones."""
    split = split_by_group(
        samples, settings.data.test_fraction, derive_seed(settings.seed, "split")
    )
    check_no_leak(split)
    return split


def lesions_beside(part: Part) -> Part:
    """Put the lesion beside each image, cut out by its own mask.

    Raises
    ------
    DataUnreadableError
        A mask cannot be decoded.
    """
    larger, _, _ = load_images(part.samples, ENLARGED * part.images.shape[-1])
    images = with_lesions(part.images, larger, boxes_of(part))
    return Part(part.samples, images, part.labels)


def boxes_of(part: Part) -> Tensor:
    """Squares (N, 3) around the lesions of images by their own masks; the whole without a mask."""
    masks = load_masks(part.samples, part.images.shape[-1])
    return lesion_boxes((masks[:, 0] > 0).float())


def _load(samples: Sequence[Sample], image_size: int) -> tuple[Part, int]:
    images, kept, skipped = load_images(samples, image_size)
    labels = torch.tensor([sample.label for sample in kept], dtype=torch.long)
    return Part(tuple(kept), images, labels), len(skipped)


def _check_classes(part: Part, name: str) -> None:
    counts = torch.bincount(part.labels, minlength=len(CLASSES)).tolist()
    if absent := [label for label, count in zip(CLASSES, counts, strict=True) if not count]:
        raise OneClassError(
            f"the {name} part of the source data has {len(part.samples)} images and no "
            f"{' or '.join(absent)} one; add labelled images of both classes and of more patients"
        )


def provenance_of(
    data: SourceData, samples: Sequence[Sample], masks: bool = False
) -> DataProvenance:
    """Count images and digest their content, labels and groups; masks where they are used."""
    digest = hashlib.sha256()
    for sample in sorted(samples, key=lambda s: s.name):
        files = (sample.image, *(sample.masks if masks else ()))
        digests = " ".join(sha256_file(file) for file in files)
        digest.update(f"{digests} {sample.label} {sample.group}\n".encode())
    return DataProvenance(
        name=data.kind,
        digest=digest.hexdigest(),
        images=len(samples),
        groups=len({sample.group for sample in samples}),
    )
