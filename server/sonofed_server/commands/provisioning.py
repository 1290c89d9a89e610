"""``sonofed-coordinator init``, ``enrol``, ``provision``, ``revoke`` and ``renew``."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from sonofed_common.cli import agreed_words
from sonofed_common.contract.enrolment import EnrolmentRequest
from sonofed_common.contract.errors import DeploymentError
from sonofed_common.fingerprint import compare_words
from sonofed_common.supervision.supervisor import left_running, read_status
from sonofed_server.provisioning import enrolment
from sonofed_server.provisioning.keys import make_keys, renew_front, words_of_coordinator
from sonofed_server.provisioning.laboratory import provision_sites
from sonofed_server.provisioning.project import read_coordinator

NewProject = Annotated[Path, typer.Argument(help="The project, TOML.", metavar="PROJECT.toml")]
Project = Annotated[Path, typer.Option(help="The project, TOML.")]
DEFAULT = Path("project.toml")


def init(project: NewProject) -> None:
    """Make the coordinator's authority, certificates and signing key."""
    coordinator = read_coordinator(project, new=True)
    make_keys(coordinator)
    print(f"keys are in {coordinator.root}; back this folder up where nobody else reads it")
    print(f"the coordinator's words: {words_of_coordinator(coordinator)}")


def enrol(
    request: Annotated[Path, typer.Argument(help="A hospital's request, JSON.")],
    project: Project = DEFAULT,
    words: Annotated[
        str | None, typer.Option(help="What the hospital read out; else it is asked for.")
    ] = None,
) -> None:
    """Check a hospital's request, compare its fingerprint, and write its startup kit."""
    coordinator = read_coordinator(project)
    read = EnrolmentRequest.read(request.read_bytes())
    print(f"request of site {read.enrolment.site}, made {read.enrolment.created.isoformat()}")
    said = agreed_words(words, read.words)
    compare_words(said, read.enrolment.to_bytes(), "this request")
    kit = enrolment.enrol(coordinator, read)
    print(f"send the hospital this file, in which no secret is: {kit}")
    print(f"and read these words to them over the phone: {words_of_coordinator(coordinator)}")


def provision(
    project: NewProject,
    data: Annotated[Path, typer.Option(help="Folder that holds one folder of images a site.")],
    everything: Annotated[
        bool, typer.Option("--all", help="Coordinator and every site, on this machine.")
    ] = False,
    simulated: Annotated[
        bool, typer.Option("--simulated", help="Sites answer labels from their data sets.")
    ] = False,
) -> None:
    """Provision coordinator and sites at once: for one machine or a test laboratory."""
    if not everything:
        raise typer.BadParameter("say --all: this makes the keys of every site on this machine")
    coordinator = read_coordinator(project, new=True)
    if not coordinator.root.exists():
        make_keys(coordinator)
    for folder in provision_sites(coordinator, data, simulated):
        print(f"site {folder.name} is installed in {folder}")


def revoke(
    site: Annotated[str, typer.Argument(help="The hospital's name.")], project: Project = DEFAULT
) -> None:
    """Refuse a hospital's key from now on; it may enrol again with new keys."""
    enrolment.revoke(read_coordinator(project), site)
    print(f"the key of site {site} is refused from now on")


def renew(project: Project = DEFAULT) -> None:
    """Give the front a new key and certificate; hospitals need do nothing."""
    coordinator = read_coordinator(project)
    until = renew_front(coordinator)
    status = read_status(coordinator.run)
    if status is None and "front" in left_running(coordinator.run):
        raise DeploymentError(
            "the front has a new certificate and still shows the old one, for its supervisor was "
            "killed; run 'sonofed-coordinator up', which starts all anew"
        )
    front = status.programs["front"].identity if status is not None else None
    if front is not None:
        # nginx reads its files anew, and serves who is connected to the end.
        os.kill(front.pid, signal.SIGHUP)
    print(f"the front's certificate is valid until {until.date()}")
