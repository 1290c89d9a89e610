"""Differences between methods in the same bootstrap samples of patients, with Holm's correction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sonofed_common.contract.configuration import Model

REPLICATES = 2000
LEVEL = 0.05
Floats = NDArray[np.float64]


class Interval(Model):
    """A number with its 95% interval."""

    value: float
    low: float
    high: float


class Contrast(Interval):
    """A difference in the same bootstrap samples."""

    p: float
    p_holm: float | None = None


C = TypeVar("C", bound=Contrast)


class PatientDraws:
    """How often each patient of each site is drawn in each bootstrap sample.

    Parameters
    ----------
    patients : iterable of (str, iterable of str)
        Site and patients of its test images; a site may come more than once, with the test images
        of other seeds: a patient's images are drawn together wherever they stand.
    """

    def __init__(self, patients: Iterable[tuple[str, Iterable[str]]]) -> None:
        known: dict[str, set[str]] = {}
        for site, names in patients:
            known.setdefault(site, set()).update(names)
        self._drawn: dict[str, tuple[dict[str, int], Floats]] = {}
        for number, site in enumerate(sorted(known)):
            order = {name: n for n, name in enumerate(sorted(known[site]))}
            generator = np.random.default_rng(number)
            share = np.full(len(order), 1 / len(order))
            counts = generator.multinomial(len(order), share, REPLICATES)
            self._drawn[site] = (order, counts.astype(np.float64))

    def weights(self, site: str, patients: Sequence[str]) -> Floats:
        """Weights of images: ones first, then a row a sample.

        Parameters
        ----------
        site : str
            Where the images are.
        patients : sequence of str (N,)
            Patient of each image.

        Returns
        -------
        ndarray of float64 (1 + 2000, N)
        """
        order, counts = self._drawn[site]
        drawn = counts[:, [order[patient] for patient in patients]]
        return np.vstack([np.ones(len(patients)), drawn])


def interval(values: Floats) -> Interval:
    """Estimate and percentiles of values (1 + R,): the estimate first, NaN samples left out."""
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return Interval(value=float(values[0]), low=float(low), high=float(high))


def contrast(values: Floats, reference: Floats) -> Contrast:
    """Difference of values (1 + R,) to a reference (1 + R,) in the same samples; p two-sided."""
    difference = values - reference
    drawn = difference[1:][~np.isnan(difference[1:])]
    tail = min(np.mean(drawn <= 0), np.mean(drawn >= 0))
    p = min(1.0, 2 * max(float(tail), 1 / (len(drawn) + 1)))
    return Contrast(**interval(difference).model_dump(), p=p)


def is_told(found: Contrast) -> bool:
    """Whether a difference is told from 0: by its interval, and by p after Holm's correction."""
    p = found.p if found.p_holm is None else found.p_holm
    return p < LEVEL and not found.low <= 0 <= found.high


def holm(contrasts: Mapping[str, C]) -> dict[str, C]:
    """Correct p values over the contrasts (Holm, Scandinavian Journal of Statistics, 1979)."""
    corrected: dict[str, C] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(contrasts, key=lambda n: contrasts[n].p)):
        found = contrasts[name]
        largest = max(largest, min(1.0, found.p * (len(contrasts) - rank)))
        corrected[name] = found.model_copy(update={"p_holm": largest})
    return corrected
