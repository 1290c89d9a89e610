"""What a selection table compares, and in which cells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from sonofed_common.contract.configuration import Model
from sonofed_common.contract.study import Finetuning
from sonofed_server.source.settings import SegmenterTraining
from sonofed_simulations.rivals import (
    STRATEGIES,
    STUDY_PRESET,
    TWO_VIEW_RANDOM,
    TWO_VIEWS,
    UNMIRRORED,
)

Mode = Literal["federated", "pooled"]

RANDOM = "random"
DRAWN = (RANDOM, TWO_VIEW_RANDOM, UNMIRRORED)
FIRST_DRAWS = 3
"""Draws that run before the next split does: more splits say more than more draws."""

SOURCE, BASELINE, ALL_LABELS = "source-only", "bn-adapted", "all-labels"
"""Weights as shipped, with normalisation re-estimated on site, and trained on every label."""
TWO_VIEW_BASELINE, TWO_VIEW_ALL_LABELS = "two-view-bn-adapted", "two-view-all-labels"
"""The last two with both views of an image."""
CONTROLS = (SOURCE, BASELINE, ALL_LABELS, TWO_VIEW_BASELINE, TWO_VIEW_ALL_LABELS)


class SelectionTable(Model):
    """Strategies, budgets, seeds and folds of a selection table.

    Notes
    -----
    Every seed makes ``folds`` patient-level folds. In the first one of each seed all ``budgets``
    are spent, in the others those up to ``main_budget``; pooled cells are of the first folds only.
    Of several ``classifiers`` a row is the mean; rows of two views are of the scenario's alone.
    """

    title: str = "Which images to label: selection strategies side by side"
    scenario: str
    seen: str = Field(
        default="", description="what our strategies had seen of these hospitals, for the page"
    )
    duration: str = Field(default="", description="measured: the source and the features, too")
    classifiers: tuple[str, ...] = Field(
        default=(), description="that rows start from; default: the scenario's first"
    )
    epochs: int | None = Field(
        default=None, ge=1, description="of the source's classifiers; default: the scenario's"
    )
    seeds: tuple[int, ...] = (0, 1, 2)
    folds: int = Field(default=5, ge=2)
    budgets: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5)
    main_budget: float = 0.2
    strategies: tuple[str, ...] = tuple(STRATEGIES)
    draws: int = Field(default=10, ge=1, description="of the strategies that draw at random")
    pooled: bool = Field(default=True, description="also with all sites' pools as one")
    views: int = Field(default=4, ge=1, description="augmentations of each image, the plain one in")
    passes: int = Field(default=10, ge=2, description="draws of dropout that BALD sees")
    training: Finetuning = Finetuning()
    lesions: SegmenterTraining | None = Field(
        default=None, description="outlines the lesions for two views; default: no such rows"
    )

    @field_validator("strategies")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := sorted(set(names) - STRATEGIES.keys()):
            raise ValueError(f"no strategy is called '{unknown[0]}'")
        return names

    @property
    def splits(self) -> list[SplitName]:
        """Folds of all seeds: the first of each seed, then the second ..."""
        return [SplitName(seed, fold) for fold in range(self.folds) for seed in self.seeds]


QUICK = SelectionTable(
    scenario="breast_three_countries",
    seen="On target labels the strategies of the row `sonofed` were chosen, for each site at those "
    "of the other data sets, and that two views predict from mirror images, on one fold of these. "
    "On that fold more was tried and not kept: the project's attempts page says what. The preset "
    f"`sonofed` of a study is another thing: `{STUDY_PRESET}` at every hospital, picked with all "
    "of these in sight, so that its row here is no independent evidence for it. The table "
    "`selection-from-rio` judges it where it was not picked.",
    duration="One of the fifteen splits, made from nothing by one process beside other work on the "
    "same machine, took 36 minutes, 21 of them for the training of the source, and gave the "
    "committed cells bit for bit; so all of it takes about four hours, and with two processes "
    "less.",
    lesions=SegmenterTraining(epochs=12, learning_rate=1e-3, batch_size=8),
)
"""One classifier, 128 px, three seeds, five folds: hours on two cores."""


FULL = SelectionTable(
    scenario="breast_three_countries",
    classifiers=("resnet50", "mobilenet_v2", "densenet121", "shufflenet_v2", "efficientnet_b0"),
    epochs=100,
    seeds=(0, 1, 2, 3, 4),
    views=8,
    lesions=QUICK.lesions,
)
"""The paper's five classifiers, for a machine with a GPU and many cores."""

FROM_RIO: dict[str, Any] = {
    "duration": "",
    "title": "Which images to label, with the source in Rio: BUSI is judged, too",
    "scenario": "breast_from_rio",
    "seen": "Two views, the mirror image and the preset `sonofed` of a study, which is "
    f"`{STUDY_PRESET}`, were settled on the table `adaptation-selection`, whose source is BUSI: "
    "`cairo` (BUSI) had no part in that as a hospital, and is judged here for the first time. "
    "`rio-logiq5`, `rio-aplio` and `poland` had a part in it, though from another source. Nothing "
    "was chosen or changed after a look at this table. The row `sonofed` takes for each site what "
    "did best at the sites of the other data sets.",
}
FULL_FROM_RIO = FULL.model_copy(update=FROM_RIO)
"""The same with the source in Rio de Janeiro, and BUSI a hospital."""
QUICK_FROM_RIO = QUICK.model_copy(
    update={**FROM_RIO, "seeds": (0,), "budgets": (0.1, 0.2), "draws": 3, "pooled": False}
)
"""One seed, whose five folds test each image once."""


@dataclass(frozen=True, order=True)
class SplitName:
    """One patient-level fold of one seed."""

    seed: int
    fold: int

    def __str__(self) -> str:
        return f"seed-{self.seed}-fold-{self.fold}"


@dataclass(frozen=True)
class Chain:
    """One strategy's way through the budgets of one split.

    Attributes
    ----------
    strategy : str
        One of `STRATEGIES`, or of `CONTROLS`.
    mode : str
        ``federated``: each site selects and trains, heads are averaged. ``pooled``: one site that
        has all sites' pools.
    draw : int
        Of a strategy that draws at random; 0 for the others.
    split : SplitName
        Which images are in the pools.
    budgets : tuple of float
        Shares of the pools that are labelled, ascending; a control has one.
    classifier : str
        That it starts from, in a table of several.
    """

    strategy: str
    mode: Mode
    draw: int
    split: SplitName
    budgets: tuple[float, ...]
    classifier: str = ""

    @property
    def two_views(self) -> bool:
        """Whether it sees the lesion beside the image."""
        return self.strategy in (*TWO_VIEWS, TWO_VIEW_BASELINE, TWO_VIEW_ALL_LABELS)

    @property
    def labels_everything(self) -> bool:
        """Whether it is a control that is trained on every label."""
        return self.strategy in (ALL_LABELS, TWO_VIEW_ALL_LABELS)

    def path(self, budget: float) -> Path:
        """Where the cell of a budget is kept, under the folder of the cells."""
        name = f"{self.strategy}-{self.draw}" if self.strategy in DRAWN else self.strategy
        folder = Path(self.classifier) / str(self.split) / self.mode / name
        return folder / f"{budget:g}.safetensors"


def chains(table: SelectionTable) -> Iterator[Chain]:
    """All chains, those that say most first: every split with few draws, more draws, pooled."""
    for draws in (range(FIRST_DRAWS), range(FIRST_DRAWS, table.draws)):
        for split in table.splits:
            wanted = list(_controls(table, split)) if 0 in draws else []
            for name in table.strategies:
                if table.lesions is not None or name not in TWO_VIEWS:
                    wanted += _draws(table, name, "federated", split, draws)
            yield from _from_each(table, wanted)
    for split in table.splits:
        wanted = []
        for name in table.strategies:
            has_start = table.lesions is not None or name not in TWO_VIEWS
            if table.pooled and split.fold == 0 and has_start:
                wanted += _draws(table, name, "pooled", split, range(table.draws))
        yield from _from_each(table, wanted)


def _from_each(table: SelectionTable, wanted: Sequence[Chain]) -> Iterator[Chain]:
    """Chains from each classifier in turn, whose features are read once, then of two views."""
    for name in table.classifiers or ("",):
        yield from (replace(chain, classifier=name) for chain in wanted if not chain.two_views)
    yield from (chain for chain in wanted if chain.two_views)


def _controls(table: SelectionTable, split: SplitName) -> Iterator[Chain]:
    for name in CONTROLS:
        chain = Chain(name, "federated", 0, split, (0.0,))
        if table.lesions is not None or not chain.two_views:
            yield replace(chain, budgets=(1.0,)) if chain.labels_everything else chain


def _draws(
    table: SelectionTable, name: str, mode: Mode, split: SplitName, draws: Iterable[int]
) -> Iterator[Chain]:
    budgets = tuple(b for b in table.budgets if split.fold == 0 or b <= table.main_budget)
    for draw in draws:
        if draw < (table.draws if name in DRAWN else 1):
            yield Chain(name, mode, draw, split, budgets)
