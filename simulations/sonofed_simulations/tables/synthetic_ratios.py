"""Real to synthetic images in five ratios: the WGAN study's tables 2 to 5."""

from __future__ import annotations

from typing import Literal

from sonofed_common.contract.study_synthesis import WganTraining
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

REAL = 100
RATIOS = (25, 50, 75, 100)
PUBLISHED = {
    "ResNet-50": (71.4, 65, 66, 63, 64, 66),
    "ViT-16": (70, 55, 50, 58, 55, 55),
    "CNN-Transformer": (76.4, 63.6, 65, 65, 65.4, 65),
}
"""Accuracy in %: on the source, then on the target with 0, 25, 50, 75 and 100 synthetic images."""
WAYS: dict[Literal[1, -1], str] = {1: "more,", -1: "less,"}
QUICK = MixtureSettings(
    image_size=64,
    seeds=(0, 1, 2),
    training=Steps(steps=80, batch_size=8),
    # With one step of the critic for each of the generator's, classes collapse to a few images.
    wgan=WganTraining(steps=2000, batch_size=16, width=64, critic_steps=3, learning_rate=2e-4),
    synthetic=max(RATIOS),
)
FULL = MixtureSettings(
    image_size=128,
    seeds=(0, 1, 2, 3, 4),
    training=Steps(steps=3000, batch_size=16),
    wgan=WganTraining(),
    synthetic=max(RATIOS),
)


def make(request: Request) -> Made:
    """Make the table; see `make_arm_table`."""
    settings = QUICK if request.quick else FULL
    mixtures = arms()
    return make_arm_table(MixtureTable(mixtures, settings, about(settings), request), request)


def arms() -> dict[Arm, Mixture]:
    """Of each network: the ratios, and flips and twice the real images as controls."""
    rows = {}
    for network, name in NETWORKS.items():
        source, *target = PUBLISHED[network]
        base = Arm(f"{network}, {REAL} real", None, f"{target[0]} (source {source})", SOURCE)
        rows[base] = Mixture(name, REAL)
        for count, accuracy in zip(RATIOS, target[1:], strict=True):
            arm = Arm(_with(network, count), base.name, str(accuracy), SOURCE)
            rows[arm] = Mixture(name, REAL, count)
        rows[Arm(f"{network}, {REAL} real, flips", base.name, "", SOURCE)] = Mixture(
            name, REAL, flips=True
        )
        rows[Arm(f"{network}, {2 * REAL} real", base.name, "", SOURCE)] = Mixture(name, 2 * REAL)
    return rows


def _claim(network: str, way: Literal[1, -1]) -> Claim | None:
    """What the study reports of the ratios that moved one way; None where none did."""
    _, before, *after = PUBLISHED[network]
    moved = {n: a for n, a in zip(RATIOS, after, strict=True) if (a - before) * way > 0}
    if not moved:
        return None
    numbers = ", ".join(f"{a}% with {n}" for n, a in moved.items())
    return Claim(
        f"With {network} the study reports {before}% of target accuracy without synthetic images "
        f"and {WAYS[way]} {numbers}",
        tuple(_with(network, count) for count in moved),
        TARGET,
        way,
    )


def _with(network: str, count: int) -> str:
    return f"{network}, {REAL} real + {count} synthetic"


def about(settings: MixtureSettings) -> About:
    """What the page says beside the numbers."""
    claims = [
        claim for network in NETWORKS for way in WAYS if (claim := _claim(network, way)) is not None
    ]
    flips = tuple(f"{network}, {REAL} real, flips" for network in NETWORKS)
    more = tuple(f"{network}, {2 * REAL} real" for network in NETWORKS)
    claims += [
        Claim("A control: flips, classical augmentation, raise it at equal steps", flips, TARGET),
        Claim("A control: as many real images more raise it", more, TARGET),
        Claim(
            "The study reports lower accuracy on the target than on the source "
            "(71.4, 70 and 76.4% on the source)",
            tuple(f"{network}, {REAL} real" for network in NETWORKS),
            "",
            quantity="gap",
        ),
    ]
    return About(
        title="Real and synthetic images in five ratios, from BUSI to BrEaST",
        work=f"tables 2 to 5 of {WORK}",
        claims=tuple(claims),
        published="published accuracy on the target, %",
        focus=TARGET,
        method=how(settings),
        adapted=ADAPTED,
    )
