"""Files that a crash, a power cut or a full disk leaves as they were."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sonofed_common.contract.errors import StoreError


def write_durably(
    path: Path, parts: Iterable[bytes], scratch: Path | None = None, replace: bool = True
) -> None:
    """Write a file, readable by its owner only, so that it is whole on the disk or not there.

    With ``scratch`` its name survives a power cut only after `sync_folder`: many files, one sync.

    Parameters
    ----------
    path : Path
        Its folder is there.
    parts : iterable of bytes
        The content, piece by piece.
    scratch : Path or None
        Folder on the same disk for the unfinished file; None for the file's own, which is synced.
    replace : bool
        False leaves a file that is already there, also one made at the same instant.

    Raises
    ------
    StoreError
        The disk is full; what was there before is untouched.
    """
    temporary = (scratch or path.parent) / f".{secrets.token_hex(8)}.tmp"
    with full_disk_named():
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                for part in parts:
                    _write_whole(file.fileno(), part)
                os.fsync(file.fileno())
            if replace:
                temporary.replace(path)
            else:
                with suppress(FileExistsError):
                    path.hardlink_to(temporary)
        finally:
            temporary.unlink(missing_ok=True)
        if scratch is None:
            sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def full_disk_named() -> Iterator[None]:
    """Turn the operating system's report of a full disk into the catalogue's."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise full_disk() from None
        raise


def full_disk() -> StoreError:
    """Return the error of a full disk."""
    return StoreError(
        "the disk of the site's store is full; free some space and repeat: what was kept is whole"
    )


def _write_whole(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]
