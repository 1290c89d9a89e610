"""Approval of studies: the hospital reads what a study asks before the first action runs."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import Field

from sonofed_common.contract.actions import Describe, Parameters
from sonofed_common.contract.configuration import Model, validate
from sonofed_common.contract.errors import (
    ConfigurationError,
    StudyDeniedError,
    StudyWaitingError,
)
from sonofed_common.contract.study import Study
from sonofed_common.runtime import write_atomically

State = Literal["waiting", "approved", "denied"]
MAX_WAITING = 64
"""Most studies that may wait, so that a stranger cannot fill the disk."""


class KnownStudy(Model):
    """A study that a coordinator described to this site.

    Attributes
    ----------
    digest : str
        SHA-256 of the validated study: the approval is of this content alone.
    coordinator : str
        Key of the coordinator at the time of the decision; another one's studies wait anew.
    content : Study or None
        None where a site that approves by itself was told the digest only.
    seen, decided : float
        Seconds since the epoch; ``decided`` is 0 while it waits.
    current : bool
        Whether its name means this study: the last that was described and approved.
    """

    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    name: str
    coordinator: str
    state: State
    content: Study | None = None
    seen: float
    decided: float = 0.0
    current: bool = False


class Studies:
    """The studies that a site knows, in one file of its store.

    Parameters
    ----------
    folder : Path
        Holds ``studies.json``.
    coordinator : str
        Public key of the coordinator that the site's settings name.
    automatic : bool
        Approve what is described; off by default in a site's settings.
    """

    def __init__(self, folder: Path, coordinator: str, automatic: bool = False) -> None:
        self._path = folder / "studies.json"
        self._coordinator, self._automatic = coordinator, automatic

    def known(self) -> list[KnownStudy]:
        """Return the studies, oldest first."""
        if not self._path.exists():
            return []
        values = json.loads(self._path.read_bytes())
        return [validate(KnownStudy, study, self._path.name) for study in values]

    def approved(self, parameters: Parameters) -> KnownStudy | None:
        """Return the study that a request belongs to; None where none was described.

        Raises
        ------
        StudyWaitingError
            The hospital has not decided yet, or the study was not described.
        StudyDeniedError
            The hospital decided against it.
        """
        if isinstance(parameters, Describe):
            return self._described(parameters)
        named = [s for s in self.known() if s.name == parameters.study and self._is_ours(s)]
        study = next((s for s in named if s.current), named[-1] if named else None)
        if study is None and self._automatic:
            return None
        if study is None:
            raise StudyWaitingError("this hospital does not know the study; enrol it first")
        return _decided(study)

    def decide(self, key: str, state: Literal["approved", "denied"]) -> KnownStudy:
        """Approve or deny a study.

        Parameters
        ----------
        key : str
            Its name, where only one waits under it, or the start of its digest.
        state : str
            What the hospital decided.

        Raises
        ------
        ConfigurationError
            No study, or more than one, is meant; or there is nothing to read of it.
        """
        with self._lock():
            study = self.find(key)
            if study.content is None and state == "approved":
                raise ConfigurationError(
                    f"study {study.name} came without its content; nothing can be approved unread"
                )
            if study.coordinator != self._coordinator and state == "approved":
                raise ConfigurationError(
                    f"study {study.name} is of another coordinator than the site's settings name"
                )
            update = {"state": state, "decided": round(time.time(), 3)}
            return self._keep(study.model_copy(update=update))

    def find(self, key: str) -> KnownStudy:
        """Return a study by its name or the start of its digest; one that waits goes first.

        Raises
        ------
        ConfigurationError
            No study, or more than one, is meant.
        """
        found = [s for s in self.known() if s.name == key or s.digest.startswith(key)]
        waiting = [s for s in found if s.state == "waiting"]
        for candidates in (waiting, [s for s in found if s.current], found):
            if len(candidates) == 1:
                return candidates[0]
        if found:
            digests = ", ".join(s.digest[:12] for s in found)
            raise ConfigurationError(f"{key!r} means several studies; give a digest: {digests}")
        raise ConfigurationError(f"{key!r} is no study that this site knows; list the studies")

    def _described(self, parameters: Describe) -> KnownStudy:
        with self._lock():
            known = self.known()
            study = next(
                (s for s in known if s.digest == parameters.study_digest and self._is_ours(s)), None
            )
            if study is None or (study.content is None and parameters.content is not None):
                if study is None and sum(s.state == "waiting" for s in known) >= MAX_WAITING:
                    raise StudyWaitingError("too many studies wait at this hospital; ask later")
                study = KnownStudy(
                    digest=parameters.study_digest,
                    name=parameters.study,
                    coordinator=self._coordinator,
                    state=study.state if study else "waiting",
                    content=parameters.content,
                    seen=round(time.time(), 3),
                )
                self._keep(study)
            if self._automatic and study.state == "waiting":
                update = {"state": "approved", "decided": round(time.time(), 3)}
                study = self._keep(study.model_copy(update=update))
            _decided(study)
            return (
                study if study.current else self._keep(study.model_copy(update={"current": True}))
            )

    def _is_ours(self, study: KnownStudy) -> bool:
        return study.coordinator == self._coordinator

    def _keep(self, study: KnownStudy) -> KnownStudy:
        def other(s: KnownStudy) -> KnownStudy:
            gives_way = study.current and s.name == study.name
            return s.model_copy(update={"current": False}) if gives_way else s

        known, same = self.known(), (study.digest, study.coordinator)
        place = next((n for n, s in enumerate(known) if (s.digest, s.coordinator) == same), None)
        studies = [other(s) for s in known]
        if place is None:
            studies.append(study)
        else:
            studies[place] = study
        values = [s.model_dump(mode="json") for s in studies]
        write_atomically(self._path, json.dumps(values).encode(), mode=0o600)
        return study

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with self._path.with_suffix(".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _decided(study: KnownStudy) -> KnownStudy:
    if study.state == "waiting":
        raise StudyWaitingError("the study waits for this hospital's approval; ask again later")
    if study.state == "denied":
        raise StudyDeniedError("this hospital does not take part in the study")
    return study
