"""Logs of a folder: set aside when they are large, while their programs write on."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

LARGEST_BYTES = 50 * 2**20
"""Of a log; as much of it again is kept in its ``.log.1``."""

log = logging.getLogger(__name__)


def set_large_aside(folder: Path, largest: int = LARGEST_BYTES) -> None:
    """Copy each log that has grown too large to ``.log.1``, and empty it.

    Parameters
    ----------
    folder : Path
        Holds the logs, which their programs append to: a line that is written between the copy and
        the emptying is lost.
    largest : int
        Bytes.
    """
    for file in folder.glob("*.log"):
        try:
            if file.stat().st_size > largest:
                shutil.copy(file, file.with_suffix(".log.1"))
                os.truncate(file, 0)
        except OSError as error:
            # Programs go on without: the disk may be full, or the log have gone.
            facts = {"log": file.name, "reason": error.strerror}
            log.warning("a large log cannot be set aside", extra=facts)
