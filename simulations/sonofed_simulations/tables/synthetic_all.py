"""All real images, with more and more synthetic ones: the WGAN study's table 6."""

from __future__ import annotations

from sonofed_simulations.tables import synthetic_ratios
from sonofed_simulations.tables.arm_findings import Claim
from sonofed_simulations.tables.arm_page import About
from sonofed_simulations.tables.arm_table import make_arm_table
from sonofed_simulations.tables.arms import Arm
from sonofed_simulations.tables.equal_steps import Steps
from sonofed_simulations.tables.mixtures import (
    NETWORKS,
    SOURCE,
    TARGET,
    Mixture,
    MixtureSettings,
    MixtureTable,
)
from sonofed_simulations.tables.request import Made, Request
from sonofed_simulations.tables.synthetic_words import ADAPTED, WORK, how

COUNTS = (400, 1580)
PUBLISHED = {
    "ResNet-50": (80.26, 61.3, 60.15, 65.62),
    "ViT-16": (74.3, 60.5, 57.4, 60.2),
    "CNN-Transformer": (83, 63.5, 62.27, 63.8),
}
"""Accuracy in %: on the source, then on the target with 0, 400 and 1580 synthetic images."""
QUICK = synthetic_ratios.QUICK.model_copy(
    # One pass over the largest mixture, nearly: what is not seen cannot help.
    update={"training": Steps(steps=100, batch_size=16), "synthetic": max(COUNTS)}
)
FULL = synthetic_ratios.FULL.model_copy(
    update={"training": Steps(steps=6000, batch_size=16), "synthetic": max(COUNTS)}
)


def make(request: Request) -> Made:
    """Make the table; see `make_arm_table`."""
    settings = QUICK if request.quick else FULL
    return make_arm_table(MixtureTable(arms(), settings, about(settings), request), request)


def arms() -> dict[Arm, Mixture]:
    """Of each network: all real images alone, with synthetic ones, and with flips as control."""
    rows = {}
    for network, name in NETWORKS.items():
        source, *target = PUBLISHED[network]
        base = Arm(f"{network}, all real", None, f"{target[0]} (source {source})", SOURCE)
        rows[base] = Mixture(name, None)
        for count, accuracy in zip(COUNTS, target[1:], strict=True):
            arm = Arm(_with(network, count), base.name, str(accuracy), SOURCE)
            rows[arm] = Mixture(name, None, count)
        flips = Arm(f"{network}, all real, flips", base.name, "", SOURCE)
        rows[flips] = Mixture(name, None, flips=True)
    return rows


def _with(network: str, count: int) -> str:
    return f"{network}, all real + up to {count} synthetic"


def about(settings: MixtureSettings) -> About:
    """What the page says beside the numbers."""
    claims = [
        Claim(
            f"With {network} the study reports {before}% of target accuracy on all real images, "
            f"{first}% with {COUNTS[0]} synthetic ones beside them and {last}% with {COUNTS[1]}",
            (_with(network, COUNTS[-1]),),
            TARGET,
            direction=1 if last > before else -1,
        )
        for network, (_, before, first, last) in PUBLISHED.items()
    ]
    claims += [
        Claim(
            "A control: flips, classical augmentation, raise it at equal steps",
            tuple(f"{network}, all real, flips" for network in NETWORKS),
            TARGET,
        ),
        Claim(
            "The study reports lower accuracy on the target than on the source "
            "(80.26, 74.3 and 83% on the source)",
            tuple(f"{network}, all real" for network in NETWORKS),
            "",
            quantity="gap",
        ),
    ]
    return About(
        title="All real images and more and more synthetic ones, from BUSI to BrEaST",
        work=f"table 6 of {WORK}",
        claims=tuple(claims),
        published="published accuracy on the target, %",
        focus=TARGET,
        method=how(settings),
        adapted=ADAPTED,
    )
