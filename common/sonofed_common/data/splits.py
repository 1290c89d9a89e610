"""Splits into a pool and a test part that share no patient."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.data.sample import Sample

Labels = Counter[int | None]


@dataclass(frozen=True)
class Split:
    """Two parts of a set.

    Attributes
    ----------
    pool : tuple of Sample
        Images to train on or to select from.
    test : tuple of Sample
        Images to evaluate on.
    """

    pool: tuple[Sample, ...]
    test: tuple[Sample, ...]


def split_by_group(samples: Sequence[Sample], test_fraction: float, seed: int) -> Split:
    """Split by group (patient, or duplicates), stratified by label.

    Parameters
    ----------
    samples : sequence of Sample
        A set; images without a label count as a class of their own.
    test_fraction : float
        Share of the images of each class wanted in the test part, in (0, 1).
    seed : int
        The same seed gives the same split.

    Returns
    -------
    Split
        Both parts keep the order of ``samples`` and are not empty; each holds every class that has
        two groups or more, as far as groups of mixed labels allow it.

    Raises
    ------
    ConfigurationError
        The fraction is out of range, or there are fewer than two groups.

    Notes
    -----
    Groups come in random order; one joins the test part when that brings the counts of its classes
    nearer to the wanted ones, so the test part is a random draw of patients, not of the largest.
    """
    if not 0 < test_fraction < 1:
        raise ConfigurationError(f"test_fraction is {test_fraction}; give a share between 0 and 1")
    groups: defaultdict[str, Labels] = defaultdict(Counter)
    for sample in samples:
        groups[sample.group][sample.label] += 1
    if len(groups) < 2:
        raise ConfigurationError(
            "a split needs images of at least two patients or groups; add data or use one part"
        )
    totals: Labels = Counter(sample.label for sample in samples)
    carriers: Labels = Counter(label for counts in groups.values() for label in counts)
    # One image at least of a class, unless one patient has them all: training needs those.
    wanted = {
        label: max(float(carriers[label] > 1), test_fraction * count)
        for label, count in totals.items()
    }
    names = sorted(groups)
    order = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    held: Labels = Counter()
    test: set[str] = set()
    for name in order:
        if _gain(groups[name], held, wanted) > 0:
            test.add(name)
            held.update(groups[name])
    pool = set(order) - test
    _complete(test, pool, groups, order)
    _complete(pool, test, groups, order)
    return Split(
        tuple(s for s in samples if s.group in pool), tuple(s for s in samples if s.group in test)
    )


def folds_by_group(samples: Sequence[Sample], folds: int, seed: int) -> list[Split]:
    """Split into folds by group (patient, or duplicates), stratified by label.

    Parameters
    ----------
    samples : sequence of Sample
        A set; images without a label count as a class of their own.
    folds : int
        Number of folds, at least 2.
    seed : int
        The same seed gives the same folds.

    Returns
    -------
    list of Split
        Each image is in the test part of exactly one; both parts keep the order of ``samples``.

    Raises
    ------
    ConfigurationError
        There are fewer groups than folds, or images of every class, or fewer than two folds.
    """
    groups = [sample.group for sample in samples]
    largest = max(Counter(sample.label for sample in samples).values(), default=0)
    if folds < 2 or len(set(groups)) < folds or largest < folds:
        raise ConfigurationError(
            f"{folds} folds of {len(set(groups))} patients or groups, with {largest} images of the "
            "larger class, cannot be made; use two folds or more, and no more than of either"
        )
    # Imported here: sites split too, and start faster without it.
    from sklearn.model_selection import StratifiedGroupKFold

    labels = [-1 if sample.label is None else sample.label for sample in samples]
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed % 2**32)
    return [
        Split(tuple(samples[i] for i in pool), tuple(samples[i] for i in test))
        for pool, test in splitter.split(labels, labels, groups)
    ]


def _gain(group: Labels, held: Labels, wanted: Mapping[int | None, float]) -> float:
    """How much nearer the counts come to the wanted ones, in relative squares, with the group."""
    return sum(
        ((held[label] - wanted[label]) ** 2 - (held[label] + count - wanted[label]) ** 2)
        / wanted[label] ** 2
        for label, count in group.items()
    )


def _complete(
    taker: set[str], giver: set[str], groups: Mapping[str, Labels], order: Sequence[str]
) -> None:
    """Move the smallest group of each class that the taker lacks, where the giver keeps another."""
    carriers: Labels = Counter(label for name in giver for label in groups[name])
    present = {label for name in taker for label in groups[name]}
    for label in sorted(carriers, key=str):
        if label in present:
            continue
        spare = [
            name
            for name in order
            if name in giver
            and label in groups[name]
            and all(carriers[other] > 1 for other in groups[name])
        ]
        if spare:
            smallest = min(spare, key=lambda name: groups[name].total())
            giver.remove(smallest)
            taker.add(smallest)
            carriers.subtract(dict.fromkeys(groups[smallest], 1))
            present |= set(groups[smallest])
    if not taker:
        smallest = min((n for n in order if n in giver), key=lambda name: groups[name].total())
        giver.remove(smallest)
        taker.add(smallest)


def check_no_leak(split: Split) -> None:
    """Make sure that no patient or group of duplicates is in both parts.

    Parameters
    ----------
    split : Split
        Any split, also one that was read from a file.

    Raises
    ------
    ConfigurationError
        A group is in both parts.
    """
    shared = {s.group for s in split.pool} & {s.group for s in split.test}
    if shared:
        raise ConfigurationError(
            f"{len(shared)} patients or groups of duplicates are in both the pool and the test "
            "part; split by group"
        )
