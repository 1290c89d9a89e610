"""Refusals on their way to the ledger: repeated ones are counted, so that nobody can flood it."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

from sonofed_client.enclave.entry import Entry, Outcome
from sonofed_common.contract.errors import LedgerError
from sonofed_common.contract.names import ACTION_NAMES

WINDOW_SECONDS = 60.0
KINDS = 32
"""Kinds of strangers that are told apart in one window; all further ones count together."""

log = logging.getLogger(__name__)


class _Kind(NamedTuple):
    """What is counted together; nothing in it is text that a stranger chooses."""

    outcome: Outcome
    code: str
    action: str
    study: str

    @property
    def is_reserved(self) -> bool:
        """Whether it is about an action and a study of this site, of which there are only so many.

        Then it has an entry in each window, whatever else is sent.
        """
        return bool(self.action and self.study)

    def entry(self, repeats: int) -> Entry:
        """Return the entry that counts it."""
        what = f"of this kind [{self.code}]" if self.code else "of other kinds"
        return Entry(
            outcome=self.outcome,
            study=self.study,
            action=self.action,
            message=f"more refusals or failures {what}",
            repeats=repeats,
        )


OTHERS = _Kind("refused", "", "", "")


class Refusals:
    """Writes the first refusal of a kind at once, and counts those that repeat it.

    A kind is an outcome, a code of the catalogue, an action that there is and a study that a
    person at this site decided on; unknown actions are of one kind, and so are unknown studies.

    Parameters
    ----------
    write : callable
        Appends an entry to the ledger.

    Notes
    -----
    A window opens with a refusal and closes `WINDOW_SECONDS` later; then, or sooner when a reader
    asks, each count becomes an entry. So a window makes at most ``2 * KINDS + 1`` entries, whatever
    strangers send, and two for each kind of the studies that were decided on. What kills the
    process without a word takes the counts of the open window along.
    """

    def __init__(self, write: Callable[[Entry], object]) -> None:
        self._write = write
        self._lock = threading.Lock()
        self._counts: dict[_Kind, int] = {}
        self._is_open = False

    def add(self, entry: Entry, code: str, is_decided: bool = False) -> None:
        """Take in one refusal or failure.

        Parameters
        ----------
        entry : Entry
            About it.
        code : str
            Of the error.
        is_decided : bool
            Whether the entry's study is one that a person at this site decided on.

        Raises
        ------
        LedgerError
            It is the first of its kind, and cannot be written.
        """
        action = entry.action if entry.action in ACTION_NAMES else ""
        kind = _Kind(entry.outcome, code, action, entry.study if is_decided else "")
        with self._lock:
            strangers = sum(not known.is_reserved for known in self._counts)
            if kind not in self._counts and (kind.is_reserved or strangers < KINDS):
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
                    self._write(kind.entry(repeats))
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
