"""Clip and noise of an update, applied by the enclave itself."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from sonofed_common.contract.errors import DivergenceError
from sonofed_common.contract.records import Array

_CHUNK = 1 << 20


def privatise(
    update: Mapping[str, Array], start: Mapping[str, Array], clip: float, noise: float
) -> dict[str, Array]:
    """Bound what an update says of the site's images (Gaussian mechanism; Dwork and Roth, 2014).

    Parameters
    ----------
    update : mapping of str to ndarray
        The site's new weights.
    start : mapping of str to ndarray
        What they started from: same names, shapes and types.
    clip : float
        Largest L2 norm of the change over all floating-point arrays together.
    noise : float
        Standard deviation of the noise on each number over ``clip``; 0 adds none.

    Returns
    -------
    dict of str to ndarray
        ``start + change * min(1, clip / norm) + noise``, in the arrays' types. Whole numbers, which
        count batches, go back as they came; a variance that the noise made negative becomes 0.

    Raises
    ------
    DivergenceError
        The change is not finite.
    """
    floating = [n for n, a in update.items() if np.issubdtype(a.dtype, np.floating)]
    square = 0.0
    for name in floating:
        change = update[name].astype(np.float64) - start[name].astype(np.float64)
        square += float(np.dot(change.ravel(), change.ravel()))
    if not math.isfinite(square):
        raise DivergenceError("an update is not finite; lower the learning rate")
    scale = min(1.0, clip / math.sqrt(square)) if square > 0 else 1.0
    result: dict[str, Array] = {name: np.array(start[name]) for name in update}
    for name in floating:
        origin = start[name].astype(np.float64)
        value = origin + scale * (update[name].astype(np.float64) - origin)
        if noise > 0:
            value += (noise * clip) * gaussian(value.size).reshape(value.shape)
        if name.endswith("running_var"):
            value = np.maximum(value, 0)
        result[name] = value.astype(update[name].dtype)
    return result


def gaussian(count: int) -> NDArray[np.float64]:
    """Standard normal numbers (count,) from the operating system's randomness.

    Every number is drawn from ``os.urandom`` by the Box-Muller transform: a generator whose state
    can be worked out from its output would let the receiver take the noise off again.
    """
    result = np.empty(count)
    for first in range(0, count, _CHUNK):
        size = min(_CHUNK, count - first)
        half = (size + 1) // 2
        bits = np.frombuffer(os.urandom(16 * half), dtype=np.uint64).reshape(2, half)
        uniform = ((bits >> np.uint64(11)).astype(np.float64) + 1) / 2**53
        radius, angle = np.sqrt(-2 * np.log(uniform[0])), 2 * math.pi * uniform[1]
        pair = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        result[first : first + size] = pair[:size]
    return result
