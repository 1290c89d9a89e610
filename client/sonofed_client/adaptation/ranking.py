"""Scores as integer keys, counts of keys in intervals, and what pooled ranks add up to.

Source of the scores: ADAptation (arXiv 2507.00474), Stage III. Selecting exactly from counts is
SonoFed's own.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sonofed_common.contract.errors import ParameterError
from sonofed_common.contract.selection import Counts, Keys, last_keys, part_widths

Scores = NDArray[Any]


def keys(scores: Scores) -> Keys:
    """Map scores to integers of the same order: the bit pattern of a non-negative float.

    Parameters
    ----------
    scores : ndarray of float32 or float64 (n,)
        Finite and not negative.

    Returns
    -------
    ndarray of uint64 (n,)
        Equal exactly where the scores are equal.

    Raises
    ------
    ParameterError
        A score is negative or not finite, or the dtype is another.
    """
    if scores.dtype not in (np.float32, np.float64):
        raise ParameterError(f"scores are {scores.dtype}; give float32 or float64")
    if not np.all(np.isfinite(scores)) or np.any(scores < 0):
        raise ParameterError("a score is negative or not finite; embed the images again")
    # Adding +0 turns -0, whose bits are the largest, into +0.
    positive = np.ascontiguousarray(scores + scores.dtype.type(0))
    return positive.view(np.uint32 if scores.dtype == np.float32 else np.uint64).astype(np.uint64)


def identity_keys(ids: Sequence[str], secret: bytes | None = None) -> Keys:
    """Turn image ids of 16 hexadecimal digits into 64-bit keys (n,) that break ties.

    Parameters
    ----------
    ids : sequence of str
        Distinct.
    secret : bytes, optional
        Keys are the first 64 bits of the ids' HMAC-SHA256 under it; default: the ids as they are.

    Raises
    ------
    ParameterError
        An id is none, or two are equal.
    """
    try:
        values = [int(i, 16) for i in ids]
    except ValueError:
        values = []
    if any(len(i) != 16 for i in ids) or len(set(values)) != len(ids):
        raise ParameterError("image ids are not distinct words of 16 hexadecimal digits")
    if secret is not None:
        digests = (hmac.digest(secret, i.encode(), "sha256") for i in ids)
        values = [int.from_bytes(digest[:8], "big") for digest in digests]
    return np.array(values, dtype=np.uint64)


def interval_counts(values: Keys, edges: Keys, split: int) -> Counts:
    """Count keys in the equal parts of intervals.

    Parameters
    ----------
    values : ndarray of uint64 (n,)
        Keys in any order.
    edges : ndarray of uint64 (m, 2)
        Ascending, disjoint intervals ``[low, high)``; a ``high`` of 0 is ``2**64``.
    split : int
        Parts per interval; ``m * split`` is at most 65536.

    Returns
    -------
    ndarray of int64 (m, split)

    Raises
    ------
    ParameterError
        Edges or split do not validate.
    """
    widths = part_widths(edges, split)
    interval = np.searchsorted(edges[:, 0], values, side="right") - 1
    inside = (interval >= 0) & (values <= last_keys(edges)[interval])
    interval, offset = interval[inside], values[inside]
    offset = offset - edges[interval, 0]
    part = np.zeros(len(offset), dtype=np.int64)
    if split > 1:
        part = (offset // widths[interval]).astype(np.int64)
    counts = np.bincount(interval * split + part, minlength=len(edges) * split)
    return counts.reshape(len(edges), split).astype(np.int64)


def order_component(below: Counts, above: Counts, order: str) -> Counts:
    """Turn pooled ranks of r into what is added to the rank of u; small is taken first.

    Parameters
    ----------
    below, above : ndarray of int64 (n,)
        Pooled images with strictly smaller and strictly larger r.
    order : str
        ``near``: ``below``, the most source-like first. ``far``: ``above``, the least source-like
        first. ``both``: ``2 min(below, above)``, the two extremes first, doubled so that it spans
        the range of the others.

    Returns
    -------
    ndarray of int64 (n,)
        Tied images get the same number.
    """
    if order == "near":
        return below
    return above if order == "far" else 2 * np.minimum(below, above)


def order_angle(r: Scores, order: str) -> Scores:
    """Turn r into the angle that is added to u: ``r``, ``pi - r`` or ``2 min(r, pi - r)``.

    Parameters
    ----------
    r : ndarray of float64 (n,)
        Angles in [0, pi].
    order : str
        ``near``, ``far`` or ``both``, as for `order_component`.
    """
    opposite = np.maximum(np.pi - r, 0.0)
    if order == "near":
        return r
    return opposite if order == "far" else 2 * np.minimum(r, opposite)
