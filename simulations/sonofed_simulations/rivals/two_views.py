"""Our own method: the image and its lesion seen by two networks, under a known strategy."""

from __future__ import annotations

from sonofed_simulations.rivals.diversity import Badge, Clue, TypiClust
from sonofed_simulations.rivals.federated import Feal
from sonofed_simulations.rivals.pool import Strategy
from sonofed_simulations.rivals.random import Random
from sonofed_simulations.rivals.uncertainty import MaxEntropy

TWO_VIEW_RANDOM = "two-view-random"
UNMIRRORED = "two-view-random-unmirrored"
"""The same images labelled, but predictions of the images alone, without their mirror images."""

STUDY_PRESET = "two-view-typiclust"
"""What the preset ``sonofed`` of a study does, on heads alone."""

CANDIDATES: dict[str, Strategy] = {
    TWO_VIEW_RANDOM: Random(),
    "two-view-max-entropy": MaxEntropy(),
    "two-view-clue": Clue(),
    "two-view-badge": Badge(),
    "two-view-feal": Feal(),
    STUDY_PRESET: TypiClust(),
}
"""The candidates of the preset: what chooses the images whose two views are learnt from."""

TWO_VIEWS: dict[str, Strategy] = {**CANDIDATES, UNMIRRORED: Random()}
"""All that see two views."""
