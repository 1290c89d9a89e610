"""The wall: approval, policy and ledger around everything that an enclave is asked to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from sonofed_client.enclave.entry import MESSAGE_LENGTH, Entry, Outcome
from sonofed_client.enclave.ledger import Ledger, payload
from sonofed_client.enclave.policy import RUNNING_POLICY, Policy, read_policy
from sonofed_client.enclave.release import Released, release
from sonofed_client.enclave.scope import check_scope
from sonofed_client.enclave.store import Store
from sonofed_client.enclave.studies import Studies
from sonofed_client.enclave.study_table import KnownStudy
from sonofed_client.settings import SiteSettings
from sonofed_common.contract.actions import Describe, Parameters, parse
from sonofed_common.contract.errors import (
    LedgerError,
    PolicyError,
    SonoFedError,
    StoreError,
    StudyDeniedError,
    StudyWaitingError,
)
from sonofed_common.contract.records import Array, Records
from sonofed_common.runtime import write_atomically
from sonofed_common.security import sha256

Work = Callable[[Parameters], Records]
Start = Callable[[Parameters, Records], Mapping[str, Array]]
_STUDY_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def open_ledger(store: Store) -> Ledger:
    """Open the ledger of a site's store, with the site's key."""
    return Ledger(store.folder, store.keys.ledger)


def open_studies(settings: SiteSettings, ledger: Ledger | None = None) -> Studies:
    """Open the approvals of a site.

    Parameters
    ----------
    settings : SiteSettings
        Of the site.
    ledger : Ledger, optional
        For decisions; without it they can only be read.
    """
    automatic = settings.coordinator_key in settings.auto_approve
    record = None if ledger is None else ledger.append
    return Studies(settings.store, settings.coordinator_key, automatic, record)


class Wall:
    """What stands between a request and the site's work, and between the work and its reply.

    Parameters
    ----------
    settings : SiteSettings
        Of the site.
    store : Store
        Holds ledger and approvals, and the replies that noise was added to.
    ledger : Ledger, optional
        Default: the store's.
    policy : Policy, optional
        Default: the one that the settings name.

    Raises
    ------
    PolicyError
        The policy does not take the coordinator that the settings name.
    """

    def __init__(
        self,
        settings: SiteSettings,
        store: Store,
        ledger: Ledger | None = None,
        policy: Policy | None = None,
    ) -> None:
        self._store = store
        self._ledger = ledger or open_ledger(store)
        self._policy = policy or read_policy(settings.policy)
        self._studies = open_studies(settings, self._ledger)
        self._policy.check_coordinator(settings.coordinator_key)
        write_atomically(store.folder / RUNNING_POLICY, self._policy.digest().encode(), 0o600)

    @property
    def policy(self) -> Policy:
        """The site's policy, as it was read when this wall was made."""
        return self._policy

    @property
    def ledger(self) -> Ledger:
        """The site's ledger."""
        return self._ledger

    def perform(
        self, action: str, request: Records, work: Work, start: Start | None = None
    ) -> Records:
        """Do the work of a request if all agree, and let out what the policy names of its reply.

        Parameters
        ----------
        action : str
            As asked.
        request : Records
            As it came.
        work : callable
            Does it; called with the validated parameters after approval and policy agreed.
        start : callable, optional
            The arrays that an update starts from; default: the request's own.

        Raises
        ------
        UnknownActionError, ParameterError
            The request is not one that a site answers.
        StudyWaitingError, StudyDeniedError
            The hospital has not approved the study, or not this part of it.
        PolicyError
            The policy does not let the request in or the reply out.
        LedgerError
            The ledger cannot take the entry, and so nothing leaves.
        SonoFedError
            What the work itself raises.
        """
        parameters, study, entry = self._let_in(action, request)
        try:
            reply = work(parameters)
            # The hospital may have changed its mind meanwhile.
            self._confirm(parameters, study)
            entry = entry.model_copy(update={"records": _records(reply)})
            released = self._release(action, parameters, request, reply, start)
            size, digest = payload(released.records)
            self._check_bytes(action, parameters, size)
        except LedgerError:
            raise
        except Exception as error:
            self._refuse(entry, error, _held(error), study)
            raise
        self._ledger.append(
            entry.model_copy(
                update={
                    "records": _records(released.records),
                    "bytes": size,
                    "sha256": digest,
                    "rule": released.rule,
                    "privacy": released.privacy,
                }
            )
        )
        if released.kept_as:
            # Only what the ledger counts may be given again without being counted.
            self._store.put(released.kept_as, released.records)
            self._store.trim("released/")
        return released.records

    def admit(self, action: str, request: Records) -> Callable[[], None]:
        """Refuse a request, before it is queued, that `perform` would refuse before any work.

        Returns
        -------
        callable
            To be called before a reply that was computed earlier leaves: it raises, with an entry,
            where the approval does not hold any more.

        Raises
        ------
        SonoFedError
            As `perform`; the refusal is on record.
        """
        parameters, study, entry = self._let_in(action, request)

        def confirm() -> None:
            try:
                self._confirm(parameters, study)
            except Exception as error:
                self._refuse(entry, error, "refused", study)
                raise

        return confirm

    def _let_in(self, action: str, request: Records) -> tuple[Parameters, KnownStudy | None, Entry]:
        entry = Entry(outcome="sent", action=action[:64], study=_study_name(request))
        study = None
        try:
            parameters = parse(action, request)
            study = self._studies.approved(parameters)
            entry = _about(entry, parameters, study)
            if study is not None and study.content is not None:
                check_scope(study.content, action, parameters)
            self._policy.admit(parameters, action, request)
        except LedgerError:
            raise
        except Exception as error:
            self._refuse(entry, error, "refused", study)
            raise
        return parameters, study, entry

    def _refuse(
        self, entry: Entry, error: Exception, outcome: Outcome, study: KnownStudy | None
    ) -> None:
        code = error.code if isinstance(error, SonoFedError) else SonoFedError.code
        try:
            # A study that was let in may be forgotten by now.
            was_decided = study is not None and study.decided_by == "person"
            is_decided = was_decided or self._studies.is_decided(entry.study)
        except StoreError:
            is_decided = False
        self._ledger.refuse(_failure(entry, error, outcome), code, is_decided)

    def _confirm(self, parameters: Parameters, study: KnownStudy | None) -> None:
        if study is None:
            self._studies.approved(parameters)
        else:
            self._studies.confirm(study)

    def _release(
        self,
        action: str,
        parameters: Parameters,
        request: Records,
        reply: Records,
        start: Start | None,
    ) -> Released:
        def received() -> Mapping[str, Array]:
            return start(parameters, request) if start else request.arrays

        if not self._policy.actions[action].is_noised:
            return release(self._policy, action, reply, received)
        # Fresh noise for each repetition of a question could be averaged away.
        values = parameters.model_dump(mode="json", exclude={"study"})
        facts = [self._policy.digest(), action, values, request.digest(), *payload(reply)]
        name = f"released/{sha256(json.dumps(facts, sort_keys=True).encode())}"
        kept = self._store.get(name)
        if kept is not None:
            return Released(kept, f"actions.{action}, as released before")
        # And so could that of questions which hardly differ.
        before = self._ledger.noised_replies(parameters.study, action)
        self._policy.check_releases(action, before)
        released = release(self._policy, action, reply, received)
        return replace(released, kept_as=name)

    def _check_bytes(self, action: str, parameters: Parameters, size: int) -> None:
        day = self._ledger.sent_bytes()
        self._policy.check_bytes(action, size, self._ledger.sent_bytes(parameters.study), day)


def _about(entry: Entry, parameters: Parameters, study: KnownStudy | None) -> Entry:
    described = parameters.study_digest if isinstance(parameters, Describe) else ""
    number = getattr(parameters, "round", None)
    return entry.model_copy(
        update={
            "study": parameters.study,
            "study_digest": study.digest if study else described,
            "round": number if isinstance(number, int) else None,
        }
    )


def _held(error: Exception) -> Outcome:
    kinds = (PolicyError, StudyDeniedError, StudyWaitingError)
    return "refused" if isinstance(error, kinds) else "failed"


def _failure(entry: Entry, error: Exception, outcome: Outcome) -> Entry:
    known = isinstance(error, SonoFedError)
    # What is not of the catalogue may name a file or a patient; not even its sentence was sent.
    sentence = str(error) if known else f"the site could not do the work ({type(error).__name__})"
    return entry.model_copy(
        update={
            "outcome": outcome,
            "rule": getattr(error, "rule", ""),
            "message": sentence[:MESSAGE_LENGTH],
        }
    )


def _study_name(request: Records) -> str:
    name = request.config.get("study")
    return name if isinstance(name, str) and _STUDY_NAME.fullmatch(name) else ""


def _records(reply: Records) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    arrays = ((n, a.dtype.name, tuple(a.shape)) for n, a in sorted(reply.arrays.items()))
    parts = (("config", reply.config), ("metric", reply.metrics))
    named = ((name, kind, ()) for kind, values in parts for name in sorted(values))
    return (*arrays, *named)
