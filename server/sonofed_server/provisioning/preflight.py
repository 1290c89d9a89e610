"""What a coordinator checks before a study."""

from __future__ import annotations

from collections.abc import Iterator

from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.preflight import Finding, certificate, front, look, machine, unwatched
from sonofed_common.security import load_signing_key, public_hex
from sonofed_common.supervision.supervisor import left_running, read_status
from sonofed_server.provisioning.certificates import read_pair
from sonofed_server.provisioning.enrolment import SiteRecord, records
from sonofed_server.provisioning.front import find_nginx
from sonofed_server.provisioning.project import Coordinator


def check(coordinator: Coordinator) -> Iterator[Finding]:
    """Look at everything that a study will need; what is missing hides nothing else."""
    yield look("signing key", lambda: public_hex(load_signing_key(coordinator.signing_key)))
    yield certificate("authority", coordinator.authority, "enrol every site with a new one")
    yield look("authority's key", lambda: _authority_key(coordinator))
    yield certificate("front's certificate", coordinator.front, "run 'sonofed-coordinator renew'")
    yield look("SuperLink's certificate", lambda: _superlink(coordinator))
    yield look("nginx", find_nginx)
    yield from _programs(coordinator)
    yield from front(coordinator.project.address, coordinator.authority)
    yield from _sites(coordinator)
    yield from machine(coordinator.root)


def _authority_key(coordinator: Coordinator) -> str:
    _, key = read_pair(coordinator.authority, coordinator.authority_key)
    return "fits" if key is not None else "is kept elsewhere; 'renew' needs it"


def _superlink(coordinator: Coordinator) -> str:
    _, key = read_pair(coordinator.superlink_certificate, coordinator.superlink_key)
    if key is None:
        raise ConfigurationError(
            f"{coordinator.superlink_key} is missing; restore it from its backup"
        )
    return "fits its key"


def _programs(coordinator: Coordinator) -> Iterator[Finding]:
    status = read_status(coordinator.run)
    left = left_running(coordinator.run)
    for name in left:
        yield unwatched(name, "sonofed-coordinator up")
    if left:
        return
    if status is None:
        said = "not started; run 'sonofed-coordinator up'"
        yield Finding(subject="processes", state="warning", said=said)
        return
    for name, program in status.programs.items():
        if program.state == "running":
            said = f"works, {program.restarts} restarts"
            yield Finding(subject=name, state="ok", said=said)
        else:
            said = f"{program.reason or program.state}; see {coordinator.run / name}.log"
            yield Finding(subject=name, state="fails", said=said)


def _sites(coordinator: Coordinator) -> Iterator[Finding]:
    known, damaged = records(coordinator)
    for site, said in damaged.items():
        yield Finding(subject=f"site {site}", state="fails", said=said)
    for site in coordinator.project.sites:
        if site not in damaged:
            yield _site(site, known.get(site))


def _site(site: str, record: SiteRecord | None) -> Finding:
    subject = f"site {site}"
    if record is None:
        said = "not enrolled; ask for its request, then run 'sonofed-coordinator enrol'"
        return Finding(subject=subject, state="warning", said=said)
    if record.revoked:
        return Finding(subject=subject, state="warning", said="its key is revoked")
    return Finding(subject=subject, state="ok", said=f"enrolled on {record.enrolled.date()}")
