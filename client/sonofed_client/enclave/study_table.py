"""The table of the studies that a site knows: a SQLite file of its own, a row for each content."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

from pydantic import Field

from sonofed_common.contract.configuration import Model
from sonofed_common.contract.errors import StoreError
from sonofed_common.contract.study import Study

State = Literal["waiting", "approved", "denied"]
VERSION = 1
_COLUMNS = "digest, coordinator, name, state, decided_by, seen, decided, current, content"
_TABLE = """
CREATE TABLE IF NOT EXISTS studies (
    digest TEXT NOT NULL, coordinator TEXT NOT NULL, name TEXT NOT NULL, state TEXT NOT NULL,
    decided_by TEXT NOT NULL, seen REAL NOT NULL, decided REAL NOT NULL, current INTEGER NOT NULL,
    content TEXT, PRIMARY KEY (digest, coordinator)
);
CREATE INDEX IF NOT EXISTS by_name ON studies (name);
"""


class KnownStudy(Model):
    """A study that a coordinator described to this site.

    Attributes
    ----------
    digest : str
        SHA-256 of the validated study: the approval is of this content alone.
    coordinator : str
        Key of the coordinator at the time of the decision; another one's studies wait anew.
    decided_by : str
        ``person``, or ``automatic`` under ``auto_approve``; empty while it waits.
    content : Study or None
        None where a site that approves by itself was told the digest only.
    seen, decided : float
        Seconds since the epoch; ``decided`` is 0 while it waits.
    current : bool
        Whether its name means this study: the last that was described and approved.
    """

    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    name: str
    coordinator: str
    state: State = "waiting"
    decided_by: Literal["", "person", "automatic"] = ""
    content: Study | None = None
    seen: float
    decided: float = 0.0
    current: bool = False

    @property
    def key(self) -> str:
        """What a person types to mean this content and no other; no name looks like it."""
        return f"sha256:{self.digest}"

    @property
    def short_key(self) -> str:
        """Its first digits, enough to tell the studies of a site apart."""
        return f"sha256:{self.digest[:12]}"


class StudyTable:
    """Rows of studies, read one by one: however many wait, a request costs the same.

    Parameters
    ----------
    path : Path
        Made, with its folder, by the first that writes; its owner alone may read it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def all(self) -> list[KnownStudy]:
        """Return the studies, oldest first."""
        return self._read("ORDER BY rowid")

    def of_name(self, name: str, coordinator: str) -> KnownStudy | None:
        """Return the study that a name means now, else the last that was described under it."""
        chosen = "WHERE name = ? AND coordinator = ? ORDER BY current DESC, rowid DESC LIMIT 1"
        return next(iter(self._read(chosen, name, coordinator)), None)

    def of_digest(self, digest: str, coordinator: str) -> KnownStudy | None:
        """Return the study of a content and a coordinator."""
        chosen = "WHERE digest = ? AND coordinator = ?"
        return next(iter(self._read(chosen, digest, coordinator)), None)

    def put(self, study: KnownStudy) -> None:
        """Write a study; it takes the name from the one that had it where it is ``current``."""
        content = study.content and study.content.model_dump_json()
        values = {**study.model_dump(exclude={"content"}), "content": content}
        row = [values[column] for column in _COLUMNS.split(", ")]
        marks = ", ".join("?" * len(row))
        changes = ", ".join(f"{c} = excluded.{c}" for c in _COLUMNS.split(", ")[2:])
        with self._connection() as connection:
            if study.current:
                same = (study.name, study.coordinator)
                connection.execute(
                    "UPDATE studies SET current = 0 WHERE name = ? AND coordinator = ?", same
                )
            connection.execute(
                f"INSERT INTO studies ({_COLUMNS}) VALUES ({marks}) "
                f"ON CONFLICT (digest, coordinator) DO UPDATE SET {changes}",
                row,
            )

    def remove(self, study: KnownStudy) -> None:
        """Remove a study."""
        with self._connection() as connection:
            connection.execute(
                "DELETE FROM studies WHERE digest = ? AND coordinator = ?",
                (study.digest, study.coordinator),
            )

    def keep_undecided(self, most: int) -> None:
        """Remove the oldest of those that no person decided on, until so many are left."""
        with self._connection() as connection:
            connection.execute(
                "DELETE FROM studies WHERE rowid IN (SELECT rowid FROM studies "
                "WHERE decided_by != 'person' ORDER BY rowid DESC LIMIT -1 OFFSET ?)",
                (most,),
            )

    def _read(self, chosen: str, *values: str) -> list[KnownStudy]:
        if not self._path.exists():
            return []
        with self._connection() as connection:
            rows = connection.execute(f"SELECT {_COLUMNS} FROM studies {chosen}", values).fetchall()
        return [_study(row) for row in rows]

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._path.touch(mode=0o600)
            with closing(sqlite3.connect(self._path, timeout=30)) as connection, connection:
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                if version == 0:
                    connection.executescript(
                        f"BEGIN IMMEDIATE; {_TABLE} PRAGMA user_version = {VERSION}; COMMIT;"
                    )
                elif version != VERSION:
                    raise StoreError(
                        f"{self._path.name} of the site's store is of another version of SonoFed; "
                        "move it away: the studies that ask again wait for a decision"
                    )
                yield connection
        except sqlite3.Error as error:
            raise StoreError(
                f"{self._path.name} of the site's store cannot be used ({error}); check its disk, "
                "or move it away: the studies that ask again wait for a decision"
            ) from None


def _study(row: tuple[object, ...]) -> KnownStudy:
    values = dict(zip(_COLUMNS.split(", "), row, strict=True))
    content = values.pop("content")
    return KnownStudy.model_validate(
        {**values, "content": None if content is None else Study.model_validate_json(str(content))}
    )
