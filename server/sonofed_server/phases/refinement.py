"""The coordinator's half of exact federated selection: it needs summed counts only.

Their finest intervals hold one image each, so they tell the scores to an interval's width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from sonofed_common.contract.errors import QuorumError
from sonofed_common.contract.selection import (
    MAX_PARTS,
    WHOLE,
    Column,
    Counts,
    Keys,
    RankTable,
    budget_count,
    last_keys,
    part_widths,
    ranked_columns,
    stages,
)
from sonofed_common.contract.study import Selection

Query = Callable[[Keys, int], Counts]


@dataclass(frozen=True)
class CountRequest:
    """One question to all sites; the answer is the sum of their counts.

    Attributes
    ----------
    column : str
        What is counted.
    edges : ndarray of uint64 (m, 2)
        Ascending, disjoint intervals ``[low, high)``.
    split : int
        Equal parts per interval.
    cuts : ndarray of uint64 (c, 2)
        Cuts made so far; they say which images are still candidates.
    tied : int or None
        For ``identity``: count only candidates with this informativeness key.
    """

    column: Column
    edges: Keys
    split: int
    cuts: Keys
    tied: int | None = None


def rank_table(query: Query, whole: Keys) -> RankTable:
    """Refine until every bin holds one image or one key value.

    Parameters
    ----------
    query : callable
        ``query(edges (m, 2), split)`` returns the summed counts (m, split).
    whole : ndarray of uint64 (1, 2)
        Interval of all keys.

    Raises
    ------
    QuorumError
        The counts changed between two queries.
    """
    starts: list[Keys] = [np.empty(0, dtype=np.uint64)]
    sizes: list[Counts] = [np.empty(0, dtype=np.int64)]
    waiting, held = whole, np.array([-1], dtype=np.int64)
    while len(waiting):
        # Two parts per interval at least, or a query would refine nothing.
        now, waiting = waiting[: MAX_PARTS // 2], waiting[MAX_PARTS // 2 :]
        now_held, held = held[: MAX_PARTS // 2], held[MAX_PARTS // 2 :]
        parts, counts = _refine(query, now, now_held)
        done = (counts == 1) | (parts[:, 0] == last_keys(parts))
        starts.append(parts[done, 0])
        sizes.append(counts[done])
        waiting = np.concatenate([waiting, parts[~done]])
        held = np.concatenate([held, counts[~done]])
        order = np.argsort(waiting[:, 0])
        waiting, held = waiting[order], held[order]
    start, size = np.concatenate(starts), np.concatenate(sizes)
    order = np.argsort(start)
    return RankTable(start[order], np.concatenate([[0], np.cumsum(size[order])]).astype(np.int64))


def threshold(query: Query, whole: Keys, budget: int) -> tuple[int, int]:
    """Find where the smallest ``budget`` keys end.

    Parameters
    ----------
    query : callable
        ``query(edges (m, 2), split)`` returns the summed counts (m, split).
    whole : ndarray of uint64 (1, 2)
        Interval of all keys.
    budget : int
        Number of images to take; with fewer in the pool, all are below the threshold.

    Returns
    -------
    key : int
        Threshold: ``count(keys < key) + ties == budget``.
    ties : int
        How many of the images with exactly this key belong to the budget as well; 0 where the
        threshold falls between two keys.

    Raises
    ------
    QuorumError
        The counts changed between two queries.
    """
    if budget == 0:
        return int(whole[0, 0]), 0
    interval, held = whole, np.array([-1], dtype=np.int64)
    while True:
        parts, counts = _refine(query, interval, held)
        reached = np.cumsum(counts)
        if len(reached) == 0 or reached[-1] < budget:
            return int(last_keys(interval)[0]) + 1, 0
        border = int(np.searchsorted(reached, budget))
        last = int(last_keys(parts)[border])
        if reached[border] == budget:
            return last + 1, 0
        budget -= int(reached[border] - counts[border])
        if int(parts[border, 0]) == last:
            return last, budget
        interval, held = parts[border : border + 1], counts[border : border + 1]


def select_federated(
    settings: Selection,
    count: Callable[[CountRequest], Counts],
    send_ranks: Callable[[Mapping[str, RankTable]], None],
) -> Keys:
    """Find the cuts that make the sites select what the pooled scores would select.

    Parameters
    ----------
    settings : Selection
        The study's settings.
    count : callable
        Sends a question to every site of the cohort and returns the sum of the counts (m, split);
        it sees no single site's counts where they are summed securely.
    send_ranks : callable
        Sends pooled rank tables to every site; called once, and only where ranks are combined.

    Returns
    -------
    ndarray of uint64 (c, 2)
        A (key, identity) pair per stage of the scope. A candidate is taken if its informativeness
        key is smaller, or equal with a smaller identity: its id, or what a site makes of that.

    Raises
    ------
    QuorumError
        The counts changed between two queries: a site left or its pool changed.
    """
    cuts = np.empty((0, 2), dtype=np.uint64)
    tables: dict[str, RankTable] = {}
    for column in ranked_columns(settings):
        tables[column] = rank_table(_ask(count, column, cuts), WHOLE[column])
    if tables:
        send_ranks(tables)
    plan = stages(settings)
    if not plan:
        return cuts
    # After floors that take nothing, all images are candidates of the first cut of the pool.
    floors = np.zeros([kind for kind, _ in plan].index("pool"), dtype=np.uint64)
    no_cuts = np.stack([floors, floors], axis=1)
    images = int(_ask(count, "informativeness", no_cuts)(WHOLE["informativeness"], 1).sum())
    taken = 0
    for kind, budget in plan:
        room = budget_count(settings.budgets[budget], images) - taken
        query = _ask(count, "informativeness", cuts)
        whole = WHOLE["informativeness"]
        if kind == "floor":
            room = min(room, int(query(whole, 1).sum()))
        key, ties = threshold(query, whole, room)
        identity = 0
        if ties:
            among = _ask(count, "identity", cuts, key)
            identity, _ = threshold(among, WHOLE["identity"], ties)
        cuts = np.concatenate([cuts, np.array([[key, identity]], dtype=np.uint64)])
        taken += room
    return cuts


def _ask(
    count: Callable[[CountRequest], Counts], column: Column, cuts: Keys, tied: int | None = None
) -> Query:
    return lambda edges, split: count(CountRequest(column, edges, split, cuts, tied))


def _refine(query: Query, edges: Keys, held: Counts) -> tuple[Keys, Counts]:
    """Split intervals once; return the parts (p, 2) that hold an image, and their counts (p,)."""
    low, last = edges[:, 0], last_keys(edges)
    widest = int((last - low).max()) + 1
    split = min(MAX_PARTS // len(edges), widest)
    counts = query(edges, split)
    known = held >= 0
    if counts.shape != (len(edges), split) or np.any(counts.sum(axis=1)[known] != held[known]):
        raise QuorumError(
            "the sites' counts changed between two queries of one selection; "
            "repeat the selection with the sites that are left"
        )
    widths = part_widths(edges, split)
    interval, part = np.nonzero(counts)
    starts = low[interval] + part.astype(np.uint64) * widths[interval]
    ends = starts + np.minimum(widths[interval] - np.uint64(1), last[interval] - starts)
    return np.stack([starts, ends + np.uint64(1)], axis=1), counts[interval, part]
