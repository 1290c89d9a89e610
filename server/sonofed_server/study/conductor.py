"""The conductor: begins the studies that are wanted, and begins again those that were cut off.

All that it knows stands in files, so that it may be killed and started again at any instant.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from structlog.contextvars import bound_contextvars

from sonofed_common.contract.errors import DeploymentError, SonoFedError
from sonofed_common.supervision.family import Identity
from sonofed_common.supervision.program import answers
from sonofed_common.supervision.supervisor import read_status
from sonofed_server.provisioning.project import Coordinator
from sonofed_server.study.desk import Entry, Wish, entries
from sonofed_server.study.failure import Failure, write_failure
from sonofed_server.study.flower import submit
from sonofed_server.study.hindrance import EVERY, note
from sonofed_server.study.registration import register

STEP_SECONDS = 0.25
START_SECONDS = 120.0
"""A run that has no process after this long is begun again."""

ATTEMPTS = 6
"""Starts without a finished round after which a study has failed."""

LONGEST_PAUSE = 60.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Start:
    at: float
    superlink: Identity | None
    before: Identity | None


class Conductor:
    """Begins studies and keeps registrations.

    Parameters
    ----------
    coordinator : Coordinator
        Of the project.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._registered: frozenset[tuple[str, float]] | None = None
        self._submitted: dict[str, _Start] = {}
        self._not_before = 0.0
        self._hindrances: dict[str, str] = {}

    def run(self) -> None:
        """Do what is due, again and again, until this process is ended."""
        note(self._coordinator, self._hindrances)
        # What the one before registered, its SuperLink may have taken along.
        self._coordinator.registered.unlink(missing_ok=True)
        while True:
            if time.monotonic() >= self._not_before:
                self.step()
            time.sleep(STEP_SECONDS)

    def step(self) -> None:
        """Do what is due now; what fails for one study keeps no other back."""
        self._show_life()
        before, self._hindrances = self._hindrances, {}
        each = entries(self._coordinator)
        for entry in each:
            self._try(partial(self._end, entry), study=entry.name)
        if not self._superlink_works():
            self._hindrances[EVERY] = "the SuperLink does not answer"
        elif self._try(self._keep_registrations):
            for entry in each:
                self._try(partial(self._begin, entry), study=entry.name)
        if self._hindrances != before:
            note(self._coordinator, self._hindrances)

    def _show_life(self) -> None:
        # One that cannot be touched grows old, which tells enough.
        with suppress(OSError):
            self._coordinator.conductor_sign.touch(mode=0o600)

    def _try(self, work: Callable[[], None], **named: str) -> bool:
        self._show_life()
        try:
            with bound_contextvars(**named):
                work()
        except SonoFedError as error:
            log.warning("%s", error)
            reason = error.message
        except Exception as error:
            log.exception("a step failed, and is tried again")
            reason = f"the conductor met a defect ({type(error).__name__}); see conductor.log"
        else:
            return True
        self._hindrances[named.get("study", EVERY)] = reason
        self._not_before = time.monotonic() + 5.0
        return False

    def _superlink_works(self) -> bool:
        # The port of one that hangs answers.
        status = read_status(self._coordinator.run)
        hangs = status is not None and status.programs["superlink"].state != "running"
        return not hangs and answers(self._coordinator.project.superlink_port)

    def _keep_registrations(self) -> None:
        files = self._coordinator.sites.glob("*.json")
        now = frozenset((f.name, f.stat().st_mtime) for f in files)
        if now != self._registered:
            for line in register(self._coordinator):
                log.warning("%s", line)
            self._registered = now
            self._coordinator.registered.touch(mode=0o600)

    def _end(self, entry: Entry) -> None:
        if entry.state == "running" and (entry.wish.wanted == "stop" or self._orphaned(entry)):
            process = entry.process
            assert process is not None
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            log.warning("the study's process is ended")

    def _begin(self, entry: Entry) -> None:
        wish = entry.wish
        if entry.state != "waiting" or not self._due(entry, wish):
            return
        saved = entry.checkpoint
        attempts = wish.attempts if saved == wish.checkpoint else 0
        if attempts >= ATTEMPTS:
            self._give_up(entry)
            return
        entry.workspace.failure.unlink(missing_ok=True)
        before = entry.process
        run = submit(self._coordinator, entry.workspace)
        # What was not begun is not counted, and who asked for a stop meanwhile gets it.
        if entry.wish == wish:
            entry.want(Wish(attempts=attempts + 1, checkpoint=saved))
        self._submitted[entry.name] = _Start(time.monotonic(), self._superlink(), before)
        log.info("the study began", extra={"run": run, "attempt": attempts + 1})

    def _due(self, entry: Entry, wish: Wish) -> bool:
        if entry.name not in self._submitted:
            return True
        start = self._submitted[entry.name]
        waited = time.monotonic() - start.at
        if entry.process == start.before and not self._lost(start):
            return waited > START_SECONDS
        # Its process began and is gone, or the SuperLink is, which takes its runs along.
        return waited > min(LONGEST_PAUSE, 2.0 ** (wish.attempts - 1))

    def _orphaned(self, entry: Entry) -> bool:
        """Whether its process belongs to a SuperLink that died: that one's runs are over."""
        start = self._submitted.get(entry.name)
        return start is not None and self._lost(start)

    def _lost(self, start: _Start) -> bool:
        """Whether the SuperLink of a start is another now; without a supervisor nobody knows."""
        now = self._superlink()
        return None not in (now, start.superlink) and now != start.superlink

    def _superlink(self) -> Identity | None:
        status = read_status(self._coordinator.run)
        return status.programs["superlink"].identity if status is not None else None

    def _give_up(self, entry: Entry) -> None:
        sentence = (
            f"the study was begun {ATTEMPTS} times and finished no round; see serverapp.log, then "
            "resume it"
        )
        write_failure(entry.workspace, Failure(error=DeploymentError.code, message=sentence))
