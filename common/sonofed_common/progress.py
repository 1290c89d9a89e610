"""Progress for people: a bar on a terminal, JSON events elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sonofed_common.log import json_line
from sonofed_common.runtime import Event, Listener


@contextmanager
def progress_listener() -> Iterator[Listener]:
    """Listen to `Events` for as long as a command runs.

    Yields
    ------
    Listener
        On a terminal, draws one bar per task on stderr and prints no other event; elsewhere, writes
        each event to stderr as a line of the log.
    """
    if not sys.stderr.isatty():
        yield _write_json
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as bars:
        yield _bars(bars)


def _write_json(event: Event) -> None:
    print(json_line(event), file=sys.stderr, flush=True)


def _bars(bars: Progress) -> Listener:
    tasks = {}

    def listen(event: Event) -> None:
        if event["event"] != "progress":
            return
        name = event["task"]
        if name not in tasks:
            tasks[name] = bars.add_task(name)
        bars.update(tasks[name], completed=event["done"], total=event["total"])

    return listen
