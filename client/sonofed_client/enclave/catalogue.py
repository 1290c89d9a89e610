"""The store's catalogue: its tables in SQLite, and how they are opened, read and written."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.types import UserDefinedType

from sonofed_client.enclave.durable import full_disk
from sonofed_common.contract.errors import StoreError

VERSION = 3


class Base(DeclarativeBase):
    """Of the tables."""


class Sealed(UserDefinedType[bytes]):
    """Bytes as the file has them: what a damage made of them is for who opens them to refuse."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        """Return the type's name in SQLite."""
        return "BLOB"


class Image(Base):
    """One image of the site; ``sealed`` holds its name and group, encrypted, and binds the rest."""

    __tablename__ = "images"
    id: Mapped[str] = mapped_column(primary_key=True)
    part: Mapped[str]
    label: Mapped[int | None]
    position: Mapped[int]
    sealed: Mapped[bytes] = mapped_column(Sealed)


class Annotation(Base):
    """A label that an expert (or the oracle of a simulation) gave; ``sealed`` binds it."""

    __tablename__ = "annotations"
    image: Mapped[str] = mapped_column(primary_key=True)
    label: Mapped[int]
    author: Mapped[str]
    time: Mapped[float]
    sealed: Mapped[bytes] = mapped_column(Sealed)


class Total(Base):
    """How many rows there are of images, by part, or of annotations; ``sealed`` holds it."""

    __tablename__ = "totals"
    name: Mapped[str] = mapped_column(primary_key=True)
    sealed: Mapped[bytes] = mapped_column(Sealed)


class Artifact(Base):
    """A named blob: pixels, reconstructions, embeddings, selections, weights, job results."""

    __tablename__ = "artifacts"
    name: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(index=True)
    bytes: Mapped[int]
    used: Mapped[float]


class Catalogue:
    """The tables of a store, in a file that only its owner may read.

    Parameters
    ----------
    path : Path
        Made if absent.
    begin : callable
        Writes the first rows; called once in the life of the file, when its tables are made.

    Raises
    ------
    StoreError
        It is damaged or of another version, or the disk is full.
    """

    def __init__(self, path: Path, begin: Callable[[Session], None]) -> None:
        self._path = path
        path.touch(mode=0o600)
        self._engine = _open(path)
        self._writing = self._engine.execution_options(writes=True)
        with self.write() as session:
            if _prepare_tables(session.connection()):
                begin(session)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Read one state of the tables, whoever writes meanwhile."""
        with _transaction(self._engine) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Read and write alone, until the end: all of it is kept or, if it fails, none."""
        with _transaction(self._writing) as session:
            yield session

    def settle(self) -> None:
        """Make what was written survive a power cut."""
        with self._path.with_name(f"{self._path.name}-wal").open("rb") as log:
            os.fsync(log.fileno())


def _prepare_tables(connection: Connection) -> bool:
    """Make the tables where there are none; say whether they were made."""
    version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
    if version == VERSION:
        return False
    if version or connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar_one():
        raise StoreError(
            "the site's store is of another version of SonoFed; move it away and take the images "
            "in again"
        )
    Base.metadata.create_all(connection)
    connection.exec_driver_sql(f"PRAGMA user_version = {VERSION}")
    return True


@contextmanager
def _transaction(engine: Engine) -> Iterator[Session]:
    try:
        with Session(engine) as session, session.begin():
            # Else it would begin, and lock, with the first statement only.
            session.connection()
            yield session
    except DatabaseError as error:
        raise _store_error(error) from error


def _store_error(error: DatabaseError) -> StoreError:
    # The low byte is the kind of failure, the others are its detail.
    kind = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
    if kind == sqlite3.SQLITE_FULL:
        return full_disk()
    if kind in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StoreError(
            "the catalogue of the site's store is damaged; restore the store from its backup"
        )
    name = getattr(error.orig, "sqlite_errorname", "unknown error")
    return StoreError(f"the catalogue of the site's store cannot be used ({name}); check its disk")


def _open(path: Path) -> Engine:
    # Without the parameters: what fails may end in a log, and they may be of a patient.
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 30}, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def _prepare(connection: sqlite3.Connection, _: object) -> None:
        # The driver would begin transactions late, after what they read first.
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine
