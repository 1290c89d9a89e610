"""FedAvg (McMahan et al., AISTATS 2017) as a running sum: no reply is held once folded in."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from sonofed_common.contract.errors import DivergenceError, ParameterError
from sonofed_common.contract.records import Array

BLOCK = 2**18
"""Values that are folded in at a time: what is needed for it besides the sums stays small."""


class FedAvg:
    """Weighted mean of named arrays, folded in one reply at a time.

    Notes
    -----
    Sums are float64 and depend on the order of `add`: fold replies in the cohort's fixed order.
    Memory is one sum plus the reply in hand, whatever the number of sites.
    """

    def __init__(self) -> None:
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._dtypes: dict[str, np.dtype[np.generic]] = {}
        self._weight = 0.0

    def add(self, arrays: Mapping[str, Array], weight: float) -> None:
        """Fold in one site's arrays.

        Parameters
        ----------
        arrays : mapping of str to ndarray
            Same names and shapes from every site; finite.
        weight : float
            Positive and finite; usually the number of examples.

        Raises
        ------
        ParameterError
            Names or shapes differ from the first reply's, or the weight is not a positive number.
        DivergenceError
            A value is not finite.
        """
        if not 0 < weight < np.inf:
            raise ParameterError(
                "an update needs a positive weight; leave sites without examples out"
            )
        if self._sums and {k: v.shape for k, v in arrays.items()} != {
            k: v.shape for k, v in self._sums.items()
        }:
            raise ParameterError(
                "updates of different models cannot be averaged; check the versions"
            )
        first = not self._sums
        for name, array in arrays.items():
            if first:
                self._sums[name] = np.empty(array.shape)
                self._dtypes[name] = array.dtype
            total, update = self._sums[name].reshape(-1), array.reshape(-1)
            for start in range(0, len(total), BLOCK):
                part = slice(start, start + BLOCK)
                values = update[part].astype(np.float64)
                if not np.isfinite(values).all():
                    raise DivergenceError("an update is not finite; lower the learning rate")
                values *= weight
                if first:
                    total[part] = values
                else:
                    total[part] += values
        self._weight += weight

    def mean(self) -> dict[str, Array]:
        """Return the weighted mean, each array in the dtype it came in; empty without replies.

        The sums are given up for it, one by one: another mean begins anew.
        """
        weight, self._weight = self._weight, 0.0
        means = {}
        for name in list(self._sums):
            total = self._sums.pop(name)
            total /= weight
            means[name] = self._cast(name, total)
        return means

    def _cast(self, name: str, mean: NDArray[np.float64]) -> Array:
        dtype = self._dtypes[name]
        # NumPy turns what has no dimension into a scalar; counters of networks are such arrays.
        return np.asarray(np.rint(mean) if np.issubdtype(dtype, np.integer) else mean, dtype=dtype)
