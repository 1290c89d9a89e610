"""Entropy of predictions: how undecided a classifier is (Settles, 2009)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

Floats = NDArray[np.floating[Any]]


def entropy(probabilities: Floats) -> Floats:
    """Shannon's entropy over the last axis.

    Parameters
    ----------
    probabilities : ndarray (..., C)
        Of C classes.

    Returns
    -------
    ndarray (...)
        Nats, from 0 (sure) to log C (undecided).
    """
    return np.asarray(-(probabilities * np.log(np.maximum(probabilities, 1e-12))).sum(axis=-1))


def certainty(logits: Floats) -> NDArray[np.float64]:
    """What predictions lack to the largest entropy: the most uncertain image has the least.

    Parameters
    ----------
    logits : ndarray (N, C)
        Of C classes.

    Returns
    -------
    ndarray of float64 (N,)
        Nats, from 0 (undecided) to log C (sure).
    """
    predictions = softmax(logits.astype(np.float64), axis=1)
    # Rounding may take an even prediction's entropy above log C.
    return np.asarray(np.maximum(np.log(logits.shape[1]) - entropy(predictions), 0.0))
