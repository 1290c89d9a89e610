"""What a selection strategy sees at a hospital, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

# The rivals take it from here: a cell is kept by the text of its strategy's module.
from sonofed_client.adaptation.entropy import entropy as entropy

Floats = NDArray[np.floating]
Indices = NDArray[np.int64]

UNLABELLED = -1


@dataclass(frozen=True)
class Pool:
    """One hospital's pool, or several hospitals' as one.

    Attributes
    ----------
    site : str
        The hospital's name.
    embeddings : ndarray of float32 (N, F)
        Features of the start model: the source's, normalised by the site's own statistics.
    logits : ndarray of float32 (N, C)
        Of the head that all sites have trained together so far.
    local_logits : ndarray of float32 (N, C)
        Of the head that the site trained on its own labels alone; the same as ``logits`` while it
        has none.
    passes : ndarray of float32 (T, N, C)
        Class probabilities of the common head under T draws of dropout; none where the strategy
        does not look at them.
    labels : ndarray of int64 (N,)
        Classes of the images that are labelled, -1 for the others.
    source_centroids : ndarray of float32 (k, F)
        Unit vectors of the source's images, as shipped with the start model.
    """

    site: str
    embeddings: Floats
    logits: Floats
    local_logits: Floats
    passes: Floats
    labels: Indices
    source_centroids: Floats

    @property
    def probabilities(self) -> Floats:
        """Class probabilities (N, C) of the common head."""
        return np.asarray(softmax(self.logits, axis=1))

    @property
    def local_probabilities(self) -> Floats:
        """Class probabilities (N, C) of the site's own head."""
        return np.asarray(softmax(self.local_logits, axis=1))

    @property
    def unlabelled(self) -> Indices:
        """Indices of the images without a label, ascending."""
        return np.flatnonzero(self.labels == UNLABELLED)

    @property
    def labelled(self) -> Indices:
        """Indices of the images with a label, ascending."""
        return np.flatnonzero(self.labels != UNLABELLED)

    @property
    def unit(self) -> Floats:
        """Embeddings of unit length (N, F)."""
        lengths = np.linalg.norm(self.embeddings, axis=1, keepdims=True)
        return np.asarray(self.embeddings / np.maximum(lengths, 1e-12))


def united(pools: Sequence[Pool]) -> Pool:
    """Several hospitals' pools as one, in their order; centroids are of the first."""
    return Pool(
        site="+".join(pool.site for pool in pools),
        embeddings=np.concatenate([pool.embeddings for pool in pools]),
        logits=np.concatenate([pool.logits for pool in pools]),
        local_logits=np.concatenate([pool.local_logits for pool in pools]),
        passes=np.concatenate([pool.passes for pool in pools], axis=1),
        labels=np.concatenate([pool.labels for pool in pools]),
        source_centroids=pools[0].source_centroids,
    )


class Strategy(Protocol):
    """Chooses the images that are worth a label."""

    @property
    def ranks_globally(self) -> bool:
        """Whether all sites' images are ranked together; else each site has its share."""
        ...

    @property
    def uses_local(self) -> bool:
        """Whether it looks at ``local_logits``; for the others no such head is trained."""
        ...

    @property
    def uses_passes(self) -> bool:
        """Whether it looks at ``passes``; for the others none are drawn."""
        ...

    def select(self, pool: Pool, count: int, seed: int) -> Indices:
        """Choose unlabelled images.

        Parameters
        ----------
        pool : Pool
            What may be seen.
        count : int
            How many to choose, at most as many as have no label.
        seed : int
            Of whatever is drawn.

        Returns
        -------
        ndarray of int64 (count,)
            Distinct indices into the pool, none of a labelled image, best first.
        """
        ...


@dataclass(frozen=True)
class PerSite:
    """A strategy that each site follows on its own, on what the common head tells."""

    ranks_globally: bool = False
    uses_local: bool = False
    uses_passes: bool = False


def best(pool: Pool, scores: Floats, count: int, seed: int) -> Indices:
    """Return the unlabelled images with the highest scores (N,), ties in random order."""
    candidates = np.random.default_rng(seed).permutation(pool.unlabelled)
    order = np.argsort(-scores[candidates], kind="stable")
    return np.asarray(candidates[order[:count]], dtype=np.int64)
