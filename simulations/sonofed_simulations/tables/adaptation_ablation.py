"""What each part of ADAptation adds (its Table 3): contrast, hypersphere, reconstruction and k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import softmax

from sonofed_common.contract.selection import budget_count
from sonofed_common.runtime import derive_seed, set_threads
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.tables.ablation import Stage, select
from sonofed_simulations.tables.ablation_points import (
    FULL,
    QUICK,
    AblationSettings,
    PointStore,
)
from sonofed_simulations.tables.adaptation_ablation_page import FULL_METHOD, PARTS, PUBLISHED, about
from sonofed_simulations.tables.arm_page import About
from sonofed_simulations.tables.arm_table import make_arm_table
from sonofed_simulations.tables.arms import Arm, Array, Outcome
from sonofed_simulations.tables.features import SiteFeatures, site_features
from sonofed_simulations.tables.head import Head, Labelled, logits, train_head
from sonofed_simulations.tables.hospitals import HospitalImages, read_hospitals, split_of
from sonofed_simulations.tables.manifest import Tested, test_patients
from sonofed_simulations.tables.redrawn import stack_digest
from sonofed_simulations.tables.redrawn_settings import THREADS
from sonofed_simulations.tables.request import Made, Request
from sonofed_simulations.tables.settings import SplitName
from sonofed_simulations.tables.start import Start, read_start

BUDGET = 0.2
DRAWS = 10
"""Of Random, under each seed."""


def make(request: Request) -> Made:
    """Make the table; see `make_arm_table`.

    Raises
    ------
    ConfigurationError
        See `Request.check`.
    DataMissingError
        A data set is not there.
    """
    request.check()
    return make_arm_table(Ablation.prepare(request), request)


@dataclass(frozen=True)
class Ablation:
    """The arms on the hospitals' images.

    Attributes
    ----------
    settings : AblationSettings
        Of the quick or the full form.
    laboratory : Laboratory
        Its folder gets the source, the features, the reconstructions and the points.
    start : Start
        The source's classifier.
    hospitals : tuple of HospitalImages
        All labelled images.
    stack : str
        See `stack_digest`.
    """

    settings: AblationSettings
    laboratory: Laboratory
    start: Start
    hospitals: tuple[HospitalImages, ...]
    stack: str

    @classmethod
    def prepare(cls, request: Request) -> Ablation:
        """Train the source's models unless that is done, and decode the hospitals' images."""
        settings = QUICK if request.quick else FULL
        set_threads(THREADS)
        scenario, work = settings.source.read_scenario(), request.out / "work"
        laboratory = Laboratory(scenario, work, request.real_data, request.events)
        with laboratory.alone():
            bundle = laboratory.prepare_source()
            hospitals = tuple(read_hospitals(laboratory, settings.source.image_size))
        start = read_start(bundle, laboratory.scenario.study.classifiers[0])
        return cls(settings, laboratory, start, hospitals, stack_digest(bundle))

    @property
    def _store(self) -> PointStore:
        return PointStore(self.settings, self.laboratory, self.start, self.hospitals, self.stack)

    @property
    def arms(self) -> Sequence[Arm]:
        """The full method first; every other one is set against it."""
        return [
            Arm(name, None if name == FULL_METHOD else FULL_METHOD, PUBLISHED.get(name, ""))
            for name in PARTS
        ]

    @property
    def seeds(self) -> Sequence[int]:
        """Of the splits."""
        return self.settings.splits.seeds

    @property
    def about(self) -> About:
        """What the page says."""
        return about(self.settings)

    def origin(self, arm: Arm, seed: int) -> Mapping[str, Any]:
        """What a cell is made of."""
        part, splits = PARTS[arm.name], self.settings.splits
        made_of = None if part is None else self._store.origin(part[0], seed)
        return {
            **self.start.origin,
            "data": [hospital.provenance.digest for hospital in self.hospitals],
            "points": made_of,
            "clusters": None if part is None else part[1],
            "budget": BUDGET,
            "draws": DRAWS if part is None else 1,
            "splits": splits.model_dump(mode="json", include={"folds", "views", "training"}),
            "seed": seed,
        }

    def facts(self) -> Mapping[str, Any]:
        """For the manifest."""
        source, splits = self.laboratory.scenario.source, self.settings.splits
        return {
            "source": {
                "bundle": self.start.bundle,
                "settings": source.model_dump(mode="json", exclude_none=True),
            },
            "data": {h.name: h.provenance.model_dump(mode="json") for h in self.hospitals},
            "embedding": self.settings.embedding.model_dump(mode="json"),
            "reconstruction": self.settings.reconstruction.model_dump(mode="json"),
            "training": splits.training.model_dump(mode="json"),
        }

    def tested(self) -> Tested:
        """Patients of the test images of every seed."""
        splits = self.settings.splits
        return {
            f"seed-{seed}": {
                h.name: test_patients(split_of(h, splits, SplitName(seed, 0)))
                for h in self.hospitals
            }
            for seed in splits.seeds
        }

    def run(self, arm: Arm, seed: int) -> Outcome:
        """Choose a fifth of the pools, fine-tune the head, and predict the test images."""
        sites, part = self._sites(seed), PARTS[arm.name]
        size = sum(len(site.labels) for site in sites)
        chosen = [self._drawn(seed, n, size) for n in range(DRAWS)]
        if part is not None:
            chosen = [self._chosen(*part, seed)]
        heads = [self._head(sites, one, seed) for one in chosen]
        predictions = {
            site.name: (
                site.test_labels,
                np.stack([_malignant(head, site) for head in heads]),
                np.array(site.test_groups),
            )
            for site in sites
        }
        return Outcome(predictions, composition(sites, chosen))

    def _drawn(self, seed: int, draw: int, size: int) -> Array:
        generator = np.random.default_rng(derive_seed(seed, "random", draw))
        return np.asarray(generator.permutation(size)[: budget_count(BUDGET, size)])

    def _chosen(self, stage: Stage, clusters: int, seed: int) -> Array:
        flat = stage == "without hypersphere"
        points = self._store.points(stage, seed)
        return select(points, clusters, BUDGET, flat, derive_seed(seed, "k"))

    def _head(self, sites: Sequence[SiteFeatures], chosen: Array, seed: int) -> Head:
        """Fine-tune on the chosen images, counted through all sites' pools."""
        parts, low = [], 0
        for site in sites:
            high = low + len(site.labels)
            own = np.sort(chosen[(chosen >= low) & (chosen < high)] - low)
            views = torch.from_numpy(site.views[:, own])
            parts.append(Labelled(site.name, views, torch.from_numpy(site.labels[own])))
            low = high
        begin, training = self.start.begin, self.settings.splits.training
        return train_head(begin.head, parts, training, begin.dropped, derive_seed(seed, 0))

    def _sites(self, seed: int) -> list[SiteFeatures]:
        name, splits = SplitName(seed, 0), self.settings.splits
        folder = self.laboratory.root / "features" / str(name)
        events = self.laboratory.events
        # Another shard may be extracting the same ones.
        with self.laboratory.alone(f"features/{name}"):
            return [
                site_features(self.start, h, splits, name, folder / f"{h.name}.safetensors", events)
                for h in self.hospitals
            ]


def composition(sites: Sequence[SiteFeatures], chosen: Sequence[Array]) -> dict[str, float]:
    """Count what was chosen, by site, and tell how much of it is malignant.

    Parameters
    ----------
    sites : sequence of SiteFeatures
        In the order in which ``chosen`` counts through their pools.
    chosen : sequence of ndarray of int64
        Indices of the chosen images, a draw each; of several the mean is told.
    """
    labels = np.concatenate([site.labels for site in sites])
    owners = np.repeat(np.arange(len(sites)), [len(site.labels) for site in sites])
    counts = np.mean([np.bincount(owners[one], minlength=len(sites)) for one in chosen], axis=0)
    return {
        "labels": float(len(chosen[0])),
        **{f"labels at {site.name}": float(n) for site, n in zip(sites, counts, strict=True)},
        "malignant share": float(np.mean([labels[one].mean() for one in chosen])),
    }


def _malignant(head: Head, site: SiteFeatures) -> Array:
    """P(malignant) of the site's test images (M,)."""
    return np.asarray(softmax(logits(head, site.test).astype(np.float64), axis=1)[:, 1])
