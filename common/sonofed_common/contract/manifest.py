"""The manifest of a bundle: what it holds, by digest, and who vouches for it."""

from __future__ import annotations

import json
from collections.abc import Collection
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from sonofed_common.contract.configuration import Model
from sonofed_common.contract.errors import BundleError
from sonofed_common.security import sha256, verify

Kind = Literal["source", "synthetic", "final"]

SYNTHETIC_IMAGES = "synthetic/source.safetensors"
"""Where a source bundle holds images that were drawn from source edges: records with ``images``
(N, S, S) uint8 and ``labels`` (N,) int64."""

SHARED_IMAGES = "synthetic/sites.safetensors"
"""Where a synthetic bundle holds the images that the sites of a study share: the same records."""


class Blob(Model):
    """Digest and size of one file."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class DataProvenance(Model):
    """Which labelled images the weights come from; counts and a digest, never a name."""

    name: str
    digest: str = Field(description="SHA-256 over the images' own digests, labels and groups")
    images: int = Field(ge=0)
    groups: int = Field(ge=0)


class Provenance(Model):
    """Where the weights come from: enough to train them again."""

    data: DataProvenance
    seeds: dict[str, int] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    settings: str = Field(description="SHA-256 of the validated settings")


class Manifest(Model):
    """What a bundle holds and who vouches for it.

    Attributes
    ----------
    created : datetime
        For a bundle that a study signs, when the study started: what is signed anew after an
        interruption then has the same id.
    files : dict of str to Blob
        Logical path, for example ``"diffusion/unet/config.json"``, to its content.
    facts : dict of str to JSON value
        What a site needs to use the weights: thresholds, image size, classes, edge parameters.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    kind: Kind
    created: datetime
    public_key: str = Field(pattern=r"^[0-9a-f]{64}$")
    files: dict[str, Blob]
    facts: dict[str, Any] = Field(default_factory=dict)
    provenance: Provenance

    @field_validator("files")
    @classmethod
    def _safe(cls, files: dict[str, Blob]) -> dict[str, Blob]:
        for path in files:
            check_path(path)
            if any(str(parent) in files for parent in PurePosixPath(path).parents):
                raise ValueError("a logical path is both a file and a folder")
        sizes: dict[str, int] = {}
        if any(sizes.setdefault(blob.sha256, blob.bytes) != blob.bytes for blob in files.values()):
            raise ValueError("one digest comes with two sizes")
        return files

    @property
    def blobs(self) -> dict[str, int]:
        """Size in bytes of each distinct blob, by digest."""
        return {blob.sha256: blob.bytes for blob in self.files.values()}

    def missing(self, have: Collection[str]) -> list[str]:
        """Digests of the blobs that are not in ``have``, sorted."""
        return sorted(set(self.blobs) - set(have))

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, UTF-8, finite numbers only."""
        values = self.model_dump(mode="json")
        text = json.dumps(
            values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
        return text.encode()


def check_path(path: str) -> None:
    """Refuse a logical path that could name anything outside a bundle.

    Raises
    ------
    ValueError
        Absolute, empty, or with ``.``, ``..``, a backslash, a colon or a control character.
    """
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or any(c in "\\:" or c < " " for c in path):
        raise ValueError("a logical path must be relative, with '/' between plain names")


def verify_manifest(manifest: bytes, signature: bytes, public_key: str | None) -> Manifest:
    """Check and parse a manifest.

    Parameters
    ----------
    manifest : bytes
        Content of ``manifest.json``.
    signature : bytes
        Content of ``manifest.sig``.
    public_key : str or None
        The coordinator's key as 64 hex digits; None takes the key that the manifest names, which
        proves integrity but not origin.

    Raises
    ------
    BundleError
        Malformed manifest, another signer's, or a signature that does not match.
    """
    try:
        parsed = Manifest.model_validate_json(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        reason = first["msg"].removeprefix("Value error, ")
        raise BundleError(
            f"the bundle's manifest is malformed ({reason}); fetch the bundle again"
        ) from None
    if public_key is not None and parsed.public_key != public_key.strip().lower():
        raise BundleError(
            "the bundle is signed by another key than the coordinator's; ask the coordinator which "
            "key is right"
        )
    verify(parsed.public_key, signature, manifest)
    return parsed


def check_blob(manifest: Manifest, digest: str, data: bytes) -> None:
    """Check one blob before it is stored.

    Parameters
    ----------
    manifest : Manifest
        A verified one.
    digest : str
        Hex SHA-256 under which the blob came.
    data : bytes
        Its content.

    Raises
    ------
    BundleError
        The manifest does not name the blob, or its content differs.
    """
    size = manifest.blobs.get(digest)
    if size is None:
        raise BundleError(f"blob {digest[:12]} is not part of the bundle; send only what it names")
    if len(data) != size or sha256(data) != digest:
        raise damaged(digest)


def damaged(digest: str) -> BundleError:
    """Error of a blob whose content is not what its digest says."""
    return BundleError(f"blob {digest[:12]} of the bundle is damaged; fetch the bundle again")
