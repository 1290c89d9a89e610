"""What ``install`` is told, checked before anything is written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from sonofed_client.settings import SiteData
from sonofed_common.contract.errors import ConfigurationError, DataMissingError

LONGEST_SOCKET = 107
"""Bytes of a unix socket's path on Linux, see unix(7)."""


def check_socket(path: Path) -> None:
    """Check that a socket can have a path.

    Raises
    ------
    ConfigurationError
        The system takes none that is so long.
    """
    if (length := len(os.fsencode(path))) > LONGEST_SOCKET:
        raise ConfigurationError(
            f"the enclave's socket would be {path}, of {length} bytes, and the system takes "
            f"{LONGEST_SOCKET}; install in a folder with a shorter path: --folder"
        )


def check_images(data: SiteData) -> None:
    """Check what can be seen of a site's images at once; ``check`` reads them.

    Raises
    ------
    ConfigurationError
        No reader is of that kind.
    DataMissingError
        There is no such folder.
    """
    # The readers load an image library; the other commands start faster without.
    from sonofed_common.data.readers import READERS

    if data.kind not in READERS:
        raise ConfigurationError(
            f"no reader is called '{data.kind[:64]}'; choose one of {', '.join(READERS)}: --kind"
        )
    if not data.path.is_dir():
        raise DataMissingError(f"{data.path} is no folder; give that of the images: --data")


def check_same(file: Path, wanted: Mapping[str, object], written: Mapping[str, object]) -> None:
    """Check that options do not contradict a file that is there, which stays as it is.

    Parameters
    ----------
    file : Path
        The hospital's own.
    wanted : mapping
        What options say, None where they say nothing.
    written : mapping
        What the file says.

    Raises
    ------
    ConfigurationError
        They differ.
    """
    for option, value in wanted.items():
        if value is not None and value != written[option]:
            raise ConfigurationError(
                f"{file} says otherwise than {option}, and is the hospital's own: edit it there, "
                f"and install without {option}"
            )
