"""The bundle: signed weights and facts, content-addressed, so that each blob is sent once.

A bundle is a folder::

    manifest.json    canonical JSON; its SHA-256 is the bundle's id
    manifest.sig     Ed25519 signature of those bytes
    blobs/<sha256>   the files, named by their content
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sonofed_common.contract.errors import BundleError
from sonofed_common.contract.manifest import (
    Blob,
    DataProvenance,
    Kind,
    Manifest,
    Provenance,
    check_blob,
    check_path,
    damaged,
    verify_manifest,
)
from sonofed_common.runtime import write_atomically
from sonofed_common.security import public_hex, sha256, sha256_file

__all__ = [
    "Blob",
    "Bundle",
    "BundleWriter",
    "DataProvenance",
    "Manifest",
    "Provenance",
    "check_blob",
    "check_path",
    "verify_manifest",
]

MANIFEST, SIGNATURE, BLOBS = "manifest.json", "manifest.sig", "blobs"


class BundleWriter:
    """Collects files, then signs them as one bundle.

    Parameters
    ----------
    folder : Path
        Where the bundle goes; one that is already there stays valid until `sign` replaces it.
    name, kind, provenance, created
        See `Manifest`; ``created`` is by default the time of signing.

    Attributes
    ----------
    facts : dict of str to JSON value
        Goes into the manifest; fill it before `sign`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        kind: Kind,
        provenance: Provenance,
        created: datetime | None = None,
    ) -> None:
        self.folder = folder
        self.name = name
        self.kind: Kind = kind
        self.provenance = provenance
        self.created = created
        self.facts: dict[str, Any] = {}
        self._files: dict[str, Blob] = {}

    def add(self, path: str, data: bytes) -> None:
        """Add one file under a logical path.

        Raises
        ------
        ValueError
            The path is not a safe relative one.
        """
        check_path(path)
        blob = Blob(sha256=sha256(data), bytes=len(data))
        write_atomically(self.folder / BLOBS / blob.sha256, data)
        self._files[path] = blob

    def add_tree(self, prefix: str, folder: Path) -> None:
        """Add every file of a folder as ``<prefix>/<relative path>``."""
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.add(f"{prefix}/{file.relative_to(folder).as_posix()}", file.read_bytes())

    def sign(self, key: Ed25519PrivateKey) -> Bundle:
        """Write manifest and signature, and remove blobs that no file names.

        Parameters
        ----------
        key : Ed25519PrivateKey
            The coordinator's.
        """
        manifest = Manifest(
            name=self.name,
            kind=self.kind,
            created=self.created or datetime.now(UTC).replace(microsecond=0),
            public_key=public_hex(key),
            files=self._files,
            facts=self.facts,
            provenance=self.provenance,
        )
        data = manifest.to_bytes()
        # Without its manifest a bundle is refused: whenever this is interrupted, none is half new.
        (self.folder / MANIFEST).unlink(missing_ok=True)
        write_atomically(self.folder / SIGNATURE, key.sign(data))
        write_atomically(self.folder / MANIFEST, data)
        for blob in (self.folder / BLOBS).glob("*"):
            if blob.name not in manifest.blobs:
                blob.unlink()
        return Bundle(self.folder, manifest, sha256(data))


class Bundle:
    """A bundle whose signature was checked; make one with `Bundle.open`.

    Attributes
    ----------
    manifest : Manifest
    id : str
        SHA-256 of the manifest's bytes.
    """

    def __init__(self, folder: Path, manifest: Manifest, id: str) -> None:
        self.folder = folder
        self.manifest = manifest
        self.id = id

    @classmethod
    def open(cls, folder: Path, public_key: str | None = None, *, check_blobs: bool = True) -> Self:
        """Open a bundle folder.

        Parameters
        ----------
        folder : Path
            Holds the manifest, the signature and the blobs.
        public_key : str or None
            See `verify_manifest`.
        check_blobs : bool
            Check every blob now; otherwise each one when it is read.

        Raises
        ------
        BundleError
            Anything missing, changed, malformed or signed by another key.
        """
        data = _read(folder / MANIFEST, "it has no manifest")
        signature = _read(folder / SIGNATURE, "it has no signature")
        bundle = cls(folder, verify_manifest(data, signature, public_key), sha256(data))
        if check_blobs:
            for digest in sorted(bundle.manifest.blobs):
                bundle._check(digest)
        return bundle

    @property
    def paths(self) -> list[str]:
        """Logical paths, sorted."""
        return sorted(self.manifest.files)

    def missing(self, have: Collection[str]) -> list[str]:
        """Digests of the blobs that a store which holds ``have`` lacks."""
        return self.manifest.missing(have)

    def blob(self, digest: str) -> bytes:
        """Content of a blob, checked.

        Raises
        ------
        BundleError
            Unknown, missing or changed.
        """
        if digest not in self.manifest.blobs:
            raise BundleError(f"blob {digest[:12]} is not part of the bundle")
        data = _read(self.folder / BLOBS / digest, f"its blob {digest[:12]} is missing")
        check_blob(self.manifest, digest, data)
        return data

    def read(self, path: str) -> bytes:
        """Content of a file, checked.

        Parameters
        ----------
        path : str
            Logical path.

        Raises
        ------
        BundleError
            No such path, or its blob is missing or changed.
        """
        return self.blob(self._blob(path).sha256)

    def _blob(self, path: str) -> Blob:
        if path not in self.manifest.files:
            raise BundleError(f"the bundle holds no '{path}'")
        return self.manifest.files[path]

    def _check(self, digest: str) -> None:
        file = self.folder / BLOBS / digest
        if not file.is_file():
            raise _incomplete(f"its blob {digest[:12]} is missing")
        if file.stat().st_size != self.manifest.blobs[digest] or sha256_file(file) != digest:
            raise damaged(digest)


def _read(file: Path, reason: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        raise _incomplete(reason) from None


def _incomplete(reason: str) -> BundleError:
    return BundleError(f"the bundle is incomplete: {reason}; fetch the bundle again")
