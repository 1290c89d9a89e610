"""The site's store: a SQLite catalogue over content-addressed blobs."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine, create_engine, delete, event, func, select
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sonofed_common.contract.errors import SonoFedError
from sonofed_common.contract.records import Records, from_bytes, to_bytes
from sonofed_common.runtime import write_atomically
from sonofed_common.security import sha256

JOB_CACHE_BYTES = 2 * 1024**3


class _Base(DeclarativeBase):
    pass


class Image(_Base):
    """One image of the site. Names and groups stay in this table."""

    __tablename__ = "images"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    part: Mapped[str]
    label: Mapped[int | None]
    group: Mapped[str]
    position: Mapped[int]


class Annotation(_Base):
    """A label that an expert (or the oracle of a simulation) gave."""

    __tablename__ = "annotations"
    image: Mapped[str] = mapped_column(primary_key=True)
    label: Mapped[int]
    author: Mapped[str]
    time: Mapped[float]


class Artifact(_Base):
    """A named blob: pixels, reconstructions, embeddings, selections, weights, job results."""

    __tablename__ = "artifacts"
    name: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(index=True)
    bytes: Mapped[int]
    used: Mapped[float]


@dataclass(frozen=True)
class CataloguedImage:
    """A row of the catalogue: opaque id, private name and group, part and label."""

    id: str
    name: str
    part: str
    label: int | None
    group: str
    position: int


class Store:
    """Everything a site keeps.

    Parameters
    ----------
    folder : Path
        Made if absent; readable by its owner only.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        self.folder = folder
        self._blobs = folder / "blobs"
        self._engine = _open(folder / "store.sqlite")
        _Base.metadata.create_all(self._engine)

    def image_key(self) -> bytes:
        """Return the site's secret for image ids, made on first use."""
        path = self.folder / "image.key"
        if not path.exists():
            write_atomically(path, secrets.token_bytes(32), mode=0o600)
        return path.read_bytes()

    def catalogue(self, images: Sequence[CataloguedImage]) -> None:
        """Replace the catalogue of images."""
        with Session(self._engine) as session, session.begin():
            session.execute(delete(Image))
            session.add_all(Image(**vars(image)) for image in images)

    def images(self, part: str | None = None) -> list[CataloguedImage]:
        """Return the catalogue in its fixed order, or one part of it (``pool`` or ``test``)."""
        query = select(Image).order_by(Image.position)
        if part is not None:
            query = query.where(Image.part == part)
        with Session(self._engine) as session:
            return [
                CataloguedImage(i.id, i.name, i.part, i.label, i.group, i.position)
                for i in session.scalars(query)
            ]

    def annotate(self, labels: Iterable[tuple[str, int]], author: str) -> None:
        """Record labels as (image id, label); a second label of an image replaces the first."""
        rows = [{"image": i, "label": y, "author": author, "time": time.time()} for i, y in labels]
        if not rows:
            return
        statement = insert(Annotation)
        update = {c: statement.excluded[c] for c in ("label", "author", "time")}
        with Session(self._engine) as session, session.begin():
            session.execute(statement.on_conflict_do_update(["image"], set_=update), rows)

    def annotations(self) -> dict[str, int]:
        """Return the labels given so far, by image id."""
        with Session(self._engine) as session:
            rows = session.execute(
                select(Annotation.image, Annotation.label).order_by(Annotation.image)
            )
            return {row.image: row.label for row in rows}

    def put(self, name: str, records: Records) -> None:
        """Store records under a name; the old blob of that name goes."""
        self._put({name: to_bytes(records)})

    def put_many(self, records: Mapping[str, Records]) -> None:
        """Store several records under their names: all of them or, if interrupted, none."""
        self._put({name: to_bytes(r) for name, r in records.items()})

    def put_bytes(self, name: str, data: bytes) -> None:
        """Store bytes under a name."""
        self._put({name: data})

    def _put(self, blobs: Mapping[str, bytes]) -> None:
        digests = {name: sha256(data) for name, data in blobs.items()}
        for name, data in blobs.items():
            path = self._path(digests[name])
            if not path.exists():
                write_atomically(path, data)
        statement = insert(Artifact)
        update = {c: statement.excluded[c] for c in ("digest", "bytes", "used")}
        now = time.time()
        rows = [
            {"name": name, "digest": digests[name], "bytes": len(data), "used": now}
            for name, data in blobs.items()
        ]
        with Session(self._engine) as session, session.begin():
            old = set(session.scalars(select(Artifact.digest).where(Artifact.name.in_(blobs))))
            session.execute(statement.on_conflict_do_update(["name"], set_=update), rows)
        for digest in old - set(digests.values()):
            self._collect(digest)

    def get(self, name: str) -> Records | None:
        """Return the records of a name, or None.

        Raises
        ------
        SonoFedError
            The blob on disk is missing or differs from what was written.
        """
        data = self.get_bytes(name)
        return None if data is None else from_bytes(data)

    def get_bytes(self, name: str) -> bytes | None:
        """Return the bytes of a name, or None; checked against their digest."""
        digest = self.digest(name)
        if digest is None:
            return None
        path = self._path(digest)
        data = path.read_bytes() if path.exists() else b""
        if sha256(data) != digest:
            raise SonoFedError(
                "a blob of the site store is damaged; restore the store from its backup"
            )
        with Session(self._engine) as session, session.begin():
            session.get_one(Artifact, name).used = time.time()
        return data

    def digest(self, name: str) -> str | None:
        """Return the digest stored under a name, or None."""
        with Session(self._engine) as session:
            return session.scalar(select(Artifact.digest).where(Artifact.name == name))

    def names(self, prefix: str) -> set[str]:
        """Return the artifact names that start with a prefix."""
        with Session(self._engine) as session:
            query = select(Artifact.name).where(Artifact.name.startswith(prefix, autoescape=True))
            return set(session.scalars(query))

    def remove(self, prefix: str) -> None:
        """Remove the artifacts whose names start with a prefix."""
        for name in self.names(prefix):
            self._remove(name)

    def trim(self, prefix: str, limit: int = JOB_CACHE_BYTES) -> None:
        """Remove the least recently used artifacts of a prefix until they fit a limit in bytes."""
        match = Artifact.name.startswith(prefix, autoescape=True)
        with Session(self._engine) as session:
            total = session.scalar(select(func.sum(Artifact.bytes)).where(match)) or 0
            if total <= limit:
                return
            rows = list(session.scalars(select(Artifact).where(match).order_by(Artifact.used)))
        for row in rows:
            if total <= limit:
                return
            self._remove(row.name)
            total -= row.bytes

    def _remove(self, name: str) -> None:
        digest = self.digest(name)
        with Session(self._engine) as session, session.begin():
            session.execute(delete(Artifact).where(Artifact.name == name))
        if digest is not None:
            self._collect(digest)

    def _collect(self, digest: str) -> None:
        with Session(self._engine) as session:
            if session.scalar(select(func.count()).where(Artifact.digest == digest)) == 0:
                self._path(digest).unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        return self._blobs / digest[:2] / digest


def _open(path: Path) -> Engine:
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})

    @event.listens_for(engine, "connect")
    def _pragmas(connection: object, _: object) -> None:
        cursor = connection.cursor()  # type: ignore[attr-defined]
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.close()

    return engine
