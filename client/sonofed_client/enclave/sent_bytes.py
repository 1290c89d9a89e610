"""What left a site and what was refused, kept up to date with the end of its ledger."""

from __future__ import annotations

import heapq
import json
import sqlite3
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from sonofed_common.contract.errors import LedgerError

DAY_SECONDS = 86400.0
_NEW = "SELECT number, body FROM entries WHERE number > ? ORDER BY number"


@dataclass(frozen=True)
class Tally:
    """Counts over a ledger.

    Attributes
    ----------
    entries : dict of (str, str) to int
        Entries, repeated refusals included, by outcome and action.
    sent : dict of str to int
        Bytes that left, by study.
    noised : dict of (str, str) to int
        Replies that left with noise of their own, by study and action.
    """

    entries: dict[tuple[str, str], int]
    sent: dict[str, int]
    noised: dict[tuple[str, str], int]


class SentBytes:
    """Sums over the messages of a ledger: each entry is read once, for entries never change."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._number = 0
        self._entries: Counter[tuple[str, str]] = Counter()
        self._studies: Counter[str] = Counter()
        self._noised: Counter[tuple[str, str]] = Counter()
        self._day: list[tuple[float, int]] = []
        self._day_total = 0

    def count(self, connection: sqlite3.Connection, study: str | None) -> int:
        """Return the bytes of one study's messages, or of all messages of the last 24 hours.

        Raises
        ------
        LedgerError
            An entry cannot be read.
        """
        with self._lock:
            self._catch_up(connection)
            if study is not None:
                return self._studies[study]
            while self._day and self._day[0][0] < time.time() - DAY_SECONDS:
                self._day_total -= heapq.heappop(self._day)[1]
            return self._day_total

    def noised(self, connection: sqlite3.Connection, study: str, action: str) -> int:
        """Return the replies of one study and action that left with noise of their own.

        Raises
        ------
        LedgerError
            An entry cannot be read.
        """
        with self._lock:
            self._catch_up(connection)
            return self._noised[study, action]

    def tally(self, connection: sqlite3.Connection) -> Tally:
        """Return all counts.

        Raises
        ------
        LedgerError
            An entry cannot be read.
        """
        with self._lock:
            self._catch_up(connection)
            return Tally(dict(self._entries), dict(self._studies), dict(self._noised))

    def _catch_up(self, connection: sqlite3.Connection) -> None:
        for number, text in connection.execute(_NEW, (self._number,)):
            try:
                self._add(json.loads(text))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise LedgerError(
                    f"entry {number} of the ledger is unreadable; verify the ledger"
                ) from None
            self._number = number

    def _add(self, entry: dict[str, Any]) -> None:
        # An entry of repetitions stands for those that came after one with an entry of its own.
        count = int(entry.get("repeats", 0)) or 1
        self._entries[str(entry["outcome"]), str(entry["action"])] += count
        if entry["outcome"] != "sent":
            return
        size, sent = int(entry["bytes"]), float(entry["time"])
        spent = entry["privacy"].items()
        if any(name.endswith(" noise") and value > 0 for name, value in spent):
            self._noised[str(entry["study"]), str(entry["action"])] += 1
        self._studies[str(entry["study"])] += size
        heapq.heappush(self._day, (sent, size))
        self._day_total += size
