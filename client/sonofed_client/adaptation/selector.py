"""The site's half of exact federated selection: it answers counts of its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sonofed_client.adaptation.ranking import (
    Scores,
    identity_keys,
    interval_counts,
    keys,
    order_angle,
    order_component,
)
from sonofed_common.contract.errors import OrderError, ParameterError
from sonofed_common.contract.selection import (
    WHOLE,
    Column,
    Counts,
    Keys,
    RankTable,
    Stage,
    budget_count,
    floor_count,
    last_keys,
    ranked_columns,
    stages,
)
from sonofed_common.contract.study import Selection
from sonofed_common.runtime import derive_seed

Mask = NDArray[np.bool_]


class PoolSelector:
    """One site's pool, its scores, and the questions about them that it answers.

    Parameters
    ----------
    ids : sequence of str
        Image ids, 16 hexadecimal digits each.
    settings : Selection
        The study's settings.
    seed : int
        The study's seed; strategy ``random`` hashes it with the draw and the image id.
    uncertainty, representativeness : ndarray of float32 (n,), optional
        Angles in [0, pi] that belong to the ids; small u is uncertain. Of ``dual_score``.
    secret : bytes, optional
        Of the site, for these scores: ties are broken by the ids' HMAC under it, so that no id is
        counted; default: by the ids.
    informativeness : ndarray of float64 (n,), optional
        Not negative; small is taken first. Of ``entropy`` and ``typiclust``.

    Raises
    ------
    ParameterError
        Ids or scores do not validate, or their numbers differ.

    Notes
    -----
    An answer depends on the arguments of the question and on the rank tables alone, so a repeated
    or resumed question gets the same answer. What breaks ties is distinct over all sites: two
    images that tie at the last place of a budget by score and by that number are both left out.
    """

    def __init__(
        self,
        ids: Sequence[str],
        settings: Selection,
        seed: int,
        uncertainty: Scores | None = None,
        representativeness: Scores | None = None,
        secret: bytes | None = None,
        informativeness: Scores | None = None,
    ) -> None:
        self.ids = tuple(ids)
        self.settings = settings
        self._identity = identity_keys(self.ids, secret)
        self._scores: dict[Column, Scores] = {}
        self._informativeness: Keys | None = None
        if settings.strategy == "random":
            hashed = [derive_seed(seed, settings.draw, i) for i in self.ids]
            self._informativeness = np.array(hashed, dtype=np.uint64)
            return
        if settings.looks_through_classifier:
            if informativeness is None:
                raise ParameterError(f"strategy '{settings.strategy}' needs the informativeness")
            if informativeness.dtype != np.float64 or informativeness.shape != (len(self.ids),):
                raise ParameterError("informativeness is not one float64 number per image")
            self._informativeness = keys(informativeness)
            return
        if uncertainty is None or representativeness is None:
            raise ParameterError("the dual score needs uncertainty and representativeness")
        self._scores = {"uncertainty": uncertainty, "representativeness": representativeness}
        for column, scores in self._scores.items():
            if scores.dtype != np.float32 or scores.shape != (len(self.ids),):
                raise ParameterError(f"{column} is not one float32 number per image")
            if np.any(keys(scores) > last_keys(WHOLE[column])):
                raise ParameterError(f"{column} exceeds pi; give angles in radians")
        if settings.combine == "radians":
            angle = order_angle(representativeness.astype(np.float64), settings.distance_order)
            self._informativeness = keys(uncertainty.astype(np.float64) + settings.omega * angle)

    def set_ranks(self, tables: Mapping[str, RankTable]) -> None:
        """Form the informativeness ``rank_u + omega * component(rank_r)`` from pooled ranks.

        Parameters
        ----------
        tables : mapping of str to RankTable
            One for each of `ranked_columns`; with none to rank, nothing changes.

        Raises
        ------
        ParameterError
            A table is missing, or is not of a pool that these images were in.
        """
        columns = ranked_columns(self.settings)
        if any(column not in tables for column in columns):
            raise ParameterError(f"the rank tables of {' and '.join(columns)} are needed")
        ranks = [tables[column].ranks(keys(self._scores[column])) for column in columns]
        if not ranks:
            return
        total = ranks[0][0].astype(np.float64)
        for below, above in ranks[1:]:
            component = order_component(below, above, self.settings.distance_order)
            total = total + self.settings.omega * component
        self._informativeness = keys(total)

    def counts(
        self, column: Column, edges: Keys, split: int, cuts: Keys, tied: int | None = None
    ) -> Counts:
        """Answer one question of the coordinator.

        Parameters
        ----------
        column : str
            ``uncertainty`` and ``representativeness`` count all images; ``informativeness`` counts
            the candidates of the next cut; ``identity`` counts those of them whose informativeness
            key is ``tied``, by what breaks their tie.
        edges : ndarray of uint64 (m, 2)
            Intervals as for `interval_counts`.
        split : int
            Parts per interval.
        cuts : ndarray of uint64 (c, 2)
            The cuts made so far.
        tied : int, optional
            A key of the informativeness; ``identity`` needs it.

        Returns
        -------
        ndarray of int64 (m, split)

        Raises
        ------
        ParameterError
            The question does not validate or does not fit the study's settings.
        OrderError
            The informativeness is asked for before the pooled ranks are known.
        """
        _check_cuts(cuts)
        if column == "identity" and tied is None:
            raise ParameterError("identities are counted of tied images only; name their key")
        if column in ("informativeness", "identity"):
            plan = stages(self.settings)
            if len(cuts) >= len(plan):
                raise ParameterError("all cuts of this study were made; ask for the selection")
            candidates = self._candidates(plan[len(cuts)], self._taken(cuts)[0])
            if column == "informativeness":
                return interval_counts(self._keys()[candidates], edges, split)
            candidates &= self._keys() == np.uint64(tied or 0)
            return interval_counts(self._identity[candidates], edges, split)
        if column not in self._scores:
            raise ParameterError(f"this study does not score {column}")
        return interval_counts(keys(self._scores[column]), edges, split)

    def select(self, cuts: Keys) -> list[list[str]]:
        """Return the selected ids of each budget, most informative first.

        A larger budget holds all that a smaller one holds.

        Parameters
        ----------
        cuts : ndarray of uint64 (c, 2)
            All cuts of the study, none for scope ``per_site``.

        Raises
        ------
        ParameterError
            The number of cuts is not the scope's.
        OrderError
            The pooled ranks are not known yet.
        """
        _check_cuts(cuts)
        if len(cuts) != len(stages(self.settings)):
            raise ParameterError("the number of cuts does not fit the study's scope and budgets")
        if self.settings.scope == "per_site":
            best = self._order()
            sizes = [budget_count(b, len(self.ids)) for b in self.settings.budgets]
            return [[self.ids[i] for i in best[:size]] for size in sizes]
        _, masks = self._taken(cuts)
        return [[self.ids[i] for i in self._order() if mask[i]] for mask in masks]

    def _keys(self) -> Keys:
        if self._informativeness is None:
            raise OrderError("the pooled ranks are not known yet; send the rank tables first")
        return self._informativeness

    def _order(self) -> list[int]:
        order: list[int] = np.lexsort((self._identity, self._keys())).tolist()
        return order

    def _candidates(self, stage: Stage, taken: Mask) -> Mask:
        kind, budget = stage
        if kind == "pool":
            return ~taken
        share = self.settings.budgets[budget]
        size = floor_count(self.settings.site_floor, share, len(self.ids))
        best = np.zeros(len(self.ids), dtype=np.bool_)
        best[self._order()[:size]] = True
        return best & ~taken

    def _taken(self, cuts: Keys) -> tuple[Mask, list[Mask]]:
        """Replay the cuts: what is taken now, and what was taken when each budget was full."""
        taken = np.zeros(len(self.ids), dtype=np.bool_)
        after: dict[int, Mask] = {}
        for stage, (key, identity) in zip(stages(self.settings), cuts, strict=False):
            values = self._keys()
            inside = (values < key) | ((values == key) & (self._identity < identity))
            taken = taken | (self._candidates(stage, taken) & inside)
            after[stage[1]] = taken
        return taken, [after[b] for b in sorted(after)]


def _check_cuts(cuts: Keys) -> None:
    if cuts.dtype != np.uint64 or cuts.ndim != 2 or cuts.shape[1] != 2:
        raise ParameterError("the cuts are not (c, 2) uint64 pairs of key and identity")
