"""FedAdam (Reddi et al., ICLR 2021, algorithm 2): Adam at the coordinator."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sonofed_common.contract.errors import ParameterError
from sonofed_common.contract.names import BUFFERS
from sonofed_common.contract.records import Array, Records, grouped
from sonofed_server.aggregation.fedavg import BLOCK
from sonofed_server.aggregation.strategy import Averaging, Weights

BETA_1, BETA_2 = 0.9, 0.99
TAU = 1e-3
"""Adaptivity; the paper's values, as both betas."""


class FedAdam(Averaging):
    """Take the sites' mean change for a gradient, and step with Adam.

    Notes
    -----
    With ``x`` the round's weights and ``d`` the weighted mean of the sites' weights less ``x``::

        m <- b1 m + (1 - b1) d,   v <- b2 v + (1 - b2) d^2,   x <- x + eta m / (sqrt(v) + tau)

    from ``m = 0``, ``v = tau^2``, without bias correction, as in the paper. Buffers of batch
    normalisation are no weights: they become their mean. The state is ``m/...`` and ``v/...`` in
    the weights' types; sums are float64.
    """

    def finish(self) -> tuple[Weights, Records]:
        """Return the stepped weights; without replies nothing changes."""
        state = self.round.state
        after = self.mean.mean()
        if not after:
            return {}, state
        before, eta = self.round.start(), self.round.settings.server_step
        if {n: a.shape for n, a in after.items()} != {n: a.shape for n, a in before.items()}:
            raise ParameterError("updates are not of the model that was sent; check the versions")
        first, second = state.group("m"), state.group("v")
        for name, array in after.items():
            if name.endswith(BUFFERS):
                continue
            m = first.setdefault(name, np.zeros_like(array)).copy()
            v = second.setdefault(name, np.full_like(array, TAU**2)).copy()
            first[name], second[name] = m, v
            parts = _blocks(array, before[name], m, v)
            for mean, start, m_part, v_part in parts:
                change = mean.astype(np.float64) - start
                m_part[:] = BETA_1 * m_part.astype(np.float64) + (1 - BETA_1) * change
                v_part[:] = BETA_2 * v_part.astype(np.float64) + (1 - BETA_2) * change**2
                step = m_part.astype(np.float64) / (np.sqrt(v_part.astype(np.float64)) + TAU)
                mean[:] = start + eta * step
        return after, Records({**grouped("m", first), **grouped("v", second)})


def _blocks(*arrays: Array) -> list[tuple[NDArray[np.floating], ...]]:
    """Cut arrays of one shape into views of a bounded size, so that float64 copies stay small."""
    flat = [array.reshape(-1) for array in arrays]
    starts = range(0, flat[0].size, BLOCK)
    return [tuple(part[start : start + BLOCK] for part in flat) for start in starts]
