"""The site's keys: a master key that the hospital holds wraps those that the store works with."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import ValidationError

from sonofed_client.enclave.durable import write_durably
from sonofed_client.enclave.master_key import KEY_BYTES, MasterKey, identity_of
from sonofed_common.contract.configuration import Model
from sonofed_common.contract.errors import ConfigurationError, StoreError

__all__ = ["KeyRing", "MasterKey"]

NONCE_BYTES, KEY_ID_BYTES = 12, 8
IMAGES, BLOB_NAMES, LEDGER = "images", "blob-names", "ledger"


class _KeyFile(Model):
    version: Literal[1] = 1
    master: str
    current: str
    keys: dict[str, str]


class KeyRing:
    """A site's keys, in memory: data keys, the secrets of ids and names, and the ledger's key.

    Notes
    -----
    On disk they are wrapped by AES-256-GCM under the master key, each bound to its name. Data keys
    are random; blobs name theirs, so that another may come to be used for new ones.
    """

    def __init__(self, path: Path, keys: dict[str, bytes], current: str, master: MasterKey) -> None:
        self._path = path
        self._keys = keys
        self._master = master
        self.current = current

    @classmethod
    def open(cls, folder: Path, master: MasterKey) -> KeyRing:
        """Open a store's keys, or make them for a new store.

        Parameters
        ----------
        folder : Path
            Of the store; made if absent.
        master : MasterKey
            Wraps them.

        Raises
        ------
        StoreError
            The master key is absent or another one, or the file of keys is lost or damaged.
        """
        path = folder / "keys.json"
        if not path.exists():
            if (folder / "store.sqlite").exists():
                raise StoreError(
                    "the site's store has no keys.json: restore it from the backup or, if the "
                    "store is of a version that did not encrypt, move the store away and take the "
                    "images in again"
                )
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
            current = secrets.token_hex(KEY_ID_BYTES)
            names = (_data(current), IMAGES, BLOB_NAMES, LEDGER)
            ring = cls(path, {n: secrets.token_bytes(KEY_BYTES) for n in names}, current, master)
            # Of two processes that open a new store at once, one makes the keys of both.
            write_durably(path, [ring._wrapped(master.read(new=True))], replace=False)
        # Else a rotation might come between the two that are read here.
        with _alone(folder):
            kept = _read_key_file(path)
            given = master.read()
            same = identity_of(given) == kept.master
            secret = given if same else master.succeed(kept.master)
        if secret is None:
            raise StoreError(
                "the master key is not the one of this site's store; check [master_key] in the "
                "site's settings"
            )
        keys = {name: _unwrap(secret, name, wrapped) for name, wrapped in kept.keys.items()}
        if not keys.keys() >= {_data(kept.current), IMAGES, BLOB_NAMES, LEDGER}:
            _damaged()
        return cls(path, keys, kept.current, master)

    def rotate(self, new_master: MasterKey | None = None) -> None:
        """Wrap the keys by another master key; whenever this is interrupted, one of the two opens.

        Parameters
        ----------
        new_master : MasterKey or None
            None makes a fresh key in the place of the old one, where that is a file.

        Raises
        ------
        ConfigurationError
            The new master key is the old one, or is to be made where none can be.
        StoreError
            The new master key is absent, or the disk is full.
        """
        with _alone(self._path.parent):
            in_use = _read_key_file(self._path).master
            # A successor that an interrupted rotation left, and that is in use, is not made anew.
            self._master.succeed(in_use)
            secret = (new_master or self._master.prepare_successor()).read()
            identity = identity_of(secret)
            if identity == in_use:
                raise ConfigurationError("the new master key is the one in use; name another")
            write_durably(self._path, [self._wrapped(secret)])
            if new_master is None:
                self._master.succeed(identity)
            else:
                self._master = new_master

    @property
    def images(self) -> bytes:
        """Secret of the image ids (HMAC-SHA256)."""
        return self._keys[IMAGES]

    @property
    def blob_names(self) -> bytes:
        """Secret of the blobs' file names (HMAC-SHA256)."""
        return self._keys[BLOB_NAMES]

    @property
    def ledger(self) -> Ed25519PrivateKey:
        """Key that signs the ledger."""
        return Ed25519PrivateKey.from_private_bytes(self._keys[LEDGER])

    def data(self, key_id: str) -> bytes | None:
        """Return a data key (AES-256) by its id, or None."""
        return self._keys.get(_data(key_id))

    def seal(self, text: str, context: str) -> bytes:
        """Encrypt a private text of the catalogue; it opens in the same context only."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        key = self._keys[_data(self.current)]
        sealed = AESGCM(key).encrypt(nonce, text.encode(), f"{self.current} {context}".encode())
        return bytes.fromhex(self.current) + nonce + sealed

    def unseal(self, sealed: bytes, context: str) -> str:
        """Return what `seal` encrypted.

        Raises
        ------
        StoreError
            It was changed, or is of another context.
        """
        try:
            key_id, rest = sealed[:KEY_ID_BYTES].hex(), sealed[KEY_ID_BYTES:]
            nonce, text = rest[:NONCE_BYTES], rest[NONCE_BYTES:]
            key = self._keys[_data(key_id)]
            return AESGCM(key).decrypt(nonce, text, f"{key_id} {context}".encode()).decode()
        except (KeyError, ValueError, TypeError, AttributeError, InvalidTag):
            raise damaged_catalogue() from None

    def _wrapped(self, secret: bytes) -> bytes:
        keys = {}
        for name, key in self._keys.items():
            nonce = secrets.token_bytes(NONCE_BYTES)
            keys[name] = (nonce + AESGCM(secret).encrypt(nonce, key, _bound(name))).hex()
        kept = _KeyFile(master=identity_of(secret), current=self.current, keys=keys)
        return kept.model_dump_json(indent=1).encode()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _data(key_id: str) -> str:
    return f"data/{key_id}"


def _bound(name: str) -> bytes:
    return f"sonofed key 1 {name}".encode()


def _unwrap(secret: bytes, name: str, wrapped: str) -> bytes:
    try:
        raw = bytes.fromhex(wrapped)
        key = AESGCM(secret).decrypt(raw[:NONCE_BYTES], raw[NONCE_BYTES:], _bound(name))
    except (ValueError, InvalidTag):
        _damaged()
    return key


def _read_key_file(path: Path) -> _KeyFile:
    try:
        return _KeyFile.model_validate_json(path.read_bytes())
    except ValidationError:
        _damaged()


def damaged_catalogue() -> StoreError:
    """Return the error of a catalogue that is not as it was written."""
    return StoreError(
        "the catalogue of the site's store is damaged; restore the store from its backup"
    )


def _damaged() -> NoReturn:
    raise StoreError("the site store's keys.json is damaged; restore it from its backup")
