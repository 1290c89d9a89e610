"""The ledger: everything that left the site or was refused, so that no change goes unnoticed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sonofed_client.enclave.entry import Entry
from sonofed_client.enclave.refusals import Refusals
from sonofed_client.enclave.sent_bytes import SentBytes, Tally
from sonofed_client.enclave.verification import START, Row, check, check_entry, check_head
from sonofed_common.contract.errors import LedgerError
from sonofed_common.contract.records import Records
from sonofed_common.runtime import write_atomically
from sonofed_common.security import public_hex, sha256

_TABLE = """
CREATE TABLE IF NOT EXISTS entries (
    number INTEGER PRIMARY KEY, body TEXT NOT NULL, hash TEXT NOT NULL, signature TEXT NOT NULL
);
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON entries
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON entries
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""
_ANY = "SELECT number FROM entries LIMIT 1"


class Ledger:
    """An append-only, hash-chained, signed SQLite table, with a signed head in a file of its own.

    Parameters
    ----------
    folder : Path
        Holds ``ledger.sqlite`` and ``ledger.head``.
    key : Ed25519PrivateKey
        The site's.

    Notes
    -----
    An entry's body holds the hash of the body before it; its hash is signed. The head says how many
    entries there are and how the last one hashes. Processes may append at the same time.

    What reads the ledger through this object first has the repeated refusals that it counted
    written; those that another process counts follow when its window closes.
    """

    def __init__(self, folder: Path, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = public_hex(key)
        self._path, self._head = folder / "ledger.sqlite", folder / "ledger.head"
        self._lock_path = folder / "ledger.lock"
        self._refusals, self._sent = Refusals(self.append), SentBytes()
        with self._lock(), closing(self._connect()) as connection:
            connection.executescript(_TABLE)
            self._path.chmod(0o600)
            # Written once, before any entry: a head that is gone later is no beginning.
            if not self._head.exists() and not connection.execute(_ANY).fetchone():
                self._write_head(0, START)

    def append(self, entry: Entry) -> int:
        """Add an entry and return its number, from 1.

        Raises
        ------
        LedgerError
            It cannot be written, or the ledger's end is not what the head says.
        """
        with self._lock(), closing(self._connect()) as connection:
            number, previous = self._end(connection)
            body = json.dumps(
                {
                    "number": number + 1,
                    "previous": previous,
                    "time": round(time.time(), 3),
                    **entry.model_dump(mode="json"),
                },
                sort_keys=True,
            )
            digest = sha256(body.encode())
            row = (number + 1, body, digest, self._sign(digest))
            with connection:
                connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?)", row)
            self._write_head(number + 1, digest)
        return number + 1

    def refuse(self, entry: Entry, code: str, is_decided: bool = False) -> None:
        """Add an entry of a refusal or a failure, or count it where it repeats one.

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
            It cannot be written.
        """
        self._refusals.add(entry, code, is_decided)

    def settle(self) -> None:
        """Write how many refusals were counted so far; for a process that ends."""
        self._refusals.settle()

    def entries(self) -> list[dict[str, Any]]:
        """Return the bodies of all entries, oldest first, without a check of them.

        Raises
        ------
        LedgerError
            An entry is no JSON.
        """
        self.settle()
        try:
            # Entries of before refusals were counted say nothing of repetitions.
            return [{"repeats": 0} | json.loads(body) for _, body, _, _ in self._rows()]
        except ValueError:
            raise LedgerError("an entry of the ledger is unreadable; verify the ledger") from None

    def sent_bytes(self, study: str | None = None) -> int:
        """Return the bytes that left for one study, or in the last 24 hours for all."""
        with self._reading() as connection:
            return self._sent.count(connection, study)

    def noised_replies(self, study: str, action: str) -> int:
        """Return the replies of an action that left for a study, each with noise of its own."""
        with self._reading() as connection:
            return self._sent.noised(connection, study, action)

    def tally(self) -> Tally:
        """Return counts over all entries; refusals that are yet being counted follow."""
        with self._reading() as connection:
            return self._sent.tally(connection)

    def head(self) -> str:
        """Return number and hash of the last entry, as the head's file says."""
        self.settle()
        head = self._read_head() or {"entries": 0, "hash": START}
        return f"{head['entries']} {head['hash']}"

    def verify(self) -> int:
        """Check every entry and the head, and return the number of entries.

        Raises
        ------
        LedgerError
            Names the first entry that was edited, deleted or moved, or says that the end is cut.
        """
        self.settle()
        with self._lock():
            rows, head = self._rows(), self._read_head()
        # Not under the lock: a long ledger must not keep the enclave from writing to it.
        return check(rows, head, self.public_key)

    def export(self, path: Path) -> int:
        """Write the ledger as JSON lines, for an auditor, and return the number of entries.

        The first line holds the public key and the head; each other one an entry, its hash and its
        signature.
        """
        self.settle()
        with self._lock():
            first = json.dumps({"public_key": self.public_key, "head": self._read_head()})
            rows = list(self._rows())
        names = ("number", "body", "hash", "signature")
        lines = [first, *(json.dumps(dict(zip(names, row, strict=True))) for row in rows)]
        write_atomically(path, ("\n".join(lines) + "\n").encode())
        return len(rows)

    def _end(self, connection: sqlite3.Connection) -> tuple[int, str]:
        """Return number and hash of the last entry, which must be the head's or come after it."""
        head = self._read_head()
        if head is None:
            raise LedgerError("the ledger has no head; restore the head's file from a backup")
        check_head(head, self.public_key)
        known = int(head["entries"])
        query = "SELECT number, body, hash, signature FROM entries WHERE number >= ? ORDER BY 1"
        rows = connection.execute(query, (known,)).fetchall()
        if known and (not rows or (rows[0][0], rows[0][2]) != (known, head["hash"])):
            raise LedgerError("the ledger's end is not what its head says; verify the ledger")
        # A crash may come between an entry and the head: what is signed after it stands.
        for row in rows:
            check_entry(row, self.public_key)
        return (int(rows[-1][0]), str(rows[-1][2])) if rows else (0, START)

    def _write_head(self, entries: int, digest: str) -> None:
        head = {"entries": entries, "hash": digest, "signature": self._sign(f"{entries} {digest}")}
        write_atomically(self._head, json.dumps(head).encode(), mode=0o600)

    def _read_head(self) -> dict[str, Any] | None:
        if not self._head.exists():
            return None
        try:
            return dict(json.loads(self._head.read_bytes()))
        except (ValueError, TypeError):
            raise LedgerError("the ledger's head is unreadable; restore it from a backup") from None

    def _sign(self, text: str) -> str:
        return self._key.sign(text.encode()).hex()

    def _rows(self) -> list[Row]:
        with self._reading() as connection:
            query = "SELECT number, body, hash, signature FROM entries ORDER BY number"
            return list(connection.execute(query))

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=30)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        return connection

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(self._connect()) as connection:
                yield connection
        except sqlite3.Error as error:
            raise _unusable(error) from None

    @contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            with self._lock_path.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        except (OSError, sqlite3.Error) as error:
            raise _unusable(error) from None


def payload(records: Records) -> tuple[int, str]:
    """Return size in bytes and SHA-256 of what a message carries, without a copy of its arrays.

    The payload is the JSON text of config and metrics with sorted keys, then, in the order of their
    names, each array's name, dtype and shape and its content in C order.
    """
    text = json.dumps({"config": records.config, "metrics": records.metrics}, sort_keys=True)
    digest, size = hashlib.sha256(text.encode()), len(text.encode())
    for name in sorted(records.arrays):
        array = np.ascontiguousarray(records.arrays[name])
        header = f"{name}\0{array.dtype.str}\0{records.arrays[name].shape}\0".encode()
        digest.update(header)
        digest.update(array.reshape(-1).view(np.uint8).data)
        size += len(header) + array.nbytes
    return size, digest.hexdigest()


def _unusable(error: Exception) -> LedgerError:
    # The sentences of SQLite may name a file.
    reason = getattr(error, "strerror", None) or getattr(error, "sqlite_errorname", "unknown error")
    return LedgerError(f"the ledger cannot be used ({reason}); nothing leaves without it")
