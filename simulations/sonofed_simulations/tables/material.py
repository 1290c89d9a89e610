"""What the cells of a selection table are made from: start models, images, features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sonofed_common.models.classifiers import sees_lesions
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.tables.features import SiteFeatures, features_origin, site_features
from sonofed_simulations.tables.hospitals import HospitalImages, read_hospitals, split_of
from sonofed_simulations.tables.settings import Chain, SelectionTable, SplitName
from sonofed_simulations.tables.start import Start, read_start


@dataclass(frozen=True)
class Material:
    """Start models and images of one table.

    Attributes
    ----------
    table : SelectionTable
        What is compared.
    laboratory : Laboratory
        Its folder gets the source, the features and the cells.
    starts : mapping of str to Start
        The source's classifiers, by name, that of two views last.
    hospitals : tuple of HospitalImages
        All labelled images.
    """

    table: SelectionTable
    laboratory: Laboratory
    starts: Mapping[str, Start]
    hospitals: tuple[HospitalImages, ...]

    @classmethod
    def prepare(cls, table: SelectionTable, laboratory: Laboratory) -> Material:
        """Decode and split the hospitals' images; train the source's models unless that is done.

        Raises
        ------
        ConfigurationError
            A split cannot be made; nothing has been trained then.
        """
        source = laboratory.scenario.source
        laboratory.check_data()
        with laboratory.alone():
            hospitals = tuple(read_hospitals(laboratory, source.image_size))
            for hospital in hospitals:
                for name in table.splits:
                    split_of(hospital, table, name)
            bundle = laboratory.prepare_source()
            starts = {name: read_start(bundle, name) for name in source.classifiers}
        return cls(table, laboratory, starts, hospitals)

    @property
    def cells(self) -> Path:
        """Folder of the cells."""
        return self.laboratory.root / "cells"

    def start(self, chain: Chain) -> Start:
        """What a chain starts from."""
        fitting = (name for name in self.starts if sees_lesions(name) == chain.two_views)
        return self.starts[chain.classifier or next(fitting)]

    def origins(self, chain: Chain) -> list[dict[str, Any]]:
        """What the features of a chain are made of, a site each."""
        start = self.start(chain)
        return [features_origin(start, h, self.table, chain.split) for h in self.hospitals]

    def sites(self, split: SplitName, start: Start) -> list[SiteFeatures]:
        """Return the features of all sites, from the files that keep them or extracted now."""
        events = self.laboratory.events
        part = f"features/{split}/{start.name}"
        folder = self.laboratory.root / part
        # Another shard may be extracting the same ones.
        with self.laboratory.alone(part):
            return [
                site_features(start, h, self.table, split, folder / f"{h.name}.safetensors", events)
                for h in self.hospitals
            ]
