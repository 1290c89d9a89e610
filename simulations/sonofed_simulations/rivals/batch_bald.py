"""BatchBALD: the batch whose labels together tell most of the weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from skactiveml.utils import rand_argmax

from sonofed_simulations.rivals.pool import Floats, Indices, PerSite, Pool

JOINT_SAMPLES = 50
"""Joint outcomes that are drawn where they are too many to be counted."""
LEAST = 1e-7
"""Smallest probability that has a logarithm."""


@dataclass(frozen=True)
class BatchBald(PerSite):
    """Largest joint mutual information of a batch (Kirsch et al., NeurIPS 2019).

    Adapted: as `Bald`; the joint entropy is estimated from 50 drawn outcomes. Of T draws of the
    weights a batch tells at most ln T, which with ten is little beside a large batch.
    """

    uses_passes: bool = True

    def select(self, pool: Pool, count: int, seed: int) -> Indices:
        """See `Strategy.select`."""
        candidates = pool.unlabelled
        passes = pool.passes[:, candidates].astype(np.float64)
        return candidates[batch_bald(passes, count, seed % 2**32)]


def batch_bald(passes: Floats, count: int, seed: int) -> Indices:
    """Pick images one by one, each the best addition to those before it.

    Parameters
    ----------
    passes : ndarray of float64 (T, N, C)
        Class probabilities under T draws of the weights.
    count : int
        How many to pick, at most N.
    seed : int
        Of the drawn outcomes, in [0, 2**32).

    Returns
    -------
    ndarray of int64 (count,)
        Best first.

    Notes
    -----
    Picks what `skactiveml.pool.batch_bald` picks, draw for draw; that one makes a call of the
    generator for each pass of each earlier pick in every step, and takes minutes where this takes
    seconds.
    """
    draws = np.random.RandomState(seed)
    logs = np.log(np.clip(passes, LEAST, 1)).swapaxes(0, 1)
    each = np.exp(logs)
    entropies = -(logs * each).sum(axis=(1, 2)) / each.shape[1]
    joint: Floats = np.ones((1, each.shape[1]))
    picked: list[int] = []
    while len(picked) < count:
        counted = each.shape[2] ** len(picked) <= JOINT_SAMPLES
        if picked:
            joint = _extended(joint, each[picked[-1]]) if counted else _drawn(each[picked], draws)
        information = _joint_entropies(joint, each, counted)
        information -= entropies + entropies[picked].sum()
        information[picked] = np.nan
        picked.append(int(rand_argmax(information, random_state=0)[0]))
    return np.array(picked, dtype=np.int64)


def _extended(joint: Floats, image: Floats) -> Floats:
    """Chances (M C, T) of all outcomes of one more image (T, C), under each draw of the weights."""
    chances = joint.T[:, :, None] * image[:, None]
    return chances.reshape(len(image), -1).T


def _drawn(images: Floats, draws: np.random.RandomState) -> Floats:
    """Chances (M, T) of outcomes of images (n, T, C), as many of them drawn by each of T draws."""
    passes = images.shape[1]
    ends = (images / images.sum(axis=2, keepdims=True)).cumsum(axis=2)
    ends /= ends[..., -1:]
    chosen = draws.random_sample((*images.shape[:2], JOINT_SAMPLES // passes))
    labels = (chosen[..., None] >= ends[:, :, None]).sum(axis=-1)
    logs = np.take_along_axis(np.log(images)[:, :, None], labels[:, None], axis=-1)
    return np.asarray(np.exp(logs.sum(axis=0)).reshape(passes, -1).T)


def _joint_entropies(joint: Floats, each: Floats, counted: bool) -> Floats:
    """Entropy (N,) of the outcomes (M, T) so far together with each image (N, T, C)."""
    chances = joint @ each / each.shape[1]
    surprises = -np.log(chances) * chances
    if counted:
        return np.asarray(surprises.sum(axis=(1, 2)))
    drawn = joint.mean(axis=1)[:, None]
    return np.asarray((surprises / drawn).sum(axis=(1, 2)) / len(joint))
