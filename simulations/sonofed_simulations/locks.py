"""Locks between processes that share a folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sonofed_common.runtime import Events


@contextmanager
def alone(path: Path, events: Events) -> Iterator[None]:
    """Hold a lock while what several processes share is made, waiting for one that does.

    The system lets go of it when the process ends.

    Parameters
    ----------
    path : Path
        The lock's file; its folder is made.
    events : Events
        Told when the lock is another process's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            events.emit("waiting", reason=f"another process holds {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
