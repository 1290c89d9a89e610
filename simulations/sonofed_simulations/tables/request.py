"""What is asked of a table, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.table import Table

from sonofed_common.contract.errors import ConfigurationError, DataMissingError
from sonofed_common.runtime import Events

T = TypeVar("T")


def part_of(wanted: Sequence[T], shard: tuple[int, int]) -> Sequence[T]:
    """Return a shard's part of what is wanted, contiguous; all shards together are all of it.

    Raises
    ------
    ConfigurationError
        The shard is out of range.
    """
    number, total = shard
    if not 1 <= number <= total:
        raise ConfigurationError(
            f"shard {number}/{total} does not exist; write 1/4 for the first of four"
        )
    first, last = ((n * len(wanted)) // total for n in (number - 1, number))
    return wanted[first:last]


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

    def check(self) -> None:
        """Check shard and folders before anything is trained.

        Raises
        ------
        ConfigurationError
            The shard is out of range, or the output is no folder.
        DataMissingError
            There is no such folder of data.
        """
        part_of((), self.shard)
        if self.out.exists() and not self.out.is_dir():
            raise ConfigurationError(f"{self.out} is a file; name a folder for the output")
        if self.data is not None and not self.data.is_dir():
            raise DataMissingError(f"there is no folder {self.data}; give that of the data sets")


@dataclass(frozen=True)
class Made:
    """What a terminal shows of a table; the page is in the folder."""

    table: Table
    cells: int
    wanted: int
