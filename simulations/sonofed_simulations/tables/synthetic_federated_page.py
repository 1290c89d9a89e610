"""Rows and words of the page on synthetic images in federated training."""

from __future__ import annotations

from sonofed_simulations.tables.arm_findings import Claim
from sonofed_simulations.tables.arm_page import About
from sonofed_simulations.tables.arm_summary import MEAN
from sonofed_simulations.tables.arms import Arm
from sonofed_simulations.tables.synthetic_federated_settings import (
    FederatedSettings,
    Federation,
    Generator,
)

PUBLISHED: dict[tuple[bool, Generator | None], float] = {
    (False, None): 0.9206,
    (False, "GAN"): 0.9237,
    (False, "diffusion"): 0.9362,
    (True, None): 0.9429,
    (True, "GAN"): 0.9538,
    (True, "diffusion"): 0.9574,
}
"""Mean AUROC over the sites."""


def arms() -> dict[Arm, Federation]:
    """FedAvg and FedProx, each without and with the images of either generator."""
    rows = {}
    for (proximal, generator), published in PUBLISHED.items():
        base = "FedProx" if proximal else "FedAvg"
        name = base if generator is None else f"{base} + {generator} images"
        against = None if generator is None else base
        if name == "FedProx":
            against = "FedAvg"
        rows[Arm(name, against, f"{published:.4f}")] = Federation(proximal, generator)
    return rows


def about(settings: FederatedSettings) -> About:
    """What the page says beside the numbers."""
    wgan, diffusion = settings.wgan, settings.diffusion
    return About(
        title="Synthetic images in federated training, by GAN and by diffusion",
        work=(
            "Federated breast cancer detection enhanced by synthetic ultrasound images "
            "(arXiv 2506.23334)"
        ),
        claims=(
            Claim(
                "The work reports that GAN images raise the mean AUROC of FedAvg by .0031 and of "
                "FedProx by .0109",
                tuple(f"{base} + GAN images" for base in ("FedAvg", "FedProx")),
                MEAN,
                metrics=("auroc", "accuracy"),
            ),
            Claim(
                "The work reports that diffusion images raise the mean AUROC of FedAvg by .0156 "
                "and of FedProx by .0145",
                tuple(f"{base} + diffusion images" for base in ("FedAvg", "FedProx")),
                MEAN,
                metrics=("auroc", "accuracy"),
            ),
            Claim(
                "The work reports that FedProx is .0223 above FedAvg",
                ("FedProx",),
                MEAN,
                metrics=("auroc", "accuracy"),
            ),
        ),
        published="published AUROC, mean over sites",
        focus=MEAN,
        method=(
            f"Sites: {', '.join(settings.sites)}. Images of {settings.image_size} px; of each "
            f"site and seed {settings.test_fraction:.0%} of the patients are held out.",
            f"{settings.network} from random weights, {settings.rounds} rounds of "
            f"{settings.local.steps} local steps, batch {settings.local.batch_size}, Adam "
            f"{settings.local.learning_rate:g} with a cosine over all rounds, flips; the same "
            f"number of steps in every row. FedProx: mu {settings.proximal:g}.",
            f"Each site trains its generators on its own training images ({wgan.steps} steps of "
            f"one GAN a class, or {diffusion.epochs} epochs of a small diffusion model that "
            f"redraws from edges) and shares {settings.synthetic} images, fewer where the "
            "memorisation gate refuses more. Every site trains on its own images and on all "
            "shared ones. The hours hold a generator's training where a cell had to do it.",
        ),
        adapted=(
            "The work's sites are BUSI, BUS-BRA and UDIAT; ours are BUSI, BUS-BRA by scanner and "
            "BrEaST, so its numbers are of another federation.",
            "Malignant is the positive class; splits are by patient, of BUSI by group of "
            "near-duplicates.",
            "Sharing of generated images between sites, through a gate at each of them, is our "
            "reading of the protocol. In a deployment the phase 'synthesise' does so with GANs, "
            "where a hospital's policy lets such images leave; diffusion images are simulated here "
            "alone, from edge maps of training images.",
        ),
    )
