"""The hospitals' labelled images, and their split into pool and test part."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sonofed_common.contract.bundle import DataProvenance
from sonofed_common.contract.errors import ConfigurationError, SiteEmptyError
from sonofed_common.data.images import load_images
from sonofed_common.data.readers import read
from sonofed_common.data.sample import Sample
from sonofed_server.source.data import provenance_of
from sonofed_server.source.settings import SourceData
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.statistics import Split, check_no_leak, folds_by_group
from sonofed_simulations.tables.settings import SelectionTable, SplitName


@dataclass(frozen=True)
class HospitalImages:
    """A hospital's labelled images (N, 1, S, S) in [0, 1]."""

    name: str
    samples: tuple[Sample, ...]
    images: Tensor
    provenance: DataProvenance


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
    """Split a hospital's images into pool and test part of one fold.

    Raises
    ------
    ConfigurationError
        The test part would hold one class alone, whose AUROC nobody can tell.
    """
    split = folds_by_group(hospital.samples, table.folds, name.seed)[name.fold]
    check_no_leak(split)
    check_classes(split, f"{hospital.name} in {name}")
    return split


def check_classes(split: Split, where: str) -> None:
    """Make sure that a test part holds both classes: of one alone nobody can tell an AUROC.

    Raises
    ------
    ConfigurationError
        It does not.
    """
    if len({sample.label for sample in split.test}) < 2:
        raise ConfigurationError(
            f"the test images of {where} are of one class; use fewer folds or a larger test part, "
            "or leave that site out"
        )


def places_of(hospital: HospitalImages, split: Split) -> tuple[list[int], list[int]]:
    """Where the images of pool and test part are among the hospital's."""
    places = {sample.name: n for n, sample in enumerate(hospital.samples)}
    pool, test = ([places[sample.name] for sample in part] for part in (split.pool, split.test))
    return pool, test
