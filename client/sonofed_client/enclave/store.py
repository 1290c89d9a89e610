"""The site's store: a SQLite catalogue over content-addressed, encrypted blobs."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.orm import Session

from sonofed_client.enclave.blobs import Blobs, damaged_blob
from sonofed_client.enclave.catalogue import Annotation, Artifact, Catalogue, Image, Total
from sonofed_client.enclave.durable import full_disk_named
from sonofed_client.enclave.keys import KeyRing, damaged_catalogue
from sonofed_client.enclave.master_key import MasterKey
from sonofed_client.settings import SiteSettings
from sonofed_common.contract.records import Records, from_bytes, to_bytes
from sonofed_common.security import sha256

JOB_CACHE_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class CataloguedImage:
    """A row of the catalogue: opaque id, private name and group, part and label."""

    id: str
    name: str
    part: str
    label: int | None
    group: str
    position: int


def open_store(settings: SiteSettings) -> Store:
    """Open the store of a site with the master key that its settings name."""
    return Store(settings.store, KeyRing.open(settings.store, MasterKey.of(settings)))


class Store:
    """Everything a site keeps, readable by its owner only.

    Parameters
    ----------
    folder : Path
        Made if absent.
    keys : KeyRing or None
        Of this folder; None opens it with the default master key.

    Raises
    ------
    StoreError
        Another master key, a damaged or unencrypted store, or a full disk.

    Notes
    -----
    Blobs and the images' names and groups are encrypted. Ids, parts, labels, positions and the
    names, sizes and digests of artifacts stand in the catalogue as they are; a row of an image or a
    label that was changed, moved, added or lost is found when it is read. An old blob goes only
    when the catalogue on the disk no longer names it: at any instant, all that was there is.
    """

    def __init__(self, folder: Path, keys: KeyRing | None = None) -> None:
        self.folder = folder
        self.keys = keys or KeyRing.open(folder, MasterKey.beside(folder))
        self._used: dict[str, float] = {}
        with full_disk_named():
            self._blobs = Blobs(folder / "blobs", self.keys)
            self._catalogue = Catalogue(folder / "store.sqlite", self._begin)

    def _begin(self, session: Session) -> None:
        # From now on a total that is not there was taken away.
        for name in ("images", "annotations"):
            self._set_totals(session, name, {})

    def image_key(self) -> bytes:
        """Return the site's secret for image ids."""
        return self.keys.images

    def catalogue(self, images: Sequence[CataloguedImage]) -> None:
        """Replace the catalogue of images."""
        rows = [
            Image(
                id=i.id,
                part=i.part,
                label=i.label,
                position=i.position,
                sealed=self.keys.seal(
                    json.dumps([i.name, i.group]), _bound(i.id, i.part, i.label, i.position)
                ),
            )
            for i in images
        ]
        with self._catalogue.write() as session:
            session.execute(delete(Image))
            session.add_all(rows)
            self._set_totals(session, "images", Counter(i.part for i in images))

    def images(self, part: str | None = None) -> list[CataloguedImage]:
        """Return the catalogue in its fixed order, or one part of it (``pool`` or ``test``)."""
        query = select(Image.sealed, Image.id, Image.part, Image.label, Image.position)
        if part is not None:
            query = query.where(Image.part == part)
        with self._catalogue.read() as session:
            rows = session.execute(query.order_by(Image.position)).all()
            totals = self._totals(session, "images")
        if len(rows) != (sum(totals.values()) if part is None else totals.get(part, 0)):
            raise damaged_catalogue()
        return [self._catalogued(*row) for row in rows]

    def _catalogued(
        self, sealed: bytes, key: str, part: str, label: int | None, position: int
    ) -> CataloguedImage:
        name, group = json.loads(self.keys.unseal(sealed, _bound(key, part, label, position)))
        return CataloguedImage(key, name, part, label, group, position)

    def annotate(self, labels: Iterable[tuple[str, int]], author: str) -> None:
        """Record labels as (image id, label); a second label of an image replaces the first."""
        now = time.time()
        rows = [
            {
                "image": i,
                "label": y,
                "author": author,
                "time": now,
                "sealed": self.keys.seal("", _bound(i, y, author, now)),
            }
            for i, y in labels
        ]
        if not rows:
            return
        statement = insert(Annotation)
        changes = {c: statement.excluded[c] for c in ("label", "author", "time", "sealed")}
        with self._catalogue.write() as session:
            labelled = self._annotations(session).keys() | {row["image"] for row in rows}
            session.execute(statement.on_conflict_do_update(["image"], set_=changes), rows)
            self._set_totals(session, "annotations", {"all": len(labelled)})

    def annotations(self) -> dict[str, int]:
        """Return the labels given so far, by image id."""
        with self._catalogue.read() as session:
            return self._annotations(session)

    def _annotations(self, session: Session) -> dict[str, int]:
        of = Annotation
        query = select(of.sealed, of.image, of.label, of.author, of.time).order_by(of.image)
        rows = session.execute(query).all()
        if len(rows) != self._totals(session, "annotations").get("all", 0):
            raise damaged_catalogue()
        for row in rows:
            self.keys.unseal(row.sealed, _bound(row.image, row.label, row.author, row.time))
        return {row.image: row.label for row in rows}

    def _totals(self, session: Session, name: str) -> dict[str, int]:
        sealed = session.scalar(select(Total.sealed).where(Total.name == name))
        if sealed is None:
            raise damaged_catalogue()
        totals: dict[str, int] = json.loads(self.keys.unseal(sealed, _bound("total", name)))
        return totals

    def _set_totals(self, session: Session, name: str, totals: Mapping[str, int]) -> None:
        sealed = self.keys.seal(json.dumps(totals), _bound("total", name))
        session.merge(Total(name=name, sealed=sealed))

    def put(self, name: str, records: Records) -> None:
        """Store records under a name; the old blob of that name goes."""
        self._put({name: to_bytes(records)})

    def put_many(self, records: Mapping[str, Records]) -> None:
        """Store several records under their names: all of them or, if interrupted, none."""
        self._put({name: to_bytes(r) for name, r in records.items()})

    def put_bytes(self, name: str, data: bytes | memoryview, digest: str | None = None) -> None:
        """Store bytes under a name; ``digest`` is their SHA-256, where it is known already."""
        self._put({name: data}, {} if digest is None else {name: digest})

    def _put(
        self, blobs: Mapping[str, bytes | memoryview], known: Mapping[str, str] | None = None
    ) -> None:
        known = known or {}
        digests = {name: known.get(name) or sha256(data) for name, data in blobs.items()}
        statement = insert(Artifact)
        changes = {c: statement.excluded[c] for c in ("digest", "bytes", "used")}
        now = time.time()
        rows = [
            {"name": name, "digest": digests[name], "bytes": len(data), "used": now}
            for name, data in blobs.items()
        ]
        unnamed = set(digests.values())
        try:
            for name, data in blobs.items():
                self._blobs.write(digests[name], data)
            self._blobs.settle()
            with self._catalogue.write() as session:
                for name, data in blobs.items():
                    # Another process may have removed the last name of the same content just now.
                    if not self._blobs.has(digests[name]):
                        self._blobs.write(digests[name], data)
                        self._blobs.settle()
                old = set(session.scalars(select(Artifact.digest).where(Artifact.name.in_(blobs))))
                session.execute(statement.on_conflict_do_update(["name"], set_=changes), rows)
            unnamed = old - unnamed
        finally:
            self._collect(unnamed)

    def get(self, name: str) -> Records | None:
        """Return the records of a name, or None.

        Raises
        ------
        StoreError
            The blob on disk is missing or differs from what was written.
        """
        data = self.get_bytes(name)
        return None if data is None else from_bytes(data)

    def get_bytes(self, name: str) -> bytes | None:
        """Return the bytes of a name, or None; checked against their digest."""
        while (digest := self.digest(name)) is not None:
            data = self._blobs.read(digest)
            if data is not None:
                self._used[name] = time.time()
                return data
            # Another process may have replaced it since the catalogue was read; not under the lock.
            with self._catalogue.write() as session:
                named = _digest(session, name) == digest
                lost = named and not self._blobs.has(digest)
            if lost:
                raise damaged_blob()
        return None

    def digest(self, name: str) -> str | None:
        """Return the digest stored under a name, or None."""
        with self._catalogue.read() as session:
            return _digest(session, name)

    def names(self, prefix: str) -> set[str]:
        """Return the artifact names that start with a prefix."""
        with self._catalogue.read() as session:
            query = select(Artifact.name).where(Artifact.name.startswith(prefix, autoescape=True))
            return set(session.scalars(query))

    def remove(self, prefix: str) -> None:
        """Remove the artifacts whose names start with a prefix."""
        self._remove(self.names(prefix))

    def trim(self, prefix: str, limit: int = JOB_CACHE_BYTES) -> None:
        """Remove the least recently used artifacts of a prefix until they fit a limit in bytes."""
        match = Artifact.name.startswith(prefix, autoescape=True)
        used, self._used = self._used, {}
        with self._catalogue.write() as session:
            for name, moment in used.items():
                session.execute(
                    update(Artifact)
                    .where(Artifact.name == name, Artifact.used < moment)
                    .values(used=moment)
                )
            query = select(Artifact.name, Artifact.bytes).where(match).order_by(Artifact.used)
            rows = list(session.execute(query))
        total = sum(row.bytes for row in rows)
        dropped = []
        for row in rows:
            if total <= limit:
                break
            dropped.append(row.name)
            total -= row.bytes
        self._remove(dropped)

    def _remove(self, names: Iterable[str]) -> None:
        dropped: set[str] = set()
        with self._catalogue.write() as session:
            for name in names:
                gone = delete(Artifact).where(Artifact.name == name).returning(Artifact.digest)
                dropped.update(session.scalars(gone))
        self._collect(dropped)

    def _collect(self, digests: Iterable[str]) -> None:
        """Remove the blobs that no name needs any more."""
        digests = list(digests)
        if not digests:
            return
        # Else a power cut could bring names back that have no blob any more.
        self._catalogue.settle()
        # Under the lock, nobody gives one of them a name between the question and the removal.
        with self._catalogue.write() as session:
            for digest in digests:
                if session.scalar(select(func.count()).where(Artifact.digest == digest)) == 0:
                    self._blobs.remove(digest)


def _bound(*row: str | float | None) -> str:
    """A row of the catalogue as the text that its seal is bound to."""
    return f"row {row!r}"


def _digest(session: Session, name: str) -> str | None:
    return session.scalar(select(Artifact.digest).where(Artifact.name == name))
