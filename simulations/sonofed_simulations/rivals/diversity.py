"""Strategies that spread the labels over the pool, most of them by scikit-activeml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import softmax
from skactiveml import pool as library
from skactiveml.base import SkactivemlClassifier

from sonofed_client.adaptation.typiclust import typiclust
from sonofed_simulations.rivals.pool import UNLABELLED, Floats, Indices, PerSite, Pool

RADII = np.arange(0.02, 1.5, 0.02)
"""Candidate radii of a ball of unit vectors, for ProbCover."""
CLUE_TEMPERATURE = 0.5


def labels_of(pool: Pool) -> Floats:
    """Labels (N,) as the library has them: NaN for none."""
    return np.where(pool.labels == UNLABELLED, np.nan, pool.labels.astype(np.float64))


class _Known(SkactivemlClassifier):  # type: ignore[misc]
    """A classifier whose predictions are known: its input is the index of the image."""

    def __init__(self, probabilities: Any, embeddings: Any) -> None:
        super().__init__(classes=list(range(probabilities.shape[1])))
        self.probabilities, self.embeddings = probabilities, embeddings

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> _Known:
        return self

    def predict_proba(self, X: Any, embedded: bool = False) -> Any:
        chosen = np.asarray(X)[:, 0].astype(np.int64)
        return self.probabilities[chosen], self.embeddings[chosen]


def _indices(found: Any) -> Indices:
    return np.asarray(found, dtype=np.int64)


def _numbers(pool: Pool) -> Floats:
    return np.arange(len(pool.labels), dtype=np.float64)[:, None]


@dataclass(frozen=True)
class CoreSet(PerSite):
    """Farthest-first cover of the pool (Sener and Savarese, ICLR 2018), by scikit-activeml.

    Adapted: the embedding stays that of the start model, and the first image is a random one.
    """

    def select(self, pool: Pool, count: int, seed: int) -> Indices:
        """See `Strategy.select`."""
        strategy = library.CoreSet(random_state=seed % 2**32)
        return _indices(strategy.query(pool.embeddings, labels_of(pool), batch_size=count))


@dataclass(frozen=True)
class TypiClust(PerSite):
    """The most typical image of each uncovered cluster (Hacohen et al., ICML 2022).

    Adapted: on unit features of the start model, not self-supervised ones; clusters are as many as
    labels. It is the strategy of a study, by the same code.
    """

    def select(self, pool: Pool, count: int, seed: int) -> Indices:
        """See `Strategy.select`."""
        return typiclust(pool.unit, pool.labelled, count, seed % 2**32)


@dataclass(frozen=True)
class ProbCover(PerSite):
    """Balls that cover most of the pool (Yehuda et al., NeurIPS 2022), by scikit-activeml.

    Adapted: on unit features of the start model; the radius is the largest of .02, .04 up to 1.48
    whose balls are pure by 95% in a 2-means clustering, as the paper chooses it.
    """

    def select(self, pool: Pool, count: int, seed: int) -> Indices:
        """See `Strategy.select`."""
        strategy = library.ProbCover(
            n_classes=pool.logits.shape[1], deltas=RADII, random_state=seed % 2**32
        )
        return _indices(strategy.query(pool.unit, labels_of(pool), batch_size=count))


@dataclass(frozen=True)
class Clue(PerSite):
    """Entropy-weighted k-means, the image next to each centre (Prabhu et al., ICCV 2021).

    Adapted: by scikit-activeml, on features of the start model; softmax temperature 0.5.
    """

    def select(self, pool: Pool, count: int, seed: int) -> Indices:
        """See `Strategy.select`."""
        sharp = np.asarray(softmax(pool.logits / CLUE_TEMPERATURE, axis=1))
        strategy = library.Clue(
            predict_dict={"embedded": True},
            cluster_algo_dict={"random_state": seed % 2**32, "n_init": 1},
            random_state=seed % 2**32,
        )
        found = strategy.query(
            _numbers(pool),
            labels_of(pool),
            _Known(sharp, pool.embeddings),
            fit_estimator=False,
            batch_size=count,
        )
        return _indices(found)


@dataclass(frozen=True)
class Badge(PerSite):
    """k-means++ over the head's gradients (Ash et al., ICLR 2020), by scikit-activeml.

    Adapted: nothing; the head is the only layer that is trained.
    """

    def select(self, pool: Pool, count: int, seed: int) -> Indices:
        """See `Strategy.select`."""
        strategy = library.Badge(clf_embedding_flag_name="embedded", random_state=seed % 2**32)
        found = strategy.query(
            _numbers(pool),
            labels_of(pool),
            _Known(pool.probabilities, pool.embeddings),
            fit_clf=False,
            batch_size=count,
        )
        return _indices(found)
