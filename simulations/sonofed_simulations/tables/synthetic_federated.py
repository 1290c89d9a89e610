"""Synthetic images in federated training, by GAN and by diffusion (arXiv 2506.23334)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sonofed_client.adaptation import drift
from sonofed_common.models.classifiers import Classifier, build_classifier
from sonofed_common.runtime import derive_seed, device
from sonofed_common.synthesis.memorisation import RefusedError
from sonofed_server.aggregation.fedavg import FedAvg
from sonofed_server.source.classifiers import probabilities
from sonofed_server.source.data import SourceSet
from sonofed_server.source.settings import SourceData
from sonofed_simulations.tables.arm_table import make_arm_table
from sonofed_simulations.tables.arms import Arm, Outcome
from sonofed_simulations.tables.breast_sites import SITES, parts_facts, patients, read_site
from sonofed_simulations.tables.equal_steps import fit_steps
from sonofed_simulations.tables.manifest import Tested
from sonofed_simulations.tables.mixtures import COUNTS, gate_facts
from sonofed_simulations.tables.request import Made, Request
from sonofed_simulations.tables.synthetic_federated_page import about, arms
from sonofed_simulations.tables.synthetic_federated_settings import (
    FULL,
    QUICK,
    FederatedSettings,
    Generator,
)
from sonofed_simulations.tables.synthetic_sets import (
    SyntheticSet,
    synthetic_origin,
    synthetic_set,
)


def make(request: Request) -> Made:
    """Make the table; see `make_arm_table`."""
    return make_arm_table(FederatedTable(QUICK if request.quick else FULL, request), request)


class FederatedTable:
    """FedAvg and FedProx over the breast sites, without and with shared synthetic images.

    Parameters
    ----------
    settings : FederatedSettings
        The same for all rows.
    request : Request
        Names the data and the folder.
    sites : mapping of str to SourceData
        Where the sites' sets are.

    Notes
    -----
    Each site trains its generator on its own pool; what passes its memorisation gate goes to all
    sites, and every site trains on its own real images and on all shared ones. FedProx (Li et al.,
    MLSys 2020) adds mu / 2 times the squared distance to the round's global weights.
    """

    def __init__(
        self,
        settings: FederatedSettings,
        request: Request,
        sites: Mapping[str, SourceData] = SITES,
    ) -> None:
        self._settings, self._request, self.seeds = settings, request, settings.seeds
        self._sites = {
            name: read_site(name, sites[name], request.real_data, settings.image_size)
            for name in settings.sites
        }
        self._federations = arms()
        self.arms = tuple(self._federations)
        self.about = about(settings)
        self._splits = cache(self._split)
        self._shared = cache(self._released)

    def origin(self, arm: Arm, seed: int) -> Mapping[str, Any]:
        """Images, splits, training, and the generators where they are used."""
        federation, settings = self._federations[arm], self._settings
        found: dict[str, Any] = {
            "network": settings.network,
            "rounds": settings.rounds,
            "local": settings.local.model_dump(mode="json"),
            "proximal": settings.proximal if federation.proximal else 0.0,
            "size": settings.image_size,
            "data": {name: site.provenance.digest for name, site in self._sites.items()},
            "splits": {name: parts_facts(parts) for name, parts in self._splits(seed).items()},
        }
        if federation.generator is not None:
            generator = settings.generator(federation.generator)
            found["synthetic"] = {
                name: dict(synthetic_origin(parts, settings.synthetic, generator, seed))
                for name, parts in self._splits(seed).items()
            }
        return found

    def run(self, arm: Arm, seed: int) -> Outcome:
        """Train federatedly, and predict each site's held-out images."""
        federation, parts = self._federations[arm], self._splits(seed)
        images = {name: [of.pool.images] for name, of in parts.items()}
        labels = {name: [of.pool.labels] for name, of in parts.items()}
        facts: dict[str, float] = {}
        if federation.generator is not None:
            shared = list(self._shared(federation.generator, seed).values())
            for name in parts:
                images[name] += [one.images for one in shared]
                labels[name] += [one.labels for one in shared]
            told = [gate_facts(one) for one in shared]
            facts = {
                name: sum(one[name] for one in told) / (1 if name in COUNTS else len(told))
                for name in told[0]
            }
            facts |= {
                "images shared": sum(len(one.labels) for one in shared),
                "sites that share": len(shared),
            }
        training = {name: (torch.cat(images[name]), torch.cat(labels[name])) for name in parts}
        weights = {name: len(of.pool.labels) for name, of in parts.items()}
        model = _train(self._settings, training, weights, federation.proximal, seed)
        return Outcome(
            {
                name: (
                    of.test.labels.numpy(),
                    probabilities(model, of.test.images).numpy(),
                    patients(of.test),
                )
                for name, of in parts.items()
            },
            facts,
        )

    def facts(self) -> Mapping[str, Any]:
        """Settings and data."""
        return {
            "settings": self._settings.model_dump(mode="json", exclude_none=True),
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

    def _released(self, kind: Generator, seed: int) -> dict[str, SyntheticSet]:
        settings, work = self._settings, self._request.out / "work" / "synthetic"
        released = {}
        for name, parts in self._splits(seed).items():
            try:
                released[name] = synthetic_set(
                    parts,
                    settings.synthetic,
                    settings.generator(kind),
                    derive_seed(seed, name),
                    work / f"seed-{seed}" / kind / name,
                    self._request.events,
                )
            except RefusedError:
                continue
        if not released:
            raise RefusedError(f"no site's {kind} images pass its memorisation gate")
        return released


def _train(
    settings: FederatedSettings,
    training: Mapping[str, tuple[Tensor, Tensor]],
    weights: Mapping[str, int],
    proximal: bool,
    seed: int,
) -> Classifier:
    """Train the global model; sites count by their own real images, the same in all arms."""
    own = derive_seed(seed, "weights")
    model = build_classifier(settings.network, pretrained=False, seed=own).to(device())
    for number in range(settings.rounds):
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        mean = FedAvg()
        for site, (images, labels) in training.items():
            model.load_state_dict(start)
            fit_steps(
                model,
                images,
                labels,
                settings.local,
                derive_seed(seed, site, number),
                flips=True,
                before_step=drift.proximal(model, settings.proximal) if proximal else None,
                part=(number, settings.rounds),
            )
            arrays = {n: tensor.cpu().numpy() for n, tensor in model.state_dict().items()}
            mean.add(arrays, weights[site])
        model.load_state_dict({n: torch.from_numpy(a) for n, a in mean.mean().items()})
    return model.eval()
