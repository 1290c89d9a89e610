"""Tables whose arms differ in what a classifier is trained on: real, synthetic or mirrored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sonofed_common.contract.configuration import Model
from sonofed_common.contract.study_synthesis import WganTraining
from sonofed_common.runtime import derive_seed
from sonofed_server.source.classifiers import probabilities
from sonofed_server.source.data import Part, SourceSet
from sonofed_server.source.settings import SourceData
from sonofed_simulations.tables.arm_page import About
from sonofed_simulations.tables.arms import Arm, Outcome, Prediction
from sonofed_simulations.tables.breast_sites import SITES, Site, parts_facts, patients, read_site
from sonofed_simulations.tables.equal_steps import Steps, train_steps
from sonofed_simulations.tables.manifest import Tested
from sonofed_simulations.tables.request import Request
from sonofed_simulations.tables.synthetic_sets import (
    SyntheticSet,
    synthetic_origin,
    synthetic_set,
)

NETWORKS = {
    "ResNet-50": "resnet50",
    "ViT-16": "vit16",
    "CNN-Transformer": "cnn_transformer",
}
"""The study's architectures, by the names of its tables."""
SOURCE, TARGET = "BUSI", "BrEaST"


@dataclass(frozen=True)
class Mixture:
    """What one classifier is trained on.

    Attributes
    ----------
    network : str
        One of `CLASSIFIERS`.
    real : int or None
        Real images of the source; None is its whole pool.
    synthetic : int
        Images of the source's GANs beside them.
    flips : bool
        Whether half of the images are mirrored.
    """

    network: str
    real: int | None
    synthetic: int = 0
    flips: bool = False


class MixtureSettings(Model):
    """Size, length and seeds of a table of mixtures.

    Notes
    -----
    ``synthetic`` is the size of the one set that all arms take the first images of.
    """

    image_size: int
    seeds: tuple[int, ...]
    test_fraction: float = 0.2
    training: Steps
    wgan: WganTraining
    synthetic: int


class MixtureTable:
    """From BUSI to BrEaST, with real and synthetic images of BUSI.

    Parameters
    ----------
    mixtures : mapping of Arm to Mixture
        The rows, in order.
    settings : MixtureSettings
        The same for all rows.
    about : About
        The page's words.
    request : Request
        Names the data and the folder.
    sites : mapping of str to SourceData
        Where the source and the target are.

    Notes
    -----
    Of one seed all arms of a network have the same split, start weights, count of optimiser steps,
    real images (a smaller set is part of a larger one) and synthetic images (the same).
    """

    def __init__(
        self,
        mixtures: Mapping[Arm, Mixture],
        settings: MixtureSettings,
        about: About,
        request: Request,
        sites: Mapping[str, SourceData] = SITES,
    ) -> None:
        self.about, self.seeds, self.arms = about, settings.seeds, tuple(mixtures)
        self._mixtures, self._settings, self._request = dict(mixtures), settings, request
        self._sites = {
            name: read_site(name, sites[name], request.real_data, settings.image_size)
            for name in (SOURCE, TARGET)
        }
        self._source = cache(self._split)
        self._synthetic = cache(self._released)

    def origin(self, arm: Arm, seed: int) -> Mapping[str, Any]:
        """Images, split, mixture, training, and the GANs where they are used."""
        mixture, source = self._mixtures[arm], self._source(seed)
        found = {
            "mixture": asdict(mixture),
            "training": self._settings.training.of(mixture.network).model_dump(mode="json"),
            "size": self._settings.image_size,
            "data": {name: site.provenance.digest for name, site in self._sites.items()},
            "split": parts_facts(source),
        }
        if mixture.synthetic:
            found["synthetic"] = synthetic_origin(
                source, self._settings.synthetic, self._settings.wgan, seed
            )
        return found

    def run(self, arm: Arm, seed: int) -> Outcome:
        """Train on the arm's mixture, and predict held-out BUSI and all of BrEaST."""
        mixture, source = self._mixtures[arm], self._source(seed)
        images, labels = _some(source.pool, mixture.real, derive_seed(seed, "real"))
        facts: dict[str, float] = {"real images": len(labels)}
        if mixture.synthetic:
            released = self._synthetic(seed)
            drawn, classes = released.first(
                mixture.synthetic, float(source.pool.labels.float().mean())
            )
            images, labels = torch.cat((images, drawn)), torch.cat((labels, classes))
            facts |= gate_facts(released) | {"synthetic images": len(classes)}
        model = train_steps(
            mixture.network,
            images,
            labels,
            self._settings.training.of(mixture.network),
            derive_seed(seed, mixture.network),
            flips=mixture.flips,
        )
        tests = {SOURCE: source.test, TARGET: self._sites[TARGET].whole}
        found: dict[str, Prediction] = {
            name: (part.labels.numpy(), probabilities(model, part.images).numpy(), patients(part))
            for name, part in tests.items()
        }
        return Outcome(found, facts)

    def facts(self) -> Mapping[str, Any]:
        """Settings and data."""
        return {
            "settings": self._settings.model_dump(mode="json"),
            "arms": {arm.name: asdict(mixture) for arm, mixture in self._mixtures.items()},
            "data": {n: site.provenance.model_dump(mode="json") for n, site in self._sites.items()},
        }

    def tested(self) -> Tested:
        """Patients of the source's test images of every seed; the target is tested whole."""
        return {
            f"seed-{seed}": {SOURCE: list(patients(self._source(seed).test))} for seed in self.seeds
        }

    def _split(self, seed: int) -> SourceSet:
        site: Site = self._sites[SOURCE]
        return site.split(self._settings.test_fraction, seed)

    def _released(self, seed: int) -> SyntheticSet:
        return synthetic_set(
            self._source(seed),
            self._settings.synthetic,
            self._settings.wgan,
            seed,
            self._request.out / "work" / "synthetic" / f"seed-{seed}",
            self._request.events,
        )


COUNTS = ("refused by the gate", "refused, for likeness to another synthetic one")
"""Of `gate_facts`."""


def gate_facts(released: SyntheticSet) -> dict[str, float]:
    """What the page tells of the memorisation gate."""
    return {
        **dict(zip(COUNTS, (released.facts[k] for k in ("rejected", "duplicates")), strict=True)),
        "membership AUROC": released.facts["membership_auroc"],
        "distance to nearest real, median": released.facts["nearest_real"]["q50"],
        "least distance allowed": released.facts["limit"],
    }


def _some(pool: Part, count: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Images and labels of ``count`` images, classes in the pool's shares; None takes all."""
    if count is None:
        return pool.images, pool.labels
    order = torch.randperm(len(pool.labels), generator=torch.Generator().manual_seed(seed))
    malignant = round(count * float(pool.labels.float().mean()))
    chosen = torch.cat(
        [
            order[pool.labels[order] == label][:number]
            for label, number in ((0, count - malignant), (1, malignant))
        ]
    )
    return pool.images[chosen], pool.labels[chosen]
