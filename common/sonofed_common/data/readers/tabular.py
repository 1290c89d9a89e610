"""CSV files as rows of text."""

from __future__ import annotations

import csv
from pathlib import Path

from sonofed_common.contract.errors import DataMissingError, DataUnreadableError


def read_rows(path: Path, required: tuple[str, ...]) -> list[dict[str, str]]:
    """Read a CSV file with a header line.

    Parameters
    ----------
    path : Path
        UTF-8 file, comma-separated.
    required : tuple of str
        Columns that it must have.

    Returns
    -------
    list of dict
        One a line, values stripped; a value that a short line lacks is empty.

    Raises
    ------
    DataMissingError
        The file or a required column does not exist.
    DataUnreadableError
        The file may not be read, or is not a table of text.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            columns = [(column or "").strip() for column in reader.fieldnames or ()]
            reader.fieldnames = columns
            rows = [
                {column: (row[column] or "").strip() for column in columns if column}
                for row in reader
            ]
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DataMissingError(
            "the data set's table does not exist; put the CSV file there or correct the path"
        ) from error
    except OSError as error:
        raise DataUnreadableError(
            "the data set's table cannot be opened; let the user that runs this read it and its "
            "folder"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataUnreadableError(
            "the data set's table cannot be read; save it as CSV in UTF-8"
        ) from error
    if missing := [column for column in required if column not in columns]:
        raise DataMissingError(
            f"the data set's table lacks the column(s) {', '.join(missing)}; add them to its header"
        )
    return rows
