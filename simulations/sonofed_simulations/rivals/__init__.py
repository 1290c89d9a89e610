"""Rivals: the selection strategies that ours are compared with, behind one interface."""

from __future__ import annotations

from sonofed_simulations.rivals.batch_bald import BatchBald
from sonofed_simulations.rivals.diversity import Badge, Clue, CoreSet, ProbCover, TypiClust
from sonofed_simulations.rivals.federated import Feal, Kafal, LoGo
from sonofed_simulations.rivals.learned import LfOSA, Vaal
from sonofed_simulations.rivals.ours import DualScore
from sonofed_simulations.rivals.pool import Pool, Strategy
from sonofed_simulations.rivals.random import Random
from sonofed_simulations.rivals.two_views import (
    CANDIDATES,
    STUDY_PRESET,
    TWO_VIEW_RANDOM,
    TWO_VIEWS,
    UNMIRRORED,
)
from sonofed_simulations.rivals.uncertainty import Bald, MaxEntropy

DUAL_SCORES: dict[str, Strategy] = {
    f"dual-{uncertainty}-{order}": DualScore(uncertainty, order)
    for uncertainty in ("margin", "range")
    for order in ("near", "far", "both")
}
"""The dual score in the variants that the table compares."""

OURS: dict[str, Strategy] = {**DUAL_SCORES, **TWO_VIEWS}
"""What is ours, by the names of the tables."""

STRATEGIES: dict[str, Strategy] = {
    "random": Random(),
    "max-entropy": MaxEntropy(),
    "bald": Bald(),
    "batch-bald": BatchBald(),
    "core-set": CoreSet(),
    "typiclust": TypiClust(),
    "probcover": ProbCover(),
    "clue": Clue(),
    "badge": Badge(),
    "vaal": Vaal(),
    "lfosa": LfOSA(),
    "feal": Feal(),
    "logo": LoGo(),
    "kafal": Kafal(),
    **OURS,
}
"""All strategies by the names of the tables."""

__all__ = [
    "CANDIDATES",
    "DUAL_SCORES",
    "OURS",
    "STRATEGIES",
    "STUDY_PRESET",
    "TWO_VIEWS",
    "TWO_VIEW_RANDOM",
    "UNMIRRORED",
    "Pool",
    "Strategy",
]
