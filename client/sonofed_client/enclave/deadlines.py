"""Deadlines: calls that take too long are cancelled, by one thread for all of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

CHECK_SECONDS = 1.0


class Deadlines:
    """Cancels calls that are not over in time.

    Parameters
    ----------
    seconds : float
        Longest time of a call, to within a second.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until: dict[grpc.ServicerContext, float] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, name="deadlines", daemon=True).start()

    @contextmanager
    def limit(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Cancel a call that stays in this block for too long."""
        with self._lock:
            self._until[context] = time.monotonic() + self._seconds
        try:
            yield
        finally:
            with self._lock:
                del self._until[context]

    def _watch(self) -> None:
        while True:
            time.sleep(CHECK_SECONDS)
            with self._lock:
                now = time.monotonic()
                late = [context for context, until in self._until.items() if until < now]
            for context in late:
                context.cancel()
