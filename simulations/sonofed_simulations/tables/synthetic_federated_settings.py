"""What the table of synthetic images in federated training compares, and how long it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sonofed_common.contract.configuration import Model
from sonofed_common.contract.study_synthesis import WganTraining
from sonofed_server.source.settings import DiffusionTraining
from sonofed_simulations.tables.breast_sites import SITES
from sonofed_simulations.tables.equal_steps import Steps

Generator = Literal["GAN", "diffusion"]


@dataclass(frozen=True)
class Federation:
    """What one arm does: FedProx or not, and whose images the sites share."""

    proximal: bool
    generator: Generator | None


class FederatedSettings(Model):
    """Sites, network, length and seeds.

    Notes
    -----
    ``local`` is what one site does in one round, ``proximal`` the weight mu of FedProx, and
    ``synthetic`` the number of images that each site shares.
    """

    image_size: int
    seeds: tuple[int, ...]
    sites: tuple[str, ...] = tuple(SITES)
    test_fraction: float = 0.2
    network: str
    rounds: int
    local: Steps
    proximal: float = 0.01
    wgan: WganTraining
    diffusion: DiffusionTraining
    synthetic: int

    def generator(self, kind: Generator) -> WganTraining | DiffusionTraining:
        """How the generator of a kind is trained."""
        return self.wgan if kind == "GAN" else self.diffusion


QUICK = FederatedSettings(
    image_size=64,
    seeds=(0, 1, 2),
    sites=("BUSI", "BUS-BRA Logiq 7", "BrEaST"),
    network="resnet18",
    rounds=4,
    local=Steps(steps=20, batch_size=8),
    wgan=WganTraining(steps=800, batch_size=16, width=64, critic_steps=3, learning_rate=2e-4),
    diffusion=DiffusionTraining(epochs=4),
    synthetic=50,
)
FULL = FederatedSettings(
    image_size=128,
    seeds=(0, 1, 2, 3, 4),
    network="resnet50",
    rounds=50,
    local=Steps(steps=60, batch_size=16),
    wgan=WganTraining(),
    diffusion=DiffusionTraining(epochs=200),
    synthetic=500,
)
