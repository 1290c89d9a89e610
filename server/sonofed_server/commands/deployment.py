"""``sonofed-coordinator up``, ``down`` and ``status``."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from sonofed_common import log
from sonofed_common.cli import tell
from sonofed_common.supervision.control import describe, say_status, start_detached, stop
from sonofed_common.supervision.supervisor import supervise
from sonofed_server.commands.provisioning import DEFAULT, Project
from sonofed_server.provisioning import preflight
from sonofed_server.provisioning.front import write_front
from sonofed_server.provisioning.programs import beside, programs
from sonofed_server.provisioning.project import find_root, read_coordinator, run_folder
from sonofed_server.study.metrics import study_metrics

TITLE = "the coordinator"
REGISTRATION_SECONDS = 60.0
"""For the registration of the hospitals, of which many take longer."""


def up(
    project: Project = DEFAULT,
    detach: Annotated[
        bool, typer.Option("--detach", help="In the background; return when all works.")
    ] = False,
) -> None:
    """Start SuperLink, front and conductor, and start again whichever ends."""
    if not detach:
        log.configure("supervisor")
    coordinator = read_coordinator(project)
    if not detach:
        port = coordinator.project.health_port
        supervise(
            coordinator.run,
            TITLE,
            port,
            programs(coordinator, project),
            lambda: study_metrics(coordinator),
            lambda: write_front(coordinator),
        )
        return
    command = [str(beside("sonofed-coordinator")), "up", "--project", str(project)]
    until = time.monotonic() + REGISTRATION_SECONDS
    waited_for = {"conductor": lambda: time.monotonic() < until}
    for line in describe(start_detached(coordinator.run, command, TITLE, waited_for)):
        print(line)
    print(f"{TITLE} is up; hospitals reach it at {coordinator.project.address}")


def down(project: Project = DEFAULT) -> None:
    """End all that `up` started; studies go on when it is up again."""
    ended = stop(run_folder(find_root(project)), TITLE)
    print(f"{TITLE} is down" if ended else f"{TITLE} was not up")


def status(
    project: Project = DEFAULT,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say how each program is; exit code 1 unless all of them work."""
    raise typer.Exit(say_status(run_folder(find_root(project)), TITLE, json))


def check(
    project: Project = DEFAULT,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Look at everything that a study will need; exit code 1 if anything fails."""
    tell(preflight.check(read_coordinator(project)), json)


def conduct(project: Project = DEFAULT) -> None:
    """Begin the studies that are wanted; `up` runs this."""
    from sonofed_server.study.conductor import Conductor

    log.configure("conductor")
    Conductor(read_coordinator(project)).run()
