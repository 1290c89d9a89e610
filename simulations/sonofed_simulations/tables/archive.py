"""Finished cells as one file beside a table's page, to go on from on any machine."""

from __future__ import annotations

import io
import lzma
import tarfile
from pathlib import Path, PurePosixPath

from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.runtime import write_atomically

ARCHIVE = "cells.tar.xz"
FOLDERS = ("cells", "redrawn")
"""Of the work: small files of numbers. Sources, features and images are made anew."""
REDRAWN = ("adaptation-homogenisation", "adaptation-reconstruction")
"""Tables whose cells are in the second folder; tables may share their work."""


def pack(out: Path, table: str) -> None:
    """Write a table's cells to `ARCHIVE`, the same bytes for the same cells; none writes nothing.

    Parameters
    ----------
    out : Path
        The table's folder, with the cells under ``work``.
    table : str
        Its name.
    """
    work = out / "work"
    files = sorted((work / FOLDERS[table in REDRAWN]).rglob("*.safetensors"))
    if not files:
        return
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in files:
            data = path.read_bytes()
            entry = tarfile.TarInfo(path.relative_to(work).as_posix())
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    write_atomically(out / ARCHIVE, lzma.compress(held.getvalue()))


def unpack(out: Path) -> None:
    """Put the cells of `ARCHIVE` under ``work`` where there are none; what is there stays.

    Parameters
    ----------
    out : Path
        The table's folder. A table decides by a cell's origin whether to take it.

    Raises
    ------
    ConfigurationError
        The archive is damaged, or holds something else than cells.
    """
    path = out / ARCHIVE
    if not path.exists():
        return
    try:
        with tarfile.open(path, mode="r:xz") as archive:
            for entry in archive:
                name = PurePosixPath(entry.name)
                if not entry.isfile() or name.parts[0] not in FOLDERS or ".." in name.parts:
                    raise tarfile.TarError(f"it holds {entry.name!r}, which is no cell")
                cell, held = out / "work" / name, archive.extractfile(entry)
                if not cell.exists() and held is not None:
                    write_atomically(cell, held.read())
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise ConfigurationError(
            f"{path} cannot be read: {error}; delete it to make its cells anew"
        ) from None
