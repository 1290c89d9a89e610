"""Approval of studies: the hospital reads what a study asks before the first action runs."""

from __future__ import annotations

import fcntl
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from sonofed_client.enclave.entry import Entry
from sonofed_client.enclave.study_table import KnownStudy, StudyTable, damaged_study
from sonofed_common.contract.actions import Describe, Parameters
from sonofed_common.contract.errors import (
    ConfigurationError,
    LedgerError,
    StudyDeniedError,
    StudyWaitingError,
)

MAX_WAITING = 64
"""Most studies that wait: a further one is told to ask again and is not kept. So a stranger neither
fills the disk nor takes a study away before a person has read it."""

MAX_AUTOMATIC = 64
"""Most studies that were approved by themselves: a new one takes the place of the oldest."""

_DIGEST = re.compile(r"sha256:([0-9a-f]{12,64})")


class Studies:
    """The studies that a site knows, in a file of its store.

    Parameters
    ----------
    folder : Path
        Of the store.
    coordinator : str
        Public key of the coordinator that the site's settings name.
    automatic : bool
        Approve what is described; off by default in a site's settings. What was approved so waits
        for a person once it is off.
    record : callable, optional
        Puts an entry into the site's ledger; without it, nothing can be decided.

    Notes
    -----
    A *key* is the name of a study or ``sha256:`` and at least 12 digits of its digest. No name
    holds a colon, so a key is never both.
    """

    def __init__(
        self,
        folder: Path,
        coordinator: str,
        automatic: bool = False,
        record: Callable[[Entry], object] | None = None,
    ) -> None:
        self._table = StudyTable(folder / "studies.sqlite")
        self._lock_path = folder / "studies.lock"
        self._coordinator, self._automatic, self._record = coordinator, automatic, record

    def known(self) -> list[KnownStudy]:
        """Return the studies that can be read, oldest first."""
        return [self._now(study) for study in self._table.all()]

    def check(self) -> None:
        """Make sure that all studies can be read.

        Raises
        ------
        StoreError
            One is damaged; the sentence names it.
        """
        for name in self._table.damaged():
            raise damaged_study(name)

    def approved(self, parameters: Parameters) -> KnownStudy | None:
        """Return the study that a request belongs to; None where none was described.

        Raises
        ------
        StudyWaitingError
            The hospital has not decided yet, or the study was not described.
        StudyDeniedError
            The hospital decided against it.
        LedgerError
            The site approves by itself, and the ledger cannot take the entry.
        """
        if isinstance(parameters, Describe):
            return self._described(parameters)
        study = self._table.of_name(parameters.study, self._coordinator)
        if study is None and self._automatic:
            return None
        return self._decided(study)

    def confirm(self, study: KnownStudy) -> None:
        """Make sure that an approval still holds.

        Raises
        ------
        StudyWaitingError, StudyDeniedError
            The hospital has changed its mind since.
        """
        self._decided(self._table.of_digest(study.digest, study.coordinator))

    def is_decided(self, name: str) -> bool:
        """Whether a person decided on a content of this name, either way."""
        return self._table.is_decided(name, self._coordinator)

    def find(self, key: str) -> list[KnownStudy]:
        """Return all contents of a name, or the content of a digest for each coordinator's key.

        Raises
        ------
        ConfigurationError
            The site knows no such study, or the digits begin several digests.
        StoreError
            What it knows of it is damaged.
        """
        found = self._matching(key)
        if not found and key in self._table.damaged():
            raise damaged_study(key)
        if not found:
            raise ConfigurationError(f"{key!r} is no study that this site knows; list the studies")
        return found

    def _matching(self, key: str) -> list[KnownStudy]:
        digits = _DIGEST.fullmatch(key)
        found = [
            study
            for study in self.known()
            if (study.digest.startswith(digits[1]) if digits else study.name == key)
        ]
        if digits and len({study.digest for study in found}) > 1:
            raise ConfigurationError(f"{key} begins several digests; give more of the digits")
        return found

    def one(self, key: str) -> KnownStudy:
        """Return the one content that a key means, of the site's coordinator where that is known.

        Raises
        ------
        ConfigurationError
            No content, or several.
        """
        found = self.find(key)
        digests = dict.fromkeys(study.digest for study in found)
        if len(digests) > 1:
            keys = ", ".join(study.short_key for study in found)
            raise ConfigurationError(f"{key} means several contents; give a digest: {keys}")
        return next((s for s in found if s.coordinator == self._coordinator), found[0])

    def approve(self, key: str) -> KnownStudy:
        """Approve a content; the ledger has the entry before the approval holds.

        Parameters
        ----------
        key : str
            Of its digest: a name says nothing of what was read.

        Raises
        ------
        ConfigurationError
            Another key, no such study, one of another coordinator, or one that nobody could read.
        LedgerError
            The ledger cannot take the entry; nothing is approved.
        """
        if not _DIGEST.fullmatch(key):
            raise ConfigurationError(
                "an approval is of a content: give the digest that 'studies show' prints, "
                "sha256: and its digits"
            )
        with self._alone():
            study = self.one(key)
            if study.coordinator != self._coordinator:
                raise ConfigurationError(
                    f"study {study.name} is of another coordinator than the site's settings name"
                )
            if study.content is None:
                raise ConfigurationError(
                    f"study {study.name} came without its content; nothing can be approved unread"
                )
            return self._decide(study, "approved", "person")

    def deny(self, key: str) -> list[KnownStudy]:
        """Deny a content, or all contents of a name, also ones that were approved before.

        Raises
        ------
        ConfigurationError
            No such study.
        LedgerError
            The ledger cannot take the entry; what was denied until then stays so.
        """
        with self._alone():
            return [self._decide(study, "denied", "person") for study in self.find(key)]

    def forget(self, key: str) -> list[str]:
        """Drop a content, or all contents of a name, and what was decided: they wait anew.

        Returns
        -------
        list of str
            Name of each, and its first digits or that it was damaged.

        Raises
        ------
        ConfigurationError
            No such study.
        LedgerError
            The ledger cannot take the entry; what was forgotten until then stays so.
        """
        with self._alone():
            damaged = key in self._table.damaged()
            found = self._matching(key) if damaged else self.find(key)
            if damaged:
                self._append(Entry(outcome="note", study=key, message="forgotten; it was damaged"))
                self._table.remove_damaged(key)
            for study in found:
                self._note(study, "note", f"forgotten; it was {study.state}")
                self._table.remove(study)
            return [*[f"{key} (damaged)"] * damaged, *(f"{s.name} ({s.short_key})" for s in found)]

    def _described(self, parameters: Describe) -> KnownStudy:
        with self._alone():
            before = self._table.of_digest(parameters.study_digest, self._coordinator)
            study = KnownStudy(
                digest=parameters.study_digest,
                name=parameters.study,
                coordinator=self._coordinator,
                content=parameters.content,
                seen=round(time.time(), 3),
            )
            if before is not None:
                # A digest alone may have come first, under any name.
                unread = before.content is None and study.content is not None
                update = {"content": study.content, "name": study.name} if unread else {}
                study = self._now(before).model_copy(update=update)
            if study.name != parameters.study:
                raise StudyDeniedError("the digest is of a study of another name")
            if self._automatic and study.state == "waiting":
                study = self._decide(study, "approved", "automatic")
            is_new_and_waits = before is None and study.state == "waiting"
            if is_new_and_waits and self._table.waiting() >= MAX_WAITING:
                raise StudyWaitingError(
                    "too many studies wait for this hospital's approval; ask again later"
                )
            if study.state == "approved" and not study.current:
                study = study.model_copy(update={"current": True})
            if study != before:
                self._table.put(study)
                self._table.keep_automatic(MAX_AUTOMATIC)
        return self._decided(study)

    def _decide(
        self,
        study: KnownStudy,
        state: Literal["approved", "denied"],
        by: Literal["person", "automatic"],
    ) -> KnownStudy:
        # An entry too many does no harm; an approval without one does.
        self._note(
            study, state, "" if by == "person" else "approved by itself, as auto_approve says"
        )
        update = {"state": state, "decided_by": by, "decided": round(time.time(), 3)}
        decided = study.model_copy(update=update)
        self._table.put(decided)
        return decided

    def _note(
        self, study: KnownStudy, outcome: Literal["approved", "denied", "note"], message: str
    ) -> None:
        self._append(
            Entry(
                outcome=outcome,
                study=study.name,
                study_digest=study.digest,
                rule=f"coordinator {study.coordinator}",
                message=message,
            )
        )

    def _append(self, entry: Entry) -> None:
        if self._record is None:
            raise LedgerError("a decision on a study needs the site's ledger")
        self._record(entry)

    def _now(self, study: KnownStudy) -> KnownStudy:
        if study.decided_by != "automatic" or self._automatic:
            return study
        return study.model_copy(update={"state": "waiting", "decided_by": "", "decided": 0.0})

    def _decided(self, study: KnownStudy | None) -> KnownStudy:
        if study is None:
            raise StudyWaitingError("this hospital does not know the study; enrol it first")
        study = self._now(study)
        if study.state == "waiting":
            raise StudyWaitingError("the study waits for this hospital's approval; ask again later")
        if study.state == "denied":
            raise StudyDeniedError("this hospital does not take part in the study")
        return study

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._lock_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._lock_path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
