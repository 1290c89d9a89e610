"""Where a study stands, as its files say."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sonofed_common.contract.configuration import Model
from sonofed_common.contract.errors import ParameterError
from sonofed_common.contract.records import read_config
from sonofed_common.contract.results import PhaseCost
from sonofed_common.contract.study import read_study
from sonofed_server.study.crossing import bytes_since
from sonofed_server.study.desk import Entry, State

TAIL_BYTES = 262_144
ASKED, AWAITED = "asked for", "awaited:"


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class _Event(_Read):
    """What is read of a line of the events."""

    time: float
    event: str
    phase: str | None = None
    site: str = ""
    reason: str = ""
    action: str = ""
    sites: tuple[str, ...] = ()
    bytes: int = 0
    task: str = ""
    done: float = 0
    total: float = 0


NOTHING = _Event(time=0, event="")


class _SiteFacts(_Read):
    missing: str = ""


class _Facts(_Read):
    phases: tuple[PhaseCost, ...] = ()
    sites: dict[str, _SiteFacts] = Field(default_factory=dict)


class _Saved(_Read):
    """What is read of a checkpoint."""

    done: tuple[str, ...] = ()
    facts: _Facts = _Facts()


class Standing(Model):
    """Where a study stands.

    Attributes
    ----------
    state : str
    phase : str or None
        At hand; None before the first and after the last.
    phases_done, phases : int
        How many are over, of how many.
    task : str
        What the phase does now, with its round.
    done, total : float
        Of the task.
    seconds_left : float or None
        Of the task, at its pace so far; None while nothing of it is done.
    sites : dict of str to str
        What each hospital of the cohort did last, that it is waited for, or why it is missing.
    bytes_to_sites, bytes_from_sites : int
        Until the last finished round.
    asked : str
        Action that the hospitals were last asked for, if it is not over.
    asked_seconds : float
        How long ago that was.
    asked_bytes : int
        What was sent with it to all of them.
    crossed_bytes : int
        What has crossed the front since, to and from all hospitals, of other studies too.
    attempts : int
        Starts since the study last finished a round.
    reason : str
        Why it failed, or does not run yet.
    quorum : int
        Hospitals without which it fails.
    costs : tuple of PhaseCost
        Of its phases, until the last finished round.
    """

    name: str
    state: State
    phase: str | None = None
    phases_done: int = 0
    phases: int = 0
    task: str = ""
    done: float = 0
    total: float = 0
    seconds_left: float | None = None
    sites: dict[str, str] = Field(default_factory=dict)
    bytes_to_sites: int = 0
    bytes_from_sites: int = 0
    asked: str = ""
    asked_seconds: float = 0
    asked_bytes: int = 0
    crossed_bytes: int = 0
    attempts: int = 0
    reason: str = ""
    quorum: int = 0
    costs: tuple[PhaseCost, ...] = ()

    def lines(self) -> list[str]:
        """Say it in words."""
        head = f"study {self.name}: {self.state}"
        if self.reason:
            head += f"; {self.reason}"
        if self.attempts > 1:
            head += f"; begun {self.attempts} times since its last finished round"
        at = f"{self.phases_done} of {self.phases} phases done"
        if self.phase is not None:
            at += f"; {self.phase}"
            if self.task:
                at += f": {self.task}, {self.done:g} of {self.total:g}"
            if self.seconds_left is not None:
                at += f", about {self.seconds_left:.0f} s left"
        moved = f"{self.bytes_to_sites} bytes to the hospitals, {self.bytes_from_sites} back"
        if self.asked:
            moved += (
                f"; {self.asked} with {self.asked_bytes} bytes was asked for "
                f"{self.asked_seconds:.0f} s ago, {self.crossed_bytes} crossed the front since"
            )
        return [head, at, moved, *(f"  {site}: {word}" for site, word in self.sites.items())]


def standing(entry: Entry, front_log: Path | None = None) -> Standing:
    """Read where a study stands.

    Parameters
    ----------
    entry : Entry
        The study.
    front_log : Path, optional
        Says what crosses the front; costly to read, so without it `crossed_bytes` is 0.

    Raises
    ------
    ConfigurationError
        Its file does not validate.
    """
    study = read_study(entry.workspace.study)
    state, failure = entry.state, entry.failure
    saved = _checkpoint(entry)
    known = saved.facts.sites
    sites = {site: known[site].missing if site in known else "" for site in study.cohort.sites}
    phase: str | None = None
    asked = began = now = NOTHING
    for event in _events(entry):
        if event.event == "phase-started":
            phase, asked, began, now = event.phase, NOTHING, NOTHING, NOTHING
        elif event.event == "phase-finished":
            _answered(sites, asked, ASKED, AWAITED)
            phase, asked, began, now = None, NOTHING, NOTHING, NOTHING
        elif event.event == "asked":
            _answered(sites, asked, ASKED, AWAITED)
            asked = event
            sites |= dict.fromkeys(event.sites, f"{ASKED} {event.action}")
        elif event.event == "awaited" and event.site in sites:
            # Who was awaited before it has answered: they are waited for one after the other.
            _answered(sites, asked, AWAITED)
            sites[event.site] = f"{AWAITED} {asked.action}"
        elif event.event == "progress":
            if began.task != event.task:
                began = event
            now = event
            if event.site in sites:
                sites[event.site] = f"answered {event.task}"
        elif event.event == "site-failed" and event.site in sites:
            sites[event.site] = f"missing: {event.reason}"
    if state != "running":
        asked = NOTHING
    over = state in ("completed", "failed", "stopped")
    return Standing(
        name=entry.name,
        state=state,
        phase=None if over else phase,
        phases_done=len(saved.done),
        phases=len(study.phases),
        task=now.task,
        done=now.done,
        total=now.total,
        seconds_left=None if over else _left(began, now),
        sites={site: word or "nothing yet" for site, word in sites.items()},
        bytes_to_sites=sum(cost.bytes_to_sites for cost in saved.facts.phases),
        bytes_from_sites=sum(cost.bytes_from_sites for cost in saved.facts.phases),
        asked=asked.action,
        asked_seconds=time.time() - asked.time if asked.action else 0,
        asked_bytes=asked.bytes,
        crossed_bytes=bytes_since(front_log, asked.time) if asked.action and front_log else 0,
        attempts=entry.wish.attempts,
        # A process that failed lives on for a moment.
        reason=failure.message if failure is not None and state == "failed" else "",
        quorum=study.cohort.smallest,
        costs=saved.facts.phases,
    )


def _checkpoint(entry: Entry) -> _Saved:
    try:
        return _Saved.model_validate(read_config(entry.workspace.checkpoint))
    except (OSError, ParameterError, ValidationError):
        return _Saved()


def _events(entry: Entry) -> Iterator[_Event]:
    try:
        with entry.workspace.events.open("rb") as file:
            file.seek(max(0, entry.workspace.events.stat().st_size - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return
    for line in lines:
        # The first line of the tail is cut, the last may be yet unfinished, any may be damaged.
        with suppress(ValidationError):
            yield _Event.model_validate_json(line)


def _answered(sites: dict[str, str], asked: _Event, *words: str) -> None:
    for site in asked.sites:
        if sites.get(site, "").startswith(words):
            sites[site] = f"answered {asked.action}"


def _left(began: _Event, now: _Event) -> float | None:
    if not now.done:
        return None
    return max(0.0, (time.time() - began.time) * (now.total - now.done) / now.done)
