"""Device, seeds, progress events and safe file writes: decided here, once."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def derive_seed(*parts: object) -> int:
    """Derive a 63-bit seed from named parts, for example ``(study_seed, site, phase, round)``."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def device() -> torch.device:
    """Return ``cuda`` where there is one, else ``cpu``."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_threads(threads: int | None) -> None:
    """Fix the number of CPU threads: float sums on CPU depend on it.

    Parameters
    ----------
    threads : int or None
        None keeps what torch chose.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def end_signals() -> list[int]:
    """Have SIGTERM and SIGINT noted instead of obeyed.

    Returns
    -------
    list of int
        Grows by each that comes; a loop of this thread looks at it.

    Notes
    -----
    Not an event: one that a handler sets while its own thread begins to wait for it is a deadlock.
    """
    came: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: came.append(number))
    return came


def write_atomically(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file so that it is either whole or absent: temporary file, fsync, rename.

    Parameters
    ----------
    path : Path
        Its folder is made if absent.
    data : bytes
        The whole content.
    mode : int
        Permissions from the first byte on, less the process's umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def link_atomically(link: Path, target: Path) -> None:
    """Point a symbolic link elsewhere; who looks meanwhile finds the old target or the new one."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.resolve())
    temporary.replace(link)


Event = dict[str, Any]
Listener = Callable[[Event], None]


@dataclass
class Events:
    """Progress events, one JSON object each, to a file and to listeners.

    Parameters
    ----------
    path : Path or None
        JSON-lines file to append to.
    listeners : list of callables
        Called with each event, for example by a progress bar.

    Notes
    -----
    Events hold names of phases and hospitals, counts and sizes; no image, file name or score.
    """

    path: Path | None = None
    listeners: list[Listener] = field(default_factory=list)

    def emit(self, event: str, **facts: Any) -> None:
        """Record one event with the current time (seconds since the epoch)."""
        entry: Event = {"time": round(time.time(), 3), "event": event, **facts}
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        for listener in self.listeners:
            listener(entry)

    def progress(self, task: str, done: float, total: float, **facts: Any) -> None:
        """Record that ``done`` of ``total`` units of a task are finished."""
        self.emit("progress", task=task, done=done, total=total, **facts)

    def track(self, items: Iterable[T], task: str, total: int) -> Iterator[T]:
        """Yield items and record progress after each, also when there is none."""
        self.progress(task, 0, total)
        for done, item in enumerate(items, start=1):
            yield item
            self.progress(task, done, total)


SILENT = Events()
"""Events that go nowhere."""
