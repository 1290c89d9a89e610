"""What is asked of a table, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from sonofed_common.contract.errors import ConfigurationError, DataMissingError
from sonofed_common.runtime import Events


@dataclass(frozen=True)
class Request:
    """One call of ``sonofed-lab table``.

    Attributes
    ----------
    name : str
        A key of `TABLES`.
    quick : bool
        The form for a CPU.
    out : Path
        Folder of the page and of the work.
    data : Path or None
        Folder of the real data sets.
    shard : tuple of int
        Number of the shard, from 1, and how many there are.
    events : Events
        Progress.
    """

    name: str
    quick: bool
    out: Path
    data: Path | None
    shard: tuple[int, int]
    events: Events

    @property
    def real_data(self) -> Path:
        """The folder of the real data sets.

        Raises
        ------
        DataMissingError
            None was given.
        """
        if self.data is None:
            raise DataMissingError(f"table {self.name} uses real data; give its folder with --data")
        return self.data

    def check_shard(self) -> None:
        """Check the shard before anything is trained.

        Raises
        ------
        ConfigurationError
            It is out of range.
        """
        number, total = self.shard
        if not 1 <= number <= total:
            raise ConfigurationError(
                f"shard {number}/{total} does not exist; count from 1 to {total}"
            )


@dataclass(frozen=True)
class Made:
    """What a terminal shows of a table; the page is in the folder."""

    table: Table
    cells: int
    wanted: int
