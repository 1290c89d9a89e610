"""Strategies made for federated learning: they weigh the common head against the site's own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import digamma, rel_entr, softmax
from scipy.stats import dirichlet
from sklearn.cluster import KMeans

from sonofed_simulations.rivals.pool import UNLABELLED, Floats, Indices, Pool, best, entropy

NEIGHBOURS, LIKENESS = 5, 0.85
"""FEAL's: an image waits where one of its 5 nearest above this cosine was taken."""


@dataclass(frozen=True)
class PerSiteWithOwnHead:
    """A strategy that each site follows on its own, with a head trained on its own labels."""

    ranks_globally: bool = False
    uses_local: bool = True
    uses_passes: bool = False


@dataclass(frozen=True)
class Feal(PerSiteWithOwnHead):
    """Calibrated evidential sampling with diversity relaxation (Chen et al., CVPR 2024).

    Adapted: the heads are trained by the cross-entropy that all strategies share, not by the
    evidential loss; their logits are read as evidence, ``alpha = relu(logits) + 1``. Where the
    relaxation leaves fewer images than the budget, the most uncertain of the rest fill it.
    """

    def select(self, pool: Pool, count: int, seed: int) -> Indices:
        """See `Strategy.select`."""
        common, local = (np.maximum(x, 0) + 1.0 for x in (pool.logits, pool.local_logits))
        epistemic = np.array([dirichlet.entropy(alpha) for alpha in common.astype(np.float64)])
        span = np.ptp(epistemic)
        calibration = (epistemic - epistemic.min()) / span if span > 0 else np.ones(len(common))
        scores = calibration * (_aleatoric(common) + _aleatoric(local))
        order = best(pool, scores, len(pool.unlabelled), seed)
        chosen = _relaxed(order, pool.unit, count)
        rest = [i for i in order.tolist() if i not in set(chosen)]
        return np.array([*chosen, *rest][:count], dtype=np.int64)


def _aleatoric(alpha: Floats) -> Floats:
    """Expected entropy (N,) of a class drawn from Dirichlet distributions (N, C)."""
    total = alpha.sum(axis=1, keepdims=True)
    return np.asarray((alpha / total * (digamma(total + 1) - digamma(alpha + 1))).sum(axis=1))


def _relaxed(order: Indices, unit: Floats, count: int) -> list[int]:
    """Walk down the order and pass over images next to a chosen one."""
    chosen: list[int] = []
    taken = np.zeros(len(unit), dtype=np.bool_)
    candidates = np.zeros(len(unit), dtype=np.bool_)
    candidates[order] = True
    for image in order.tolist():
        if len(chosen) == count:
            break
        cosine = np.where(candidates, unit @ unit[image], -np.inf)
        cosine[image] = -np.inf
        nearest = np.argsort(-cosine, kind="stable")[:NEIGHBOURS]
        if not taken[nearest[cosine[nearest] > LIKENESS]].any():
            taken[image] = True
            chosen.append(image)
    return chosen


@dataclass(frozen=True)
class LoGo(PerSiteWithOwnHead):
    """Clusters by the local head, the most uncertain of each by the common (Kim et al., CVPR 2023).

    Adapted: k-means runs over the gradients of the head, as in the paper, but on the start model's
    features, for heads alone are trained. At the first budget the local head is the common one.
    Clusters that k-means leaves empty go to the most uncertain of the rest.
    """

    def select(self, pool: Pool, count: int, seed: int) -> Indices:
        """See `Strategy.select`."""
        candidates = pool.unlabelled
        local = pool.local_probabilities[candidates]
        errors = local - np.eye(local.shape[1])[local.argmax(axis=1)]
        gradients = (errors[:, :, None] * pool.embeddings[candidates][:, None]).reshape(
            len(candidates), -1
        )
        clusters = KMeans(count, n_init=1, random_state=seed % 2**32).fit_predict(gradients)
        scores = entropy(pool.probabilities[candidates])
        order = np.argsort(-scores, kind="stable")
        # The first of each cluster; clusters that k-means left empty go to the next most uncertain.
        _, firsts = np.unique(clusters[order], return_index=True)
        leaders = order[np.sort(firsts)]
        rest = order[~np.isin(order, leaders)]
        return candidates[np.concatenate((leaders, rest))[:count]]


@dataclass(frozen=True)
class Kafal(PerSiteWithOwnHead):
    """Where common and local head differ on the site's special knowledge (Cao et al., ICCV 2023).

    Adapted: its sampling alone; its compensatory training is left out, for all strategies train
    the same way. Class shares of the site's labels weigh both heads, one label of each class added.
    Where there is no other head, at the first budget and on pooled sites, it draws at random.
    """

    def select(self, pool: Pool, count: int, seed: int) -> Indices:
        """See `Strategy.select`."""
        known = pool.labels[pool.labels != UNLABELLED]
        counts = np.bincount(known, minlength=pool.logits.shape[1]) + 1.0
        knowledge = np.log(counts / counts.sum())
        local = softmax(pool.local_logits.astype(np.float64) + knowledge, axis=1)
        common = softmax(pool.logits.astype(np.float64) + knowledge, axis=1)
        difference = (rel_entr(local, common) + rel_entr(common, local)).sum(axis=1) / 2
        return best(pool, difference, count, seed)
