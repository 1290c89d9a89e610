"""One supervised program: how it is started, and how one sees that it works."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sonofed_common.contract.configuration import Model
from sonofed_common.supervision.family import MARK, Identity, end
from sonofed_common.supervision.probes import Endpoint

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0
SETTLED_SECONDS = 120.0
"""Who ran this long has a short pause again."""

END_SECONDS = 20.0
PROBE_SECONDS = 2.0

PROBE_PAUSE, FAILED_PROBES = 5.0, 5
"""Seconds between two probes of a program that runs, and how many may fail on a busy machine."""

State = Literal["starting", "running", "silent", "waiting"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Program:
    """What is to run.

    Attributes
    ----------
    name : str
        Also of its log file.
    command : tuple of str
        Program and arguments; it stays in the foreground.
    ready : callable
        Whether it works.
    environment : mapping
        In addition to the supervisor's own.
    endpoint : Endpoint or None
        Where it answers; nobody else may before its start.
    sign : Path or None
        What `ready` looks at, if that is a file; one of an earlier start tells nothing.
    """

    name: str
    command: tuple[str, ...]
    ready: Callable[[], bool]
    environment: Mapping[str, str] = field(default_factory=dict)
    endpoint: Endpoint | None = None
    sign: Path | None = None


class ProgramStatus(Model):
    """How a program is.

    Attributes
    ----------
    state : {"starting", "running", "silent", "waiting"}
        ``silent`` when it runs and does not answer any more, ``waiting`` after it ended, until it
        is started again.
    restarts : int
        How often it was started again.
    since : float
        When it came into this state, seconds since the epoch.
    reason : str
        How it ended the last time, or that it did not answer since.
    """

    state: State
    identity: Identity | None
    restarts: int
    since: float
    reason: str = ""


class Child:
    """A program's process, started again when it ends.

    Parameters
    ----------
    program : Program
        What is to run.
    folder : Path
        Gets its log.
    """

    def __init__(self, program: Program, folder: Path) -> None:
        self.program = program
        self._mark = mark(folder, program.name)
        self._log = folder / f"{program.name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._started = self._next = self._next_probe = 0.0
        self._starts = self._failed_probes = 0
        self._pause = FIRST_PAUSE
        self.status = ProgramStatus(state="waiting", identity=None, restarts=0, since=time.time())

    def step(self) -> bool:
        """Do what is due, and say whether anything changed."""
        now = time.monotonic()
        before = self.status
        if self._process is None:
            if now >= self._next:
                self._start(now)
        elif (code := self._process.poll()) is not None:
            self._bury(code, now)
        elif self.status.state == "starting" and self.program.ready():
            self._become("running")
        elif self.status.state != "starting":
            if now - self._started > SETTLED_SECONDS:
                self._pause = FIRST_PAUSE
            if now >= self._next_probe:
                self._probe(now)
        return self.status != before

    def end(self) -> None:
        """End it and everything that it started."""
        if self._process is None:
            return
        end(self._mark, self.status.identity, END_SECONDS)
        self._process.wait()
        self._process = None

    def _probe(self, now: float) -> None:
        self._next_probe = now + PROBE_PAUSE
        self._failed_probes = 0 if self.program.ready() else self._failed_probes + 1
        if self.status.state == "silent" and not self._failed_probes:
            self._become("running")
        elif self.status.state == "running" and self._failed_probes == FAILED_PROBES:
            # It is not started again: what is only slow would lose its work.
            log.warning("a program does not answer", extra={"program": self.program.name})
            self._become("silent", reason="did not answer")

    def _start(self, now: float) -> None:
        environment = {**os.environ, **self.program.environment, MARK: self._mark}
        try:
            if self.program.sign is not None:
                self.program.sign.unlink(missing_ok=True)
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    self.program.command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except OSError as error:
            self._wait_for_another_try(f"cannot be started: {error.strerror}", now)
            return
        self._started, self._failed_probes = now, 0
        identity = Identity.of(self._process.pid)
        self._become("starting", identity=identity, restarts=self._starts)
        self._starts += 1

    def _bury(self, code: int, now: float) -> None:
        # What it has left behind would meet its successor.
        end(self._mark, self.status.identity, 0.0)
        self._process = None
        how = f"exit code {code}" if code >= 0 else f"signal {-code}"
        self._wait_for_another_try(f"ended by {how}", now)

    def _wait_for_another_try(self, reason: str, now: float) -> None:
        self._next = now + self._pause
        facts = {"program": self.program.name, "reason": reason, "pause": self._pause}
        log.warning("a program ended and is started again", extra=facts)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self._become("waiting", identity=None, reason=reason)

    def _become(self, state: State, **facts: object) -> None:
        update = {"state": state, "since": time.time(), **facts}
        self.status = self.status.model_copy(update=update)
        if state == "running":
            log.info("a program works", extra={"program": self.program.name})


def mark(folder: Path, name: str) -> str:
    """Return what marks a program's family."""
    return f"{folder}/{name}"


def answers(port: int, host: str = "127.0.0.1") -> bool:
    """Whether somebody listens on a port."""
    try:
        with socket.create_connection((host, port), PROBE_SECONDS):
            return True
    except OSError:
        return False


def answers_on(path: Path) -> bool:
    """Whether somebody listens on a unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PROBE_SECONDS)
        try:
            return probe.connect_ex(str(path)) == 0
        except OSError:
            # The path is too long for a socket.
            return False
