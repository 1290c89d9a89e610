"""The site's master key: where the hospital keeps it, and how another takes its place."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import subprocess
from contextlib import suppress
from pathlib import Path

from sonofed_client.enclave.durable import sync_folder, write_durably
from sonofed_client.settings import MasterKeySource, SiteSettings
from sonofed_common.contract.errors import ConfigurationError, StoreError

KEY_BYTES = 32
COMMAND_SECONDS = 60.0

log = logging.getLogger(__name__)


class MasterKey:
    """The key that wraps all others of a site: 64 hex digits or, in a file, also 32 raw bytes.

    Parameters
    ----------
    source : MasterKeySource
        File, environment variable or command (a client of the hospital's key management).
    make : bool
        Make the file for a new store if it is absent.
    """

    def __init__(self, source: MasterKeySource, make: bool = False) -> None:
        self.source = source
        self._make = make

    @classmethod
    def beside(cls, store: Path) -> MasterKey:
        """Return the default: a file next to the store's folder, made for a new store."""
        return cls(MasterKeySource(file=store.with_name(f"{store.name}.master.key")), make=True)

    @classmethod
    def of(cls, settings: SiteSettings) -> MasterKey:
        """Return the master key that a site's settings name."""
        if settings.master_key is not None:
            return cls(settings.master_key)
        if not settings.oracle:
            log.warning(
                "the master key lies beside the store of site %s, on the same disk; name another "
                "place in [master_key]",
                settings.name,
            )
        return cls.beside(settings.store)

    def read(self, new: bool = False) -> bytes:
        """Return the key.

        Parameters
        ----------
        new : bool
            For a new store: the default file may be made.

        Raises
        ------
        StoreError
            It is not there, or is not a key.
        """
        file, environment = self.source.file, self.source.environment
        if file is not None:
            if new and self._make and not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                write_durably(file, [_fresh_text()], replace=False)
            return _of_file(file)
        if environment is not None:
            value = os.environ.get(environment)
            if value is None:
                raise StoreError(f"the environment holds no {environment}, the store's master key")
            return _parsed(value.encode(), f"the environment's {environment}")
        return _of_command(self.source.command)

    def prepare_successor(self) -> MasterKey:
        """Make a fresh key in a file beside this key's own.

        Raises
        ------
        ConfigurationError
            This key is not in a file, so that only the hospital can replace it.
        """
        successor = self._successor()
        if successor is None:
            raise ConfigurationError(
                "the master key is not in a file that could be replaced; make a new one where it "
                "is kept and name that: --file, --environment or --command"
            )
        write_durably(successor, [_fresh_text()])
        return MasterKey(MasterKeySource(file=successor))

    def succeed(self, identity: str) -> bytes | None:
        """Put a prepared successor in this key's place if it is the one named, and return it."""
        successor, file = self._successor(), self.source.file
        if successor is None or file is None or not successor.exists():
            return None
        key = _of_file(successor)
        if identity_of(key) != identity:
            return None
        # Whoever opens the store meanwhile does the same.
        with suppress(FileNotFoundError):
            successor.replace(file)
        sync_folder(file.parent)
        return key

    def _successor(self) -> Path | None:
        file = self.source.file
        return None if file is None else file.with_name(f"{file.name}.next")


def identity_of(secret: bytes) -> str:
    """Return what tells a wrong master key from a damaged file, and nothing about the key."""
    return hmac.new(secret, b"sonofed master key", hashlib.sha256).hexdigest()[:16]


def _fresh_text() -> bytes:
    return f"{secrets.token_hex(KEY_BYTES)}\n".encode()


def _parsed(data: bytes, where: str) -> bytes:
    with suppress(ValueError):
        key = bytes.fromhex(data.decode("ascii").strip())
        if len(key) == KEY_BYTES:
            return key
    raise StoreError(f"{where} is no master key; it must be 64 hex digits")


def _of_file(file: Path) -> bytes:
    try:
        if file.stat().st_mode & 0o007:
            log.warning("every user of this machine may read the master key; chmod it to 600")
        data = file.read_bytes()
    except OSError as error:
        raise StoreError(
            f"the file {file.name} with the store's master key cannot be read "
            f"({error.strerror}); put the key back, for without it nothing can be decrypted"
        ) from None
    return data if len(data) == KEY_BYTES else _parsed(data, f"the file {file.name}")


def _of_command(command: tuple[str, ...]) -> bytes:
    try:
        done = subprocess.run(command, capture_output=True, timeout=COMMAND_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        # What a key client prints may hold the key: only how it ended is said.
        how = type(error).__name__
        if isinstance(error, subprocess.CalledProcessError):
            how = f"exit code {error.returncode}"
        raise StoreError(
            f"the command '{command[0]}' did not give the store's master key ({how}); run it by "
            "hand to see why"
        ) from None
    return _parsed(done.stdout, f"what the command '{command[0]}' printed")
