"""Aggregation strategies side by side, beside a site alone and one site that has all images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from sonofed_common.contract.selection import budget_count
from sonofed_common.contract.study import Aggregation, Finetuning
from sonofed_common.runtime import derive_seed, set_threads
from sonofed_server.source.settings import DiffusionTraining
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.scenarios.scenario import Scenario, read_scenario
from sonofed_simulations.statistics import Split, check_no_leak, split_by_group
from sonofed_simulations.tables.aggregation_cells import SiteImages, test, train, union
from sonofed_simulations.tables.aggregation_page import about
from sonofed_simulations.tables.arm_page import About
from sonofed_simulations.tables.arm_table import make_arm_table
from sonofed_simulations.tables.arms import Arm, Outcome
from sonofed_simulations.tables.hospitals import HospitalImages, check_classes, read_hospitals
from sonofed_simulations.tables.manifest import Tested, test_patients
from sonofed_simulations.tables.request import Made, Request
from sonofed_simulations.tables.start import Start, read_start


@dataclass(frozen=True)
class Length:
    """Pixels, seeds and rounds of a form of the table."""

    image_size: int
    seeds: tuple[int, ...]
    rounds: int


QUICK = Length(64, (0, 1, 2), Finetuning().rounds)
FULL = Length(128, (0, 1, 2, 3, 4), 20)
BUDGET = 0.2
TEST_FRACTION = 0.2
LOCAL, POOLED = "local only", "pooled"
ADAM = Finetuning(batch_norm="global")
SGD = ADAM.model_copy(update={"optimizer": "sgd", "learning_rate": 0.01})
FEDAVG = Aggregation()


@dataclass(frozen=True)
class Variant:
    """A row: who trains with what."""

    arm: Arm
    settings: Finetuning = ADAM
    aggregation: Aggregation = FEDAVG


VARIANTS = (
    Variant(Arm(LOCAL, "FedAvg")),
    Variant(Arm("FedAvg")),
    Variant(Arm("FedProx", "FedAvg"), aggregation=Aggregation(strategy="fedprox")),
    Variant(Arm("SiloBN", "FedAvg"), settings=ADAM.model_copy(update={"batch_norm": "site"})),
    Variant(Arm("FedBN", "FedAvg"), settings=ADAM.model_copy(update={"batch_norm": "local"})),
    Variant(Arm("FedDG-GA", "FedAvg"), aggregation=Aggregation(strategy="feddg_ga")),
    Variant(Arm("FedAdam", "FedAvg"), aggregation=Aggregation(strategy="fedadam")),
    Variant(Arm("FedAvg, SGD", "FedAvg"), settings=SGD),
    Variant(Arm("SCAFFOLD", "FedAvg, SGD"), SGD, Aggregation(strategy="scaffold")),
    Variant(Arm(POOLED, "FedAvg")),
)


@dataclass(frozen=True)
class AggregationTable:
    """The table, over the hospitals of a scenario."""

    start: Start
    hospitals: Sequence[HospitalImages]
    source: Mapping[str, Any]
    length: Length

    @property
    def arms(self) -> Sequence[Arm]:
        """The rows."""
        return tuple(variant.arm for variant in VARIANTS)

    @property
    def seeds(self) -> Sequence[int]:
        """Of the splits, the labelled images and the order."""
        return self.length.seeds

    @property
    def about(self) -> About:
        """What the page says."""
        return about(ADAM, SGD, self.length.rounds, BUDGET, self.length.image_size)

    @cached_property
    def _variants(self) -> dict[str, tuple[Finetuning, Aggregation]]:
        update = {"rounds": self.length.rounds}
        return {v.arm.name: (v.settings.model_copy(update=update), v.aggregation) for v in VARIANTS}

    def origin(self, arm: Arm, seed: int) -> Mapping[str, Any]:
        """What a cell is made of."""
        settings, aggregation = self._variants[arm.name]
        return {
            "arm": arm.name,
            "seed": seed,
            **self.start.origin,
            "data": {h.name: h.provenance.digest for h in self.hospitals},
            "image_size": self.length.image_size,
            "budget": BUDGET,
            "test_fraction": TEST_FRACTION,
            "settings": settings.model_dump(mode="json"),
            "aggregation": aggregation.model_dump(mode="json"),
        }

    def facts(self) -> Mapping[str, Any]:
        """Data and settings, for the manifest."""
        return {
            "source": self.source,
            "data": {h.name: h.provenance.model_dump(mode="json") for h in self.hospitals},
            "arms": {arm.name: self.origin(arm, 0) for arm in self.arms},
        }

    def tested(self) -> Tested:
        """Patients of the test images of every seed."""
        return {
            f"seed-{seed}": {h.name: test_patients(_split(h, seed)) for h in self.hospitals}
            for seed in self.seeds
        }

    def run(self, arm: Arm, seed: int) -> Outcome:
        """Train and predict one cell."""
        settings, aggregation = self._variants[arm.name]
        sites = [site_images(hospital, seed) for hospital in self.hospitals]
        cohorts = {LOCAL: [[site] for site in sites], POOLED: [[union(sites)]]}.get(
            arm.name, [sites]
        )
        ends = [train(self.start, cohort, settings, aggregation, seed) for cohort in cohorts]
        by_site = ends if arm.name == LOCAL else ends * len(sites)
        predictions = {
            site.name: test(self.start, end, site, settings)
            for site, end in zip(sites, by_site, strict=True)
        }
        shares = ends[0].state.config.get("shares", {})
        facts = {f"weight of {name}": share for name, share in shares.items()}
        return Outcome(predictions, {"labels": sum(len(s.labels) for s in sites), **facts})


def site_images(hospital: HospitalImages, seed: int) -> SiteImages:
    """Split a hospital's images, and draw which of its pool are labelled."""
    split = _split(hospital, seed)
    places = {sample.name: n for n, sample in enumerate(hospital.samples)}
    pool, tested = ([places[s.name] for s in part] for part in (split.pool, split.test))
    draws = np.random.default_rng(derive_seed(seed, hospital.name, "labels"))
    chosen = np.sort(draws.permutation(len(pool))[: budget_count(BUDGET, len(pool))])
    labels = torch.tensor([int(sample.label or 0) for sample in split.pool])
    return SiteImages(
        hospital.name,
        hospital.images[pool],
        torch.from_numpy(chosen),
        labels[chosen],
        hospital.images[tested],
        np.array([int(sample.label or 0) for sample in split.test]),
        np.array([sample.group for sample in split.test]),
    )


def make(request: Request) -> Made:
    """Make the table.

    Raises
    ------
    ConfigurationError
        The shard is out of range.
    DataMissingError
        A data set is not there.
    """
    length = QUICK if request.quick else FULL
    threads = 1 if request.quick else None
    set_threads(threads)
    scenario = _scenario(length, threads)
    laboratory = Laboratory(scenario, request.out / "work", request.real_data, request.events)
    with laboratory.alone():
        bundle = laboratory.prepare_source()
        hospitals = read_hospitals(laboratory, length.image_size)
    start = read_start(bundle, scenario.study.classifiers[0])
    settings = scenario.source.model_dump(mode="json", exclude_none=True)
    source = {"bundle": start.bundle, "settings": settings}
    return make_arm_table(AggregationTable(start, hospitals, source, length), request)


def _split(hospital: HospitalImages, seed: int) -> Split:
    split = split_by_group(hospital.samples, TEST_FRACTION, seed)
    check_no_leak(split)
    check_classes(split, hospital.name)
    return split


def _scenario(length: Length, threads: int | None) -> Scenario:
    scenario = read_scenario("breast_three_countries")
    changes = {
        "threads": threads,
        "image_size": length.image_size,
        "diffusion": DiffusionTraining(kind="none"),
        "synthetic": None,
    }
    source = scenario.source.model_copy(update=changes)
    return scenario.model_copy(update={"threads": threads, "source": source})
