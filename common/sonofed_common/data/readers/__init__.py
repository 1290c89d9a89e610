"""Readers: one a data set, each turning the official archive's layout into samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sonofed_common.contract.errors import ConfigurationError, DataUnreadableError
from sonofed_common.data.readers.breast import read_breast
from sonofed_common.data.readers.busbra import read_busbra
from sonofed_common.data.readers.busi import read_busi
from sonofed_common.data.readers.table import read_table
from sonofed_common.data.readers.usgra_seg import read_usgra_seg
from sonofed_common.data.sample import Reading

READERS: dict[str, Callable[[Path], Reading]] = {
    "busi": read_busi,
    "busbra": read_busbra,
    "breast": read_breast,
    "usgra_seg": read_usgra_seg,
    "table": read_table,
}


def read(kind: str, root: Path) -> Reading:
    """Read a data set.

    Parameters
    ----------
    kind : str
        A key of `READERS`.
    root : Path
        The set's own folder, or the folder that holds it.

    Returns
    -------
    Reading
        Samples sorted by name, and what was passed over.

    Raises
    ------
    ConfigurationError
        The kind is unknown.
    DataMissingError
        The folder or a required file does not exist.
    SiteEmptyError
        The set lists no image.
    DataUnreadableError
        Images are listed, and none can be read; or the folder may not be.
    """
    if kind not in READERS:
        raise ConfigurationError(
            f"no reader is called '{kind}'; choose one of {', '.join(READERS)}"
        )
    try:
        return READERS[kind](root)
    except PermissionError as error:
        raise DataUnreadableError(
            "the data set's folder may not be read; let the user that runs this read it"
        ) from error
