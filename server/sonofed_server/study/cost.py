"""What a phase costs: time, traffic and memory, those before an interruption included."""

from __future__ import annotations

import resource
import time

from sonofed_common.contract.results import PhaseCost
from sonofed_server.study.exchange import Traffic


class PhaseMeter:
    """Measures a phase from when it is made.

    Parameters
    ----------
    before : PhaseCost
        Names the phase; what it cost until its last save, if it was interrupted.
    traffic : Traffic
        Running totals of the exchange.
    """

    def __init__(self, before: PhaseCost, traffic: Traffic) -> None:
        self._before = before
        self._traffic = traffic
        self._start = (traffic.to_sites, traffic.from_sites)
        self._started = time.monotonic()
        self._saves = before.saves

    def saved(self) -> None:
        """Count that the state is saved."""
        self._saves += 1

    def read(self) -> PhaseCost:
        """Return what the phase has cost so far."""
        before, memory = self._before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        to_sites, from_sites = self._start
        return PhaseCost(
            name=before.name,
            seconds=round(before.seconds + time.monotonic() - self._started, 3),
            saves=self._saves,
            bytes_to_sites=before.bytes_to_sites + self._traffic.to_sites - to_sites,
            bytes_from_sites=before.bytes_from_sites + self._traffic.from_sites - from_sites,
            peak_memory_bytes=max(before.peak_memory_bytes or 0, memory),
        )
