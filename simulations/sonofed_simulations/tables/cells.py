"""Cells of a selection table: select, train the head, predict; each kept in one small file."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax

from sonofed_common.contract.records import Records, to_bytes
from sonofed_common.contract.selection import budget_count
from sonofed_common.runtime import derive_seed, write_atomically
from sonofed_common.security import sha256
from sonofed_simulations.rivals import (
    STRATEGIES,
    TWO_VIEW_RANDOM,
    UNMIRRORED,
    Pool,
    Strategy,
)
from sonofed_simulations.rivals.pool import UNLABELLED, united
from sonofed_simulations.tables.code import code_of
from sonofed_simulations.tables.features import SiteFeatures
from sonofed_simulations.tables.head import (
    SETTINGS,
    Head,
    Labelled,
    dropout_passes,
    logits,
    train_head,
)
from sonofed_simulations.tables.records import read_records
from sonofed_simulations.tables.settings import (
    CONTROLS,
    SOURCE,
    Chain,
    SelectionTable,
)
from sonofed_simulations.tables.start import Begin

Array = NDArray[Any]
Chosen = dict[str, list[int]]


@dataclass(frozen=True)
class Cell:
    """What one strategy came to with one budget.

    Attributes
    ----------
    chain : Chain
        Strategy and split.
    budget : float
        Share of the pools that was labelled.
    chosen : dict of str to list of int
        Selected images of each site's pool, in order.
    malignant : dict of str to int
        How many of them are malignant.
    predictions : dict of str to tuple
        Labels (M,), P(malignant) (M,) and patients (M,) of each site's test images.
    threshold : float
        Of P(malignant): the operating point of the classifier that it started from.
    seconds : float
        What selection, training and prediction took.
    """

    chain: Chain
    budget: float
    chosen: Chosen
    malignant: dict[str, int]
    predictions: dict[str, tuple[Array, Array, Array]]
    threshold: float
    seconds: float


@cache
def fingerprint(strategy: str) -> str:
    """Digest of a strategy's module, so that cells of an earlier version are made anew.

    Of what it calls elsewhere only the draws of dropout count.
    """
    if strategy in CONTROLS:
        return ""
    text = code_of(inspect.getmodule(STRATEGIES[strategy]) or Pool)
    if STRATEGIES[strategy].uses_passes:
        text += inspect.getsource(dropout_passes)
    return sha256(text.encode())[:16]


def cell_origin(
    chain: Chain,
    budget: float,
    table: SelectionTable,
    begin: Begin,
    features: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What a cell is made of: it is made anew when any of it changes."""
    return {
        "strategy": [chain.strategy, chain.mode, chain.draw, fingerprint(chain.strategy)],
        "budgets": [b for b in chain.budgets if b <= budget],
        "training": table.training.model_dump(mode="json", include=SETTINGS),
        "passes": table.passes,
        "begin": begin.digest,
        "features": [dict(origin) for origin in features],
    }


def run_chain(
    chain: Chain,
    table: SelectionTable,
    begin: Begin,
    sites: Sequence[SiteFeatures],
    origins: Sequence[Mapping[str, Any]],
    folder: Path,
) -> None:
    """Run the cells of a chain that are not there yet.

    Parameters
    ----------
    chain, table
        What to run.
    begin : Begin
        The head that every cell starts from.
    sites : sequence of SiteFeatures
        Of the chain's split.
    origins : sequence of mapping
        Of these features.
    folder : Path
        Where the cells are.
    """
    worker = _Worker(chain, table, begin, sites)
    head: Head | None = begin.head
    chosen: Chosen = {site.name: [] for site in sites}
    for budget in chain.budgets:
        path = folder / chain.path(budget)
        origin = cell_origin(chain, budget, table, begin, origins)
        kept = read_records(path, origin)
        if kept is None:
            began = time.perf_counter()
            # A kept cell holds no head: its selection gives the same one again.
            chosen = worker.select(worker.train(chosen) if head is None else head, chosen, budget)
            head = worker.train(chosen)
            kept = worker.records(head, chosen, origin, time.perf_counter() - began)
            write_atomically(path, to_bytes(kept))
        else:
            chosen, head = kept.config["chosen"], None


def decode(chain: Chain, budget: float, records: Records, threshold: float) -> Cell:
    """Make a cell of what its file holds."""
    predictions = {
        site: (
            records.arrays[f"labels/{site}"],
            records.arrays[f"probabilities/{site}"].astype(np.float64),
            np.array(groups),
        )
        for site, groups in records.config["groups"].items()
    }
    config = records.config
    return Cell(
        chain,
        budget,
        config["chosen"],
        config["malignant"],
        predictions,
        threshold,
        float(records.metrics["seconds"]),
    )


@dataclass(frozen=True)
class _Worker:
    chain: Chain
    table: SelectionTable
    begin: Begin
    sites: Sequence[SiteFeatures]

    @property
    def seed(self) -> int:
        """Of training: the same for every strategy of a split."""
        return derive_seed(self.chain.split.seed, self.chain.split.fold)

    def select(self, head: Head, chosen: Chosen, budget: float) -> Chosen:
        """Top the selection up to a budget."""
        sizes = {site.name: len(site.labels) for site in self.sites}
        if self.chain.strategy in CONTROLS:
            return {
                name: list(range(size)) if self.chain.labels_everything else []
                for name, size in sizes.items()
            }
        strategy = STRATEGIES[self.chain.strategy]
        pools = [self._pool(site, head, chosen[site.name], strategy) for site in self.sites]
        # The budget is the sum of the sites' shares in both modes.
        counts = {name: budget_count(budget, size) for name, size in sizes.items()}
        more = sum(counts.values()) - sum(map(len, chosen.values()))
        # The same images, so that the rows differ in what predictions are made of alone.
        name = TWO_VIEW_RANDOM if self.chain.strategy == UNMIRRORED else self.chain.strategy
        facts = (self.seed, name, self.chain.draw, budget)
        if self.chain.mode == "pooled" or strategy.ranks_globally:
            found = strategy.select(united(pools), more, derive_seed(*facts))
            offsets = np.cumsum([0, *sizes.values()])
            new = {
                name: (found[(found >= low) & (found < high)] - low).tolist()
                for name, low, high in zip(sizes, offsets[:-1], offsets[1:], strict=True)
            }
        else:
            new = {
                pool.site: strategy.select(
                    pool, counts[pool.site] - len(chosen[pool.site]), derive_seed(*facts, pool.site)
                ).tolist()
                for pool in pools
            }
        return {name: [*chosen[name], *new[name]] for name in sizes}

    def train(self, chosen: Chosen) -> Head:
        """Train the head from the start weights on all labels so far."""
        parts = [self._labelled(site, chosen[site.name]) for site in self.sites]
        if self.chain.mode == "pooled":
            views = torch.cat([part.views for part in parts], dim=1)
            parts = [Labelled("pooled", views, torch.cat([part.labels for part in parts]))]
        return self._train(parts)

    def records(
        self, head: Head, chosen: Chosen, origin: Mapping[str, Any], seconds: float
    ) -> Records:
        """Predict the test images, and encode the cell."""
        arrays = {}
        for site in self.sites:
            shown = {SOURCE: site.unadapted, UNMIRRORED: site.unmirrored}.get(
                self.chain.strategy, site.test
            )
            found = softmax(logits(head, shown).astype(np.float64), axis=1)
            arrays[f"probabilities/{site.name}"] = found[:, 1].astype(np.float32)
            arrays[f"labels/{site.name}"] = site.test_labels
        config = {
            "origin": dict(origin),
            "chosen": chosen,
            "malignant": {s.name: int(s.labels[chosen[s.name]].sum()) for s in self.sites},
            "groups": {site.name: list(site.test_groups) for site in self.sites},
        }
        return Records(arrays, config, {"seconds": seconds})

    def _train(self, parts: Sequence[Labelled]) -> Head:
        settings, dropped = self.table.training, self.begin.dropped
        return train_head(self.begin.head, parts, settings, dropped, self.seed)

    def _labelled(self, site: SiteFeatures, chosen: list[int]) -> Labelled:
        views, labels = site.views[:, chosen], site.labels[chosen]
        return Labelled(site.name, torch.from_numpy(views), torch.from_numpy(labels))

    def _pool(self, site: SiteFeatures, head: Head, chosen: list[int], strategy: Strategy) -> Pool:
        features = site.views[0]
        local = head
        if strategy.uses_local and chosen and self.chain.mode == "federated":
            local = self._train([self._labelled(site, chosen)])
        labels = np.full(len(site.labels), UNLABELLED, dtype=np.int64)
        labels[chosen] = site.labels[chosen]
        common = logits(head, features)
        passes = (
            dropout_passes(
                head, features, self.begin.dropped, self.table.passes,
                derive_seed(self.seed, "passes"),
            )
            if strategy.uses_passes
            else np.empty((0, *common.shape), dtype=common.dtype)
        )  # fmt: skip
        return Pool(
            site.name,
            features,
            common,
            logits(local, features),
            passes,
            labels,
            self.begin.centroids,
        )
