"""What a hospital checks before a study."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from sonofed_client.admission import NOT_KNOWN, refusal
from sonofed_client.enclave.policy import read_policy
from sonofed_client.provisioning.place import Hospital
from sonofed_client.provisioning.programs import SUPERNODE, installed_kit, socket_of
from sonofed_client.provisioning.request import read_node_key
from sonofed_client.settings import SiteSettings, read_site
from sonofed_common.contract.enrolment import node_public_text
from sonofed_common.contract.errors import (
    ConfigurationError,
    EnrolmentError,
    PolicyError,
    SiteEmptyError,
    SonoFedError,
)
from sonofed_common.preflight import Finding, certificate, front, look, machine, unwatched
from sonofed_common.security import sha256
from sonofed_common.supervision.program import answers_on
from sonofed_common.supervision.supervisor import left_running, read_status

SKIPPED_NAMED = 3


def check(hospital: Hospital) -> Iterator[Finding]:
    """Look at everything that a study will need; what is missing hides nothing else."""
    yield look("kit", lambda: _kit(hospital))
    # What it says is said above.
    with suppress(ConfigurationError):
        address = installed_kit(hospital).address
        yield certificate("authority", hospital.authority, "ask the coordinator for a new kit")
        yield from front(address, hospital.authority)
    try:
        yield _program(hospital, "enclave", socket_of(hospital))
    except ConfigurationError as error:
        yield Finding(subject="enclave", state="fails", said=error.message)
    yield _program(hospital, SUPERNODE)
    yield _registration(hospital)
    yield from _settings(hospital)
    if hospital.root.is_dir():
        yield from machine(hospital.root)


def _kit(hospital: Hospital) -> str:
    kit = installed_kit(hospital)
    own = node_public_text(read_node_key(hospital).public_key())
    if sha256(own.encode()) != kit.node_key:
        raise EnrolmentError(
            "the node key here is not the one that is enrolled; send the coordinator "
            f"{hospital.request} and install the kit that comes back"
        )
    return f"of project {kit.project} for site {kit.site}; contact {kit.contact}"


def _program(hospital: Hospital, name: str, socket: Path | None = None) -> Finding:
    status, answers = read_status(hospital.run), socket is None or answers_on(socket)
    program = status.programs.get(name) if status is not None else None
    if program is not None and program.state == "running" and answers:
        return Finding(subject=name, state="ok", said=f"answers, {program.restarts} restarts")
    if program is not None:
        said = f"does not work ({program.reason or program.state}); see {hospital.run / name}.log"
        return Finding(subject=name, state="fails", said=said)
    if name in left_running(hospital.run):
        return unwatched(name, "sonofed-site up")
    if socket is not None and answers:
        return Finding(subject=name, state="ok", said=f"answers on {socket}; another starts it")
    if status is not None:
        said = f"does not answer on {socket}; start it under its own account"
        return Finding(subject=name, state="fails", said=said)
    said = "not started; run 'sonofed-site up'"
    return Finding(subject=name, state="warning", said=said)


def _registration(hospital: Hospital) -> Finding:
    subject = "registration"
    if refusal(hospital.heartbeat).exists():
        return Finding(subject=subject, state="fails", said=NOT_KNOWN)
    up = read_status(hospital.run) is not None or SUPERNODE in left_running(hospital.run)
    if up and hospital.heartbeat.exists():
        return Finding(subject=subject, state="ok", said="the coordinator let this node in")
    said = "the coordinator was not asked yet whether it knows this node"
    return Finding(subject=subject, state="warning", said=said)


def _settings(hospital: Hospital) -> Iterator[Finding]:
    if not os.access(hospital.site, os.R_OK):
        said = (
            f"{hospital.site} is not there or closed to this account, as it is to a relay's; "
            "'sonofed-site policy check' and 'sonofed-site intake' look at policy and images under "
            "the enclave's"
        )
        yield Finding(subject="settings", state="warning", said=said)
        return
    try:
        settings = read_site(hospital.site)
    except ConfigurationError as error:
        yield Finding(subject="settings", state="fails", said=error.message)
        return
    yield look("policy", lambda: _policy(settings))
    yield _images(settings)


def _policy(settings: SiteSettings) -> str:
    policy = read_policy(settings.policy)
    if policy.coordinators and settings.coordinator_key not in policy.coordinators:
        raise PolicyError(
            "the policy's coordinators do not name the coordinator_key of the site's settings"
        )
    return f"'{policy.name}' is valid, digest {policy.digest()[:12]}"


def _images(settings: SiteSettings) -> Finding:
    # The readers load an image library; the other commands start faster without.
    from sonofed_common.data.readers import read

    try:
        reading = read(settings.data.kind, settings.data.path)
        if not reading.samples:
            raise SiteEmptyError(f"no image in {settings.data.path} is usable")
    except SonoFedError as error:
        return Finding(subject="images", state="fails", said=error.message)
    said = f"{len(reading.samples)} are readable"
    if not reading.skipped:
        return Finding(subject="images", state="ok", said=said)
    few = "; ".join(f"{s.name} ({s.reason})" for s in reading.skipped[:SKIPPED_NAMED])
    said = f"{said}, {len(reading.skipped)} are not, for example {few}"
    return Finding(
        subject="images", state="warning", said=f"{said}; 'sonofed-site intake' says all"
    )
