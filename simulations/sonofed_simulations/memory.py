"""Peak memory of this process and everything it started, by phase."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from sonofed_common.runtime import Event

INTERVAL_SECONDS = 0.5


class MemoryWatch:
    """Samples proportional set sizes, which count shared pages once over all processes.

    Attributes
    ----------
    peaks : dict of str to int
        Largest sum in bytes while each phase ran.
    """

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._phase = "start"
        self._stop = threading.Event()

    def listen(self, event: Event) -> None:
        """Follow the study's phases: a listener of `Events`."""
        if event["event"] == "phase-started":
            self._phase = str(event["phase"])

    @contextmanager
    def running(self) -> Iterator[None]:
        """Sample for as long as the block runs."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), _family_bytes())


def _family_bytes() -> int:
    total = 0
    try:
        own = psutil.Process()
        family = [own, *own.children(recursive=True)]
    except psutil.Error:
        return 0
    for process in family:
        try:
            memory = process.memory_full_info()
            total += getattr(memory, "pss", memory.uss)
        except psutil.Error:
            continue
    return total
