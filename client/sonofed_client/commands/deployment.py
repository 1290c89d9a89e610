"""``sonofed-site up``, ``down`` and ``status``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sonofed_client.admission import NOT_KNOWN, refusal
from sonofed_client.commands.provisioning import Folder
from sonofed_client.metrics_file import read_metrics
from sonofed_client.provisioning import preflight
from sonofed_client.provisioning.place import Hospital
from sonofed_client.provisioning.programs import (
    SUPERNODE,
    beside,
    installed_kit,
    programs,
    socket_of,
)
from sonofed_common import log
from sonofed_common.cli import tell
from sonofed_common.supervision.control import describe, say_status, start_detached, stop
from sonofed_common.supervision.program import answers
from sonofed_common.supervision.supervisor import supervise

DEFAULT = Path("site")


def up(
    folder: Folder = DEFAULT,
    detach: Annotated[
        bool, typer.Option("--detach", help="In the background; return when all works that can.")
    ] = False,
    relay: Annotated[
        bool, typer.Option("--relay", help="Without the enclave, which another account runs.")
    ] = False,
) -> None:
    """Start enclave and SuperNode, and start again whichever ends.

    All run under this account, unless the enclave is run by another: see the units for systemd.
    """
    hospital = Hospital(folder.resolve())
    if not detach:
        log.configure("supervisor", site=installed_kit(hospital).site)
    each, title = programs(hospital, relay), _title(hospital)
    if not detach:
        port, socket = hospital.relay_settings.health_port, socket_of(hospital, relay)
        supervise(hospital.run, title, port, each, lambda: read_metrics(socket))
        return
    command = [str(beside("sonofed-site")), "up", "--folder", str(hospital.root)]
    command += ["--relay"] if relay else []
    address = installed_kit(hospital).address
    host, _, port_there = address.rpartition(":")

    def is_there() -> bool:
        return answers(int(port_there), host)

    found = start_detached(hospital.run, command, title, {SUPERNODE: is_there})
    for line in describe(found):
        print(line)
    if found.healthy:
        print(f"{title} is up")
    elif not is_there():
        print(f"{title} is up; it connects as soon as the coordinator at {address} answers")
    else:
        refused = refusal(hospital.heartbeat).exists()
        why = NOT_KNOWN if refused else f"see {hospital.run / SUPERNODE}.log"
        print(f"{title} is up; {address} did not let it in yet, and it goes on trying: {why}")


def down(folder: Folder = DEFAULT) -> None:
    """End all that `up` started; jobs that are not over go on when it is up again."""
    hospital = Hospital(folder.resolve())
    ended = stop(hospital.run, _title(hospital))
    print(f"{_title(hospital)} is down" if ended else f"{_title(hospital)} was not up")


def status(
    folder: Folder = DEFAULT,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say how each program is; exit code 1 unless all of them work."""
    hospital = Hospital(folder.resolve())
    raise typer.Exit(say_status(hospital.run, _title(hospital), json))


def check(
    folder: Folder = DEFAULT,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Look at everything that a study will need; exit code 1 if anything fails."""
    tell(preflight.check(Hospital(folder.resolve())), json)


def _title(hospital: Hospital) -> str:
    return f"the site in {hospital.root}"
