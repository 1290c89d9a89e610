"""All processes that came of one: its session, and whatever inherited its mark."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from pydantic import Field

from sonofed_common.contract.configuration import Model

MARK = "SONOFED_SUPERVISED"
"""Environment variable that every descendant inherits, also one with a session of its own."""

POLL_SECONDS = 0.05
_SESSION, _START = 3, 19
"""Fields of /proc/PID/stat, counted from the one after the command's name."""


class Identity(Model):
    """A process that no later one of the same number is taken for.

    Attributes
    ----------
    pid : int
    started : int
        Clock ticks since the machine's start.
    boot : str
        Which start of the machine that was.
    """

    pid: int = Field(gt=0)
    started: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> Identity | None:
        """Return the identity of a process, or None if there is none."""
        stat = _stat(pid)
        return None if stat is None else cls(pid=pid, started=int(stat[_START]), boot=_boot())

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self == Identity.of(self.pid)


def members(mark: str, leader: Identity | None) -> list[int]:
    """Return the processes that carry a mark or are of a session.

    Parameters
    ----------
    mark : str
        Value of the environment variable `MARK`.
    leader : Identity or None
        Who led the session, dead or alive; a program that overwrites its environment, as nginx
        does, is found by this.
    """
    wanted = f"{MARK}={mark}".encode()
    # A session whose number another process has by now is that one's: ours is gone.
    ours = (
        leader is not None and leader.boot == _boot() and Identity.of(leader.pid) in (None, leader)
    )
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        stat = _stat(int(entry.name))
        if stat is None:
            continue
        in_session = (
            leader is not None
            and ours
            and int(stat[_SESSION]) == leader.pid
            and int(stat[_START]) >= leader.started
        )
        if in_session or wanted in _environment(entry):
            found.append(int(entry.name))
    return found


def marks() -> dict[str, Identity]:
    """Return every mark that a process carries, and who of those that carry it began first."""
    found: dict[str, Identity] = {}
    wanted = f"{MARK}=".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        for word in _environment(entry):
            if word.startswith(wanted) and (one := Identity.of(int(entry.name))) is not None:
                mark = os.fsdecode(word.removeprefix(wanted))
                found[mark] = min(found.get(mark, one), one, key=lambda i: (i.started, i.pid))
    return found


def end(mark: str, leader: Identity | None, patience: float) -> None:
    """End a family: ask its leader, and after a while kill whoever is left.

    Parameters
    ----------
    mark, leader
        See `members`.
    patience : float
        Seconds for the leader to end by itself.
    """
    if leader is not None and leader.alive:
        _send(leader.pid, signal.SIGTERM)
        until = time.monotonic() + patience
        while leader.alive and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
    # Who is killed may have begun another just before.
    while left := members(mark, leader):
        for pid in left:
            _send(pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _stat(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    # A zombie holds nothing any more.
    return None if fields[0] == "Z" else fields


def _environment(entry: Path) -> list[bytes]:
    try:
        return (entry / "environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
