"""Refusals on their way to the ledger: repeated ones are counted, so that nobody can flood it."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

from sonofed_client.enclave.entry import Entry, Outcome
from sonofed_common.contract.errors import LedgerError

WINDOW_SECONDS = 60.0
KINDS = 32
"""Kinds that are told apart in one window; all further ones count together."""

log = logging.getLogger(__name__)


class _Kind(NamedTuple):
    outcome: Outcome
    study: str
    study_digest: str
    action: str
    rule: str
    message: str


OTHERS = _Kind("refused", "", "", "", "", "refusals and failures of other kinds")


class Refusals:
    """Writes the first refusal of a kind at once, and counts those that repeat it.

    Parameters
    ----------
    write : callable
        Appends an entry to the ledger.

    Notes
    -----
    A window opens with a refusal and closes `WINDOW_SECONDS` later; then, or sooner when a reader
    asks, each count becomes an entry. So a window makes at most ``2 * KINDS + 1`` entries, whatever
    is sent. What kills the process without a word takes the counts of the open window along.
    """

    def __init__(self, write: Callable[[Entry], object]) -> None:
        self._write = write
        self._lock = threading.Lock()
        self._counts: dict[_Kind, int] = {}
        self._is_open = False

    def add(self, entry: Entry) -> None:
        """Take in one refusal or failure.

        Raises
        ------
        LedgerError
            It is the first of its kind, and cannot be written.
        """
        kind = _Kind(*(getattr(entry, name) for name in _Kind._fields))
        with self._lock:
            if kind not in self._counts and len(self._counts) < KINDS:
                self._write(entry)
                self._counts[kind] = 0
            else:
                kind = kind if kind in self._counts else OTHERS
                self._counts[kind] = self._counts.get(kind, 0) + 1
            if not self._is_open:
                self._open()

    def settle(self) -> None:
        """Write the counts so far; one that cannot be written is kept, and tried again later."""
        with self._lock:
            for kind, repeats in self._counts.items():
                if not repeats:
                    continue
                try:
                    self._write(Entry(**kind._asdict(), repeats=repeats))
                except LedgerError as error:
                    log.error("the count of repeated refusals waits: %s", error)
                    return
                self._counts[kind] = 0

    def _open(self) -> None:
        timer = threading.Timer(WINDOW_SECONDS, self._close)
        timer.daemon = True
        timer.start()
        atexit.register(self.settle)
        self._is_open = True

    def _close(self) -> None:
        self.settle()
        atexit.unregister(self.settle)
        with self._lock:
            self._counts = {kind: repeats for kind, repeats in self._counts.items() if repeats}
            self._is_open = False
            if self._counts:
                self._open()
