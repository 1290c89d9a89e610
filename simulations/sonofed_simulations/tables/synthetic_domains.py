"""Three architectures across two countries, without synthesis: the WGAN study's table 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from sonofed_common.contract.configuration import Model
from sonofed_common.runtime import derive_seed
from sonofed_server.source.classifiers import probabilities
from sonofed_server.source.data import SourceSet
from sonofed_server.source.settings import SourceData
from sonofed_simulations.tables.arm_findings import Claim
from sonofed_simulations.tables.arm_page import About
from sonofed_simulations.tables.arm_summary import MEAN
from sonofed_simulations.tables.arm_table import make_arm_table
from sonofed_simulations.tables.arms import Arm, Outcome
from sonofed_simulations.tables.breast_sites import SITES, parts_facts, patients, read_site
from sonofed_simulations.tables.equal_steps import TRANSFORMER_NOTE, Steps, train_steps
from sonofed_simulations.tables.manifest import Tested
from sonofed_simulations.tables.mixtures import NETWORKS, SOURCE, TARGET
from sonofed_simulations.tables.request import Made, Request
from sonofed_simulations.tables.synthetic_words import ADAPTED, WORK

PUBLISHED = {
    ("ResNet-50", SOURCE): "80.62 on BUSI, 62.5 on BrEaST",
    ("ResNet-50", TARGET): "49.01 on BUSI, 68.06 on BrEaST",
}
"""Accuracy in %, by architecture and training site."""


class DomainSettings(Model):
    """Size, length and seeds."""

    image_size: int
    seeds: tuple[int, ...]
    test_fraction: float = 0.3
    training: Steps


QUICK = DomainSettings(image_size=64, seeds=(0, 1, 2), training=Steps(steps=100, batch_size=8))
FULL = DomainSettings(
    image_size=128, seeds=(0, 1, 2, 3, 4), training=Steps(steps=6000, batch_size=16)
)


def make(request: Request) -> Made:
    """Make the table; see `make_arm_table`."""
    return make_arm_table(DomainTable(QUICK if request.quick else FULL, request), request)


class DomainTable:
    """Each architecture trained at one site and tested on held-out images of both.

    Parameters
    ----------
    settings : DomainSettings
        The same for all rows.
    request : Request
        Names the data.
    sites : mapping of str to SourceData
        Where both sites are.
    """

    def __init__(
        self,
        settings: DomainSettings,
        request: Request,
        sites: Mapping[str, SourceData] = SITES,
    ) -> None:
        self._settings, self.seeds = settings, settings.seeds
        self._sites = {
            name: read_site(name, sites[name], request.real_data, settings.image_size)
            for name in (SOURCE, TARGET)
        }
        self._splits = cache(self._split)
        self._trained = _arms()
        self.arms = tuple(self._trained)
        self.about = about(settings)

    def origin(self, arm: Arm, seed: int) -> Mapping[str, Any]:
        """Images, splits and training."""
        network, home = self._trained[arm]
        name = NETWORKS[network]
        return {
            "network": name,
            "home": home,
            "training": self._settings.training.of(name).model_dump(mode="json"),
            "size": self._settings.image_size,
            "data": {name: site.provenance.digest for name, site in self._sites.items()},
            "splits": {name: parts_facts(parts) for name, parts in self._splits(seed).items()},
        }

    def run(self, arm: Arm, seed: int) -> Outcome:
        """Train at home, and predict the held-out images of both sites."""
        network, home = self._trained[arm]
        parts = self._splits(seed)
        pool = parts[home].pool
        name = NETWORKS[network]
        model = train_steps(
            name,
            pool.images,
            pool.labels,
            self._settings.training.of(name),
            derive_seed(seed, name),
            flips=True,
        )
        predictions = {
            site: (
                of.test.labels.numpy(),
                probabilities(model, of.test.images).numpy(),
                patients(of.test),
            )
            for site, of in parts.items()
        }
        return Outcome(predictions, {"real images": len(pool.labels)})

    def facts(self) -> Mapping[str, Any]:
        """Settings, data and splits."""
        return {
            "settings": self._settings.model_dump(mode="json"),
            "data": {n: site.provenance.model_dump(mode="json") for n, site in self._sites.items()},
        }

    def tested(self) -> Tested:
        """Patients of the test images of every seed."""
        return {
            f"seed-{seed}": {n: list(patients(p.test)) for n, p in self._splits(seed).items()}
            for seed in self.seeds
        }

    def _split(self, seed: int) -> dict[str, SourceSet]:
        fraction = self._settings.test_fraction
        return {name: site.split(fraction, seed) for name, site in self._sites.items()}


def _arms() -> dict[Arm, tuple[str, str]]:
    """Architecture and training site of each row; BUSI's is set against BrEaST's."""
    rows = {}
    for network in NETWORKS:
        for home, other in ((SOURCE, TARGET), (TARGET, SOURCE)):
            arm = Arm(_name(network, home), None, PUBLISHED.get((network, home), ""), home)
            if home == SOURCE:
                arm = replace(arm, against=_name(network, other))
            rows[arm] = (network, home)
    return rows


def _name(network: str, home: str) -> str:
    return f"{network}, trained on {home}"


def about(settings: DomainSettings) -> About:
    """What the page says beside the numbers."""
    training = settings.training
    homes = {home: tuple(_name(n, home) for n in NETWORKS) for home in (SOURCE, TARGET)}
    return About(
        title="Three architectures between BUSI and BrEaST, without synthesis",
        work=f"table 1 of {WORK}",
        claims=(
            Claim(
                "The study reports that a network trained on BUSI loses 18.1 points of accuracy "
                "on BrEaST (ResNet-50)",
                homes[SOURCE],
                "",
                quantity="gap",
            ),
            Claim(
                "It reports that one trained on BrEaST loses 19.1 points on BUSI",
                homes[TARGET],
                "",
                quantity="gap",
            ),
            Claim(
                "The gap mixes how hard the two sets are. On the same held-out images of BrEaST "
                "the study's network from BUSI is 5.6 points below the one trained at home",
                homes[SOURCE],
                TARGET,
                direction=-1,
            ),
            Claim(
                "On those of BUSI it is 31.6 points above the one from BrEaST",
                homes[SOURCE],
                SOURCE,
            ),
        ),
        published="published accuracy, %",
        focus=MEAN,
        method=(
            f"Images of {settings.image_size} px. Per seed {settings.test_fraction:.0%} of each "
            "set's patients, or groups of near-duplicates, are held out; every row is tested on "
            "the held-out images of both sets.",
            f"Each classifier: {training.steps} steps of {training.batch_size} images, Adam "
            f"{training.learning_rate:g} ({TRANSFORMER_NOTE}) with a cosine, mirrored at random. "
            "BUSI has about two and a half times as many training images, at equal steps.",
        ),
        adapted=(*ADAPTED[:2], *ADAPTED[3:4]),
    )
