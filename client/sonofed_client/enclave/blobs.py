"""Blobs on disk: encrypted files, each found by its content's digest and bound to it."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM

from sonofed_client.enclave.durable import sync_folder, write_durably
from sonofed_client.enclave.keys import KEY_ID_BYTES, NONCE_BYTES, KeyRing
from sonofed_common.contract.errors import StoreError

MAGIC = b"sonofed\x01"
HEADER_BYTES = len(MAGIC) + KEY_ID_BYTES
TAG_BYTES = 16
CHUNK_BYTES = 4 * 1024**2
STALE_SECONDS = 3600.0
"""An unfinished file older than this is of a process that died."""


class Blobs:
    """Files of a store, each ``magic | key id | nonce | AES-256-GCM ciphertext | tag``.

    Parameters
    ----------
    folder : Path
        Made if absent.
    keys : KeyRing
        Its current data key encrypts; the one that a blob names decrypts.

    Notes
    -----
    The associated data are the header and the SHA-256 of the content: a blob in another's place,
    or an older one in its own, does not decrypt. A file's name is an HMAC of that digest: it tells
    nothing of the content, and sites that hold the same have no name in common. Nonces are random;
    for one data key the risk of a repeated one stays below 2^-32 up to 2^32 blobs (NIST SP
    800-38D, 8.3).
    """

    def __init__(self, folder: Path, keys: KeyRing) -> None:
        self._folder = folder
        self._scratch = folder / "unfinished"
        self._keys = keys
        self._scratch.mkdir(parents=True, exist_ok=True)
        for left in self._scratch.iterdir():
            with suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > STALE_SECONDS:
                    left.unlink()

    def write(self, digest: str, data: bytes | memoryview) -> None:
        """Encrypt a blob to its file; an older file of the same content is replaced.

        Parameters
        ----------
        digest : str
            SHA-256 of the data, hex.
        data : bytes or memoryview
            Any number of them; held once, encrypted piece by piece.

        Raises
        ------
        StoreError
            The disk is full.
        """
        write_durably(self._path(digest), self._encrypted(digest, data), self._scratch)

    def settle(self) -> None:
        """Make what was written survive a power cut."""
        sync_folder(self._folder)

    def read(self, digest: str) -> bytes | None:
        """Return the content of this digest, or None if there is no file of it.

        Raises
        ------
        StoreError
            The file is not what was written.
        """
        try:
            with self._path(digest).open("rb") as file:
                left = os.fstat(file.fileno()).st_size - HEADER_BYTES - NONCE_BYTES - TAG_BYTES
                header, nonce = file.read(HEADER_BYTES), file.read(NONCE_BYTES)
                key = self._keys.data(header[len(MAGIC) :].hex())
                if left < 0 or key is None:
                    raise damaged_blob()
                decryptor = Cipher(AES(key), GCM(nonce)).decryptor()
                decryptor.authenticate_additional_data(header + bytes.fromhex(digest))
                content = BytesIO()
                while left:
                    part = file.read(min(left, CHUNK_BYTES))
                    if not part:
                        raise damaged_blob()
                    left -= len(part)
                    content.write(decryptor.update(part))
                decryptor.finalize_with_tag(file.read(TAG_BYTES))
        except FileNotFoundError:
            return None
        except (ValueError, InvalidTag):
            raise damaged_blob() from None
        # Not a copy: the buffer becomes the bytes.
        return content.getvalue()

    def has(self, digest: str) -> bool:
        """Return whether there is a file of this digest, whole or not."""
        return self._path(digest).exists()

    def remove(self, digest: str) -> None:
        """Remove a blob, if it is there."""
        self._path(digest).unlink(missing_ok=True)

    def _encrypted(self, digest: str, data: bytes | memoryview) -> Iterator[bytes]:
        key = self._keys.data(self._keys.current)
        assert key is not None
        header = MAGIC + bytes.fromhex(self._keys.current)
        nonce = secrets.token_bytes(NONCE_BYTES)
        encryptor = Cipher(AES(key), GCM(nonce)).encryptor()
        encryptor.authenticate_additional_data(header + bytes.fromhex(digest))
        parts = memoryview(data)
        yield header + nonce + encryptor.update(parts[:CHUNK_BYTES])
        for start in range(CHUNK_BYTES, len(parts), CHUNK_BYTES):
            yield encryptor.update(parts[start : start + CHUNK_BYTES])
        yield encryptor.finalize() + encryptor.tag

    def _path(self, digest: str) -> Path:
        name = hmac.new(self._keys.blob_names, digest.encode(), hashlib.sha256).hexdigest()
        return self._folder / name


def damaged_blob() -> StoreError:
    """Return the error of a blob that is not what was written."""
    return StoreError("a blob of the site store is damaged; restore the store from its backup")
