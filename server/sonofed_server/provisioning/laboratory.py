"""All hospitals of a project on one machine: each by its own program, as on machines apart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from sonofed_common.contract.enrolment import EnrolmentRequest
from sonofed_common.contract.errors import DeploymentError
from sonofed_server.provisioning.enrolment import enrol
from sonofed_server.provisioning.keys import words_of_coordinator
from sonofed_server.provisioning.project import Coordinator

FIRST_HEALTH_PORT = 9200


def provision_sites(coordinator: Coordinator, data: Path, simulated: bool) -> list[Path]:
    """Make keys, enrol and install every site of a project under ``sites/`` beside its file.

    Parameters
    ----------
    coordinator : Coordinator
        Initialised.
    data : Path
        Holds one folder of images a site, named as the site.
    simulated : bool
        Sites answer labels from their data sets and approve every study.

    Returns
    -------
    list of Path
        The installations, in the project's order.

    Raises
    ------
    DeploymentError
        A site's program failed.
    """
    words = words_of_coordinator(coordinator)
    folders = []
    for number, site in enumerate(coordinator.project.sites):
        folder = coordinator.root.parent / "sites" / site
        port = FIRST_HEALTH_PORT + number
        _site("init", site, "--folder", folder)
        kit = enrol(coordinator, EnrolmentRequest.read((folder / "request.json").read_bytes()))
        _site(
            *("install", kit, "--folder", folder, "--data", data / site, "--words", words),
            # Who is installed may have chosen another since.
            *(() if (folder / "relay.toml").exists() else ("--health-port", port)),
            *(("--simulated",) if simulated else ()),
        )
        folders.append(folder)
    return folders


def _site(*words: object) -> None:
    # The hospital's program is not imported here: the two sides share the contract alone.
    program = Path(sys.executable).with_name("sonofed-site")
    command = [str(program), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = json.dumps(done.stderr.strip()[-300:])
        raise DeploymentError(f"'sonofed-site {words[0]}' failed for a site: {said}")
