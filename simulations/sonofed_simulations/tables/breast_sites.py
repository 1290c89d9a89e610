"""The breast sets as sites of a table of arms: images, patient-level splits and their facts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sonofed_common.contract.bundle import DataProvenance
from sonofed_common.contract.errors import DataMissingError
from sonofed_common.data.images import load_images
from sonofed_common.data.readers import read
from sonofed_common.data.sample import Sample
from sonofed_common.runtime import derive_seed
from sonofed_server.source.data import Part, SourceSet, provenance_of
from sonofed_server.source.settings import SourceData
from sonofed_simulations.statistics import Split, check_no_leak, split_by_group
from sonofed_simulations.tables.arms import Array
from sonofed_simulations.tables.hospitals import check_classes
from sonofed_simulations.tables.manifest import split_facts

SITES = {
    "BUSI": SourceData(kind="busi", path=Path("Dataset_BUSI_with_GT")),
    "BrEaST": SourceData(kind="breast", path=Path("BrEaST")),
    "BUS-BRA Logiq 7": SourceData(kind="busbra", path=Path("BUSBRA"), devices=("GE Logiq 7",)),
    "BUS-BRA Logiq 5": SourceData(kind="busbra", path=Path("BUSBRA"), devices=("GE Logiq 5",)),
    "BUS-BRA Aplio": SourceData(kind="busbra", path=Path("BUSBRA"), devices=("Toshiba Aplio",)),
}
"""Data sets by the names that the pages give their sites."""


@dataclass(frozen=True)
class Site:
    """One site's benign and malignant images; normals are dropped.

    Attributes
    ----------
    name : str
        As the pages call it.
    whole : Part
        All its images.
    provenance : DataProvenance
        Counts and digest.
    """

    name: str
    whole: Part
    provenance: DataProvenance

    def split(self, fraction: float, seed: int) -> SourceSet:
        """Split by patient, or group of duplicates; ``fraction`` is the test part's share."""
        samples = self.whole.samples
        split = split_by_group(samples, fraction, derive_seed(seed, "split", self.name))
        check_no_leak(split)
        check_classes(split, self.name)
        return SourceSet(self._part(split.pool), self._part(split.test), self.provenance)

    def _part(self, samples: tuple[Sample, ...]) -> Part:
        places = {sample.name: place for place, sample in enumerate(self.whole.samples)}
        chosen = torch.tensor([places[sample.name] for sample in samples])
        return Part(samples, self.whole.images[chosen], self.whole.labels[chosen])


def read_site(name: str, wanted: SourceData, data: Path, image_size: int) -> Site:
    """Read one site's set below the data folder, in images of ``image_size`` px.

    Raises
    ------
    DataMissingError
        The set is not there.
    """
    samples = [
        sample
        for sample in read(wanted.kind, data / wanted.path).samples
        if sample.label in (0, 1)
        and (not wanted.devices or sample.device.startswith(tuple(wanted.devices)))
    ]
    if not samples:
        raise DataMissingError(f"site {name} has no benign or malignant image; copy its set anew")
    images, kept, _ = load_images(samples, image_size)
    labels = torch.tensor([sample.label for sample in kept])
    return Site(name, Part(tuple(kept), images, labels), provenance_of(wanted, kept))


def parts_facts(parts: SourceSet) -> dict[str, Any]:
    """Counts and the digest of the test patients, for origins."""
    return split_facts(Split(parts.pool.samples, parts.test.samples))


def patients(part: Part) -> Array:
    """Patient, or group of duplicates, of each image (N,)."""
    return np.array([sample.group for sample in part.samples])
