"""The table of the studies that a site knows: a SQLite file of its own, a row for each content."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

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
        """Return the studies that can be read, oldest first."""
        return [study for row in self._rows("ORDER BY rowid") if (study := _study(row))]

    def damaged(self) -> list[str]:
        """Return the names of the studies whose rows cannot be read."""
        rows = self._rows("ORDER BY rowid")
        return [str(row["name"]) for row in rows if _study(row) is None]

    def of_name(self, name: str, coordinator: str) -> KnownStudy | None:
        """Return the study that a name means now, else the last that was described under it."""
        chosen = "WHERE name = ? AND coordinator = ? ORDER BY current DESC, rowid DESC LIMIT 1"
        return self._read(chosen, name, coordinator)

    def of_digest(self, digest: str, coordinator: str) -> KnownStudy | None:
        """Return the study of a content and a coordinator."""
        chosen = "WHERE digest = ? AND coordinator = ?"
        return self._read(chosen, digest, coordinator)

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

    def remove_damaged(self, name: str) -> None:
        """Remove the rows of a name that cannot be read."""
        rows = self._rows("WHERE name = ?", name)
        gone = [(row["rowid"],) for row in rows if _study(row) is None]
        with self._connection() as connection:
            connection.executemany("DELETE FROM studies WHERE rowid = ?", gone)

    def remove(self, study: KnownStudy) -> None:
        """Remove a study."""
        with self._connection() as connection:
            connection.execute(
                "DELETE FROM studies WHERE digest = ? AND coordinator = ?",
                (study.digest, study.coordinator),
            )

    def is_decided(self, name: str, coordinator: str) -> bool:
        """Whether a person decided on a study of this name and coordinator."""
        chosen = "WHERE name = ? AND coordinator = ? AND decided_by = 'person'"
        return self._count(chosen, name, coordinator) > 0

    def waiting(self) -> int:
        """Return how many studies wait."""
        return self._count("WHERE state = 'waiting'")

    def keep_automatic(self, most: int) -> None:
        """Remove the oldest of those that were approved by themselves, until so many are left."""
        with self._connection() as connection:
            connection.execute(
                "DELETE FROM studies WHERE rowid IN (SELECT rowid FROM studies "
                "WHERE decided_by = 'automatic' ORDER BY rowid DESC LIMIT -1 OFFSET ?)",
                (most,),
            )

    def _count(self, chosen: str, *values: str) -> int:
        if not self._path.exists():
            return 0
        with self._connection() as connection:
            (count,) = connection.execute(
                f"SELECT COUNT(*) FROM studies {chosen}", values
            ).fetchone()
            return int(count)

    def _read(self, chosen: str, *values: str) -> KnownStudy | None:
        for row in self._rows(chosen, *values):
            study = _study(row)
            if study is None:
                raise damaged_study(str(row["name"]))
            return study
        return None

    def _rows(self, chosen: str, *values: str) -> list[sqlite3.Row]:
        if not self._path.exists():
            return []
        with self._connection() as connection:
            connection.row_factory = sqlite3.Row
            # A flipped bit of a text is for who validates it to find.
            connection.text_factory = lambda text: text.decode(errors="replace")
            query = f"SELECT rowid, {_COLUMNS} FROM studies {chosen}"
            return connection.execute(query, values).fetchall()

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
                        "the site's list of studies is of another version of SonoFed; move it "
                        "away: the studies that ask again wait for a decision"
                    )
                yield connection
        except sqlite3.Error as error:
            raise StoreError(
                f"the site's list of studies cannot be used ({_name_of(error)}); check its disk, "
                "or move it away: the studies that ask again wait for a decision"
            ) from error


def damaged_study(name: str) -> StoreError:
    """Return the error of a study whose row is not as it was written."""
    return StoreError(
        f"what the site knows of study {name[:64]!r} is damaged; forget the study: it waits for a "
        "decision when it asks again"
    )


def _name_of(error: sqlite3.Error) -> str:
    # SQLite's own sentence may name a file.
    return getattr(error, "sqlite_errorname", "unknown error")


def _study(row: sqlite3.Row) -> KnownStudy | None:
    """Return the study of a row; None where the row is damaged."""
    values = {column: row[column] for column in _COLUMNS.split(", ")}
    content = values.pop("content")
    try:
        read = None if content is None else Study.model_validate_json(str(content))
        return KnownStudy.model_validate({**values, "content": read})
    except ValidationError:
        return None
