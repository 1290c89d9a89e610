"""The wall: approval, policy and ledger around everything that an enclave is asked to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

from sonofed_client.enclave.ledger import Entry, Ledger, Outcome, payload
from sonofed_client.enclave.policy import Policy, read_policy
from sonofed_client.enclave.release import Released, release
from sonofed_client.enclave.scope import check_scope
from sonofed_client.enclave.store import Store
from sonofed_client.enclave.studies import KnownStudy, Studies
from sonofed_client.settings import SiteSettings
from sonofed_common.contract.actions import Describe, Parameters, parse
from sonofed_common.contract.errors import (
    LedgerError,
    PolicyError,
    SonoFedError,
)
from sonofed_common.contract.records import Array, Records
from sonofed_common.security import sha256

Work = Callable[[Parameters], Records]
Start = Callable[[Parameters, Records], Mapping[str, Array]]
_STUDY_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
LEDGER_TEXT = 400


def open_ledger(store: Store) -> Ledger:
    """Open the ledger of a site's store, with the site's key."""
    return Ledger(store.folder, store.keys.ledger)


def open_studies(settings: SiteSettings) -> Studies:
    """Open the approvals of a site; the oracle of a simulation approves by itself."""
    automatic = settings.auto_approve or settings.oracle
    return Studies(settings.store, settings.coordinator_key, automatic)


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
        self._studies = open_studies(settings)
        allowed = self._policy.coordinators
        if allowed and settings.coordinator_key not in allowed:
            raise PolicyError(
                "the policy's coordinators do not name the coordinator_key of the site's settings",
                "coordinators",
            )

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
        entry = Entry(outcome="sent", action=action[:64], study=_study_name(request))
        admitted = False
        try:
            parameters = parse(action, request)
            study = self._studies.approved(parameters)
            entry = _about(entry, parameters, study)
            self._admit(action, parameters, request, study)
            admitted = True
            reply = work(parameters)
            entry = entry.model_copy(update={"records": _records(reply)})
            released = self._release(action, parameters, request, reply, start)
            size, digest = payload(released.records)
            self._check_bytes(action, parameters, size)
        except LedgerError:
            raise
        except Exception as error:
            refused = isinstance(error, PolicyError) or not admitted
            self._ledger.append(_failure(entry, error, "refused" if refused else "failed"))
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
        return released.records

    def _admit(
        self, action: str, parameters: Parameters, request: Records, study: KnownStudy | None
    ) -> None:
        if study is not None and study.content is not None:
            check_scope(study.content, action, parameters)
        self._policy.admit(parameters, action, request)

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

        if not any(rule.noise for rule in self._policy.actions[action].arrays):
            return release(self._policy, action, reply, received)
        # Fresh noise for each repetition of a question could be averaged away.
        values = parameters.model_dump(mode="json", exclude={"study"})
        facts = [self._policy.digest(), action, values, request.digest(), *payload(reply)]
        name = f"released/{sha256(json.dumps(facts, sort_keys=True).encode())}"
        kept = self._store.get(name)
        if kept is not None:
            return Released(kept, f"actions.{action}, as released before")
        released = release(self._policy, action, reply, received)
        self._store.put(name, released.records)
        self._store.trim("released/")
        return released

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


def _failure(entry: Entry, error: Exception, outcome: Outcome) -> Entry:
    known = isinstance(error, SonoFedError)
    # What is not of the catalogue may name a file or a patient; not even its sentence was sent.
    sentence = str(error) if known else f"the site could not do the work ({type(error).__name__})"
    return entry.model_copy(
        update={
            "outcome": outcome,
            "rule": getattr(error, "rule", ""),
            "message": sentence[:LEDGER_TEXT],
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
