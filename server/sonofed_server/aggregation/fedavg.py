"""FedAvg (McMahan et al., AISTATS 2017) as a running sum: no reply is held once folded in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from tempfile import TemporaryFile

import numpy as np
from numpy.typing import NDArray

from sonofed_common.contract.errors import DeploymentError, DivergenceError, ParameterError
from sonofed_common.contract.records import Array

BLOCK = 2**18
"""Values that are folded in at a time: what is needed for it besides the sums stays small."""


class FedAvg:
    """Weighted mean of named arrays, folded in one reply at a time.

    Notes
    -----
    Sums are float64 and depend on the order of `add`: fold replies in the cohort's fixed order.
    They are kept in a temporary file, twice as large as a model of float32: memory is the reply in
    hand, whatever the number of sites.
    """

    def __init__(self) -> None:
        # Without a name: it goes with this object, or with the process.
        self._sums = TemporaryFile(buffering=0)  # noqa: SIM115
        self._forms: dict[str, tuple[tuple[int, ...], np.dtype[np.generic]]] = {}
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
        shapes = {name: array.shape for name, array in arrays.items()}
        if self._forms and shapes != {name: shape for name, (shape, _) in self._forms.items()}:
            raise ParameterError(
                "updates of different models cannot be averaged; check the versions"
            )
        place = 0
        for name in self._forms or arrays:
            update = arrays[name].reshape(-1)
            for start in range(0, len(update), BLOCK):
                values = update[start : start + BLOCK].astype(np.float64)
                if not np.isfinite(values).all():
                    raise DivergenceError("an update is not finite; lower the learning rate")
                values *= weight
                if self._forms:
                    values += self._read(len(values), place)
                place += self._write(values, place)
        self._forms = self._forms or {n: (a.shape, a.dtype) for n, a in arrays.items()}
        self._weight += weight

    def mean(self) -> dict[str, Array]:
        """Return the weighted mean, each array in the dtype it came in; empty without replies."""
        means, place = {}, 0
        for name, (shape, dtype) in self._forms.items():
            means[name] = np.empty(shape, dtype)
            mean = means[name].reshape(-1)
            for start in range(0, len(mean), BLOCK):
                part = mean[start : start + BLOCK]
                values = self._read(len(part), place) / self._weight
                part[:] = np.rint(values) if np.issubdtype(dtype, np.integer) else values
                place += values.nbytes
        return means

    def _read(self, number: int, place: int) -> NDArray[np.float64]:
        return np.frombuffer(os.pread(self._sums.fileno(), 8 * number, place))

    def _write(self, values: NDArray[np.float64], place: int) -> int:
        try:
            written = os.pwrite(self._sums.fileno(), values.data, place)
        except OSError:
            written = 0
        if written != values.nbytes:
            raise DeploymentError(
                "the disk of the temporary folder (TMPDIR) is full; it holds two models of each "
                "network that is averaged; make room, then resume the study"
            )
        return written
