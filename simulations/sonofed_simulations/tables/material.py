"""What the cells of a selection table are made from: start models, images, features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sonofed_common.contract.errors import ConfigurationError
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.tables.features import (
    Begin,
    HospitalImages,
    SiteFeatures,
    Start,
    features_origin,
    read_hospitals,
    read_start,
    site_features,
)
from sonofed_simulations.tables.lesions import LesionStart, lesions_origin, read_lesion_start
from sonofed_simulations.tables.settings import Chain, SelectionTable, SplitName


@dataclass(frozen=True)
class Material:
    """Start models and images of one table.

    Attributes
    ----------
    table : SelectionTable
        What is compared.
    laboratory : Laboratory
        Its folder gets the source, the features and the cells.
    start : Start
        The source's classifier.
    lesion : LesionStart or None
        What two views of an image need; None where the table has no such rows.
    hospitals : tuple of HospitalImages
        All labelled images.
    """

    table: SelectionTable
    laboratory: Laboratory
    start: Start
    lesion: LesionStart | None
    hospitals: tuple[HospitalImages, ...]

    @classmethod
    def prepare(cls, table: SelectionTable, laboratory: Laboratory) -> Material:
        """Train the source's models unless that is done, and decode the hospitals' images."""
        scenario = laboratory.scenario
        with laboratory.alone():
            start = read_start(laboratory.prepare_source(), scenario.study.classifiers[0])
            lesion = None
            if table.lesions is not None:
                lesion = read_lesion_start(laboratory, start, table.lesions)
            hospitals = tuple(read_hospitals(laboratory, scenario.source.image_size))
        return cls(table, laboratory, start, lesion, hospitals)

    @property
    def cells(self) -> Path:
        """Folder of the cells."""
        return self.laboratory.root / "cells"

    def begin(self, two_views: bool) -> Begin:
        """Return the head that cells of one or of two views start from."""
        return self._lesion.begin() if two_views else self.start.begin()

    def origins(self, chain: Chain) -> list[dict[str, Any]]:
        """What the features of a chain are made of, a site each."""
        whole = [features_origin(self.start, h, self.table, chain.split) for h in self.hospitals]
        return [lesions_origin(self._lesion, o) for o in whole] if chain.two_views else whole

    def sites(self, split: SplitName, two_views: bool) -> list[SiteFeatures]:
        """Return the features of all sites, from the files that keep them or extracted now."""
        folder, events = self.laboratory.root / "features" / str(split), self.laboratory.events
        found = []
        # Another shard may be extracting the same ones.
        with self.laboratory.alone():
            for hospital in self.hospitals:
                path = folder / f"{hospital.name}.safetensors"
                site = site_features(self.start, hospital, self.table, split, path, events)
                if two_views:
                    whole = features_origin(self.start, hospital, self.table, split)
                    origin = lesions_origin(self._lesion, whole)
                    path = folder / f"{hospital.name}-lesions.safetensors"
                    site = self._lesion.features(
                        site, hospital, self.table, split, path, origin, events
                    )
                found.append(site)
        return found

    @property
    def _lesion(self) -> LesionStart:
        if self.lesion is None:
            raise ConfigurationError("this table has no two views; give it a section 'lesions'")
        return self.lesion
